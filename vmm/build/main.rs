//! Compiles the system call filters of the architecture the machine is built for.
//!
//! seccompiler's filters compare the number of a call with one number after the other. When a filter is
//! installed, Linux tries every number there is on it, which is most of what that takes. So a filter here
//! is a search tree, with seccompiler's filters of a few calls as its leaves, and without what those
//! repeat.
//!
//! An architecture without a file in `seccomp/` gets no filters at all, which the program can tell
//! from filters that allow everything.

mod shorten;

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use seccompiler::{BpfProgram, TargetArch, compile_from_json, sock_filter};
use serde_json::{Value, json};
use shorten::shorten;

/// Filters, mostly of kinds of threads, as the JSON files and the fields of `Filters` call them.
const KINDS: [&str; 6] = ["vcpu", "vmm", "io", "main", "growing", "without_clone3"];

/// System calls of one leaf: fewer make the filter longer, and more make it slower.
const LEAF_CALLS: usize = 4;

/// How many instructions every filter of seccompiler begins with: they end a process of another
/// architecture, and load the number of the call.
const HEAD_INSTRUCTIONS: usize = 4;

/// `A = number of the call` (linux/filter.h, `BPF_LD | BPF_W | BPF_ABS` of `seccomp_data.nr`).
const LOAD_NUMBER: sock_filter = sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
/// Jumps on a number that is at least `k` (`BPF_JMP | BPF_JGE | BPF_K`).
const JUMP_FROM: u16 = 0x35;
/// Jumps over `k` instructions (`BPF_JMP | BPF_JA`).
const JUMP: u16 = 0x05;
/// Most instructions of a filter (linux/bpf_common.h, `BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=seccomp");
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let source = format!("seccomp/{arch}.json");
    let filters = if Path::new(&source).exists() {
        let arch = TargetArch::try_from(arch.as_str())?;
        let text = fs::read(&source)?;
        let failed = |error: Box<dyn Error>| format!("{source}: {error}");
        // seccompiler refuses what would be lost in between: keys that are there twice.
        compile_from_json(&text[..], arch).map_err(|error| failed(error.into()))?;
        let filters = literal(serde_json::from_slice(&text)?, arch).map_err(failed)?;
        format!("Some({filters})")
    } else {
        "None".to_owned()
    };
    let code = format!("const FILTERS: Option<Filters> = {filters};\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), code)?;
    Ok(())
}

/// The filters of all `kinds` of threads as an expression of Rust.
fn literal(mut kinds: BTreeMap<String, Value>, arch: TargetArch) -> Result<String, Box<dyn Error>> {
    let mut code = "Filters {".to_owned();
    for kind in KINDS {
        let filter = kinds.remove(kind).ok_or(format!("no filter for {kind}"))?;
        write!(code, "{kind}: &[")?;
        for step in tree(&filter, arch).map_err(|error| format!("{kind}: {error}"))? {
            let (operation, if_true, if_false) = (step.code, step.jt, step.jf);
            write!(
                code,
                "sock_filter {{ code: {operation}, jt: {if_true}, jf: {if_false}, k: {} }},",
                step.k
            )?;
        }
        code.push_str("],");
    }
    match kinds.into_keys().next() {
        Some(kind) => Err(format!("no thread is called {kind}").into()),
        None => Ok(code + "}"),
    }
}

/// What `filter` says, as a search tree.
fn tree(filter: &Value, arch: TargetArch) -> Result<BpfProgram, Box<dyn Error>> {
    let rules = filter["filter"].as_array().filter(|rules| !rules.is_empty());
    let rules = rules.ok_or("no list of rules")?;
    let mut by_call = BTreeMap::<&str, Vec<&Value>>::new();
    for rule in rules {
        let call = rule["syscall"].as_str().ok_or("a rule without a system call")?;
        by_call.entry(call).or_default().push(rule);
    }
    // Sorted by the numbers of the calls, with which their filters begin.
    let mut by_number = BTreeMap::new();
    for (call, rules) in by_call {
        let (_, alone) = compile(filter, &rules, arch)?;
        if by_number.insert(alone.first().ok_or("an empty filter")?.k, rules).is_some() {
            return Err(format!("{call} is another name of a call that has rules").into());
        }
    }
    let by_number: Vec<_> = by_number.into_values().collect();
    let leaves = by_number
        .chunks(LEAF_CALLS)
        .map(|calls| compile(filter, &calls.concat(), arch))
        .collect::<Result<Vec<_>, _>>()?;
    let (heads, leaves): (Vec<_>, Vec<_>) = leaves.into_iter().unzip();
    let mut program = heads.into_iter().next().ok_or("no rules")?;
    program.extend(search(&leaves));
    let program = shorten(&program)?;
    if program.len() > MAX_INSTRUCTIONS {
        return Err(format!("{} instructions, more than Linux takes", program.len()).into());
    }
    Ok(program)
}

/// seccompiler's filter for some of the rules of `filter`: what all begin with, and the rest, which begins
/// with the comparison with the lowest number of a call.
fn compile(
    filter: &Value,
    rules: &[&Value],
    arch: TargetArch,
) -> Result<(BpfProgram, BpfProgram), Box<dyn Error>> {
    const NAME: &str = "filter";
    let mut part = filter.clone();
    part["filter"] = json!(rules);
    let mut compiled = compile_from_json(json!({ NAME: part }).to_string().as_bytes(), arch)?;
    let mut head = compiled.remove(NAME).ok_or("no filter")?;
    let rest = head.split_off(HEAD_INSTRUCTIONS.min(head.len()));
    if head.last() != Some(&LOAD_NUMBER) {
        return Err("a filter does not begin as those of seccompiler do".into());
    }
    Ok((head, rest))
}

/// Goes to the leaf that may know the call, whose number is loaded.
fn search(leaves: &[BpfProgram]) -> BpfProgram {
    if let [leaf] = leaves {
        return leaf.clone();
    }
    let (low, high) = leaves.split_at(leaves.len() / 2);
    let (first, low, high) = (high[0][0].k, search(low), search(high));
    // A jump on a condition does not reach far enough.
    let over = u32::try_from(low.len()).expect("filters have some hundred instructions");
    let mut program = vec![
        sock_filter { code: JUMP_FROM, jt: 0, jf: 1, k: first },
        sock_filter { code: JUMP, jt: 0, jf: 0, k: over },
    ];
    program.extend(low);
    program.extend(high);
    program
}
