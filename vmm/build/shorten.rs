//! Says what a filter says in fewer instructions: Linux checks, translates and compiles each of them
//! whenever a filter is installed.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

use super::JUMP;

/// `A = a field of the call` (linux/filter.h, `BPF_LD | BPF_W | BPF_ABS`).
const LOAD: u16 = 0x20;
/// Ends the filter with the verdict `k` (`BPF_RET | BPF_K`).
const RETURN: u16 = 0x06;
/// Bits of a code that say its class; 5 are jumps (linux/bpf_common.h, `BPF_CLASS`).
const CLASS: u16 = 0x07;
const JUMPS: u16 = 0x05;

/// What is known of the accumulator in front of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Nothing gets there.
    Unreachable,
    /// It holds the field at this offset, in bytes.
    Field(u32),
    /// It depends on the way there.
    Nothing,
}

impl Known {
    fn or(self, other: Known) -> Known {
        match (self, other) {
            (Known::Unreachable, known) | (known, Known::Unreachable) => known,
            (one, another) if one == another => one,
            _ => Known::Nothing,
        }
    }
}

/// A filter with what is known at each of its instructions.
struct Filter<'a> {
    program: &'a [sock_filter],
    known: Vec<Known>,
}

/// Leaves out of `program` what is never reached, jumps to jumps, loads of what is loaded already, and all
/// but one of equal verdicts.
///
/// # Errors
///
/// When a condition would have to jump over more than 255 instructions, which none can.
pub fn shorten(program: &[sock_filter]) -> Result<BpfProgram, String> {
    let filter = Filter::new(program);
    let kept: Vec<_> = (0..program.len()).filter(|&at| filter.is_kept(at)).collect();
    let mut places = BTreeMap::new();
    let mut length = 0;
    for (index, &at) in kept.iter().enumerate() {
        places.insert(at, length);
        length += 1 + usize::from(filter.needs_jump(at, kept.get(index + 1)));
    }
    let mut verdicts = BTreeMap::new();
    for step in program.iter().filter(|step| step.code == RETURN) {
        let next = length + verdicts.len();
        verdicts.entry(step.k).or_insert(next);
    }
    let place = |at: usize| {
        let end = filter.end_of_jumps(at);
        places
            .get(&end)
            .or_else(|| verdicts.get(&program[end].k))
            .copied()
            .expect("it is reachable")
    };

    let mut short = BpfProgram::with_capacity(length + verdicts.len());
    for (index, &at) in kept.iter().enumerate() {
        let mut step = program[at].clone();
        if step.code & CLASS == JUMPS {
            let distance = |to: usize| {
                u8::try_from(place(to) - short.len() - 1)
                    .map_err(|_| "a filter is too long".to_owned())
            };
            let [if_true, if_false] = branches(&program[at], at);
            (step.jt, step.jf) = (distance(if_true)?, distance(if_false)?);
        }
        short.push(step);
        if filter.needs_jump(at, kept.get(index + 1)) {
            let distance = place(at + 1) - short.len() - 1;
            let k = u32::try_from(distance).expect("filters have some hundred instructions");
            short.push(sock_filter { code: JUMP, jt: 0, jf: 0, k });
        }
    }
    let mut in_order: Vec<_> = verdicts.into_iter().map(|(k, place)| (place, k)).collect();
    in_order.sort_unstable();
    short.extend(in_order.into_iter().map(|(_, k)| sock_filter { code: RETURN, jt: 0, jf: 0, k }));
    Ok(short)
}

/// Where a jump on a condition at `at` goes.
fn branches(step: &sock_filter, at: usize) -> [usize; 2] {
    [step.jt, step.jf].map(|over| at + 1 + usize::from(over))
}

impl<'a> Filter<'a> {
    /// Filters never jump back, so one pass sees every way to an instruction before the instruction.
    fn new(program: &'a [sock_filter]) -> Self {
        let mut known = vec![Known::Unreachable; program.len()];
        known[0] = Known::Nothing;
        for (at, step) in program.iter().enumerate() {
            if known[at] == Known::Unreachable {
                continue;
            }
            let (next, after) = match step.code {
                RETURN => (vec![], known[at]),
                JUMP => (vec![at + 1 + step.k as usize], known[at]),
                LOAD => (vec![at + 1], Known::Field(step.k)),
                code if code & CLASS == JUMPS => (branches(step, at).to_vec(), known[at]),
                _ => (vec![at + 1], Known::Nothing),
            };
            for to in next {
                known[to] = known[to].or(after);
            }
        }
        Filter { program, known }
    }

    /// Whether the instruction does nothing but to go on elsewhere.
    fn is_detour(&self, at: usize) -> bool {
        let step = &self.program[at];
        step.code == JUMP || (step.code == LOAD && self.known[at] == Known::Field(step.k))
    }

    /// Whether the instruction keeps a place of its own; verdicts come last.
    fn is_kept(&self, at: usize) -> bool {
        let is_reached = self.known[at] != Known::Unreachable;
        is_reached && !self.is_detour(at) && self.program[at].code != RETURN
    }

    /// The instruction that is done in the end when `at` is come to.
    fn end_of_jumps(&self, mut at: usize) -> usize {
        while self.is_detour(at) {
            let step = &self.program[at];
            at += 1 + if step.code == JUMP { step.k as usize } else { 0 };
        }
        at
    }

    /// Whether what follows the instruction at `at` is not what is `kept_next`.
    fn needs_jump(&self, at: usize, kept_next: Option<&usize>) -> bool {
        let falls_through = self.program[at].code & CLASS != JUMPS;
        falls_through && Some(&self.end_of_jumps(at + 1)) != kept_next
    }
}
