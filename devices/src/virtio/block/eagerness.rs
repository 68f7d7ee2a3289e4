//! When the thread that serves a disk is to take the processor from the guest that asks.

use std::cell::Cell;

/// From how many requests on, in flight or found at once, a queue is deep.
const DEEP: usize = 4;

/// How many times in a row a queue is found shallow that was deep, until it is taken for shallow: a guest may
/// be looked at while it begins to ask.
const SHALLOW_TIMES: u32 = 16;

thread_local! {
    static STATE: Cell<State> = const { Cell::new(State::Unknown) };
}

/// What this thread has asked the scheduler for.
#[derive(Clone, Copy)]
enum State {
    /// Nothing yet.
    Unknown,
    /// Nothing, as somebody else has.
    Foreign,
    /// To run at once.
    Eager,
    /// To wait its turn. `shallow` times in a row there was little to do.
    Patient { shallow: u32 },
}

/// Has this thread wait its turn while a guest keeps `depth` requests going, and run at once where there are
/// few.
///
/// A thread that sleeps most of the time takes the processor from whoever has it as soon as it is woken: with
/// one request at a time that is what makes an answer fast. A guest that goes on to ask is interrupted by it
/// at each request, though, and then every request costs a wake-up, an entry of the ring and an interrupt of
/// its own. Of class `SCHED_BATCH` (sched(7)) the thread runs when the guest waits, or its time is up, and
/// finds all of them. Where a processor is idle, it runs at once in any case.
///
/// A class that somebody else chose for this thread stays. A depth of 0 says nothing of the guest.
pub fn adapt(depth: usize) {
    if depth == 0 {
        return;
    }
    let is_deep = depth >= DEEP;
    STATE.set(match STATE.get() {
        State::Foreign => State::Foreign,
        State::Unknown if is_deep && class() != libc::SCHED_OTHER => State::Foreign,
        State::Unknown | State::Eager if is_deep => choose(libc::SCHED_BATCH),
        State::Patient { .. } if is_deep => State::Patient { shallow: 0 },
        State::Patient { shallow } if shallow + 1 < SHALLOW_TIMES => {
            State::Patient { shallow: shallow + 1 }
        }
        State::Patient { .. } => choose(libc::SCHED_OTHER),
        shallow => shallow,
    });
}

/// Gives this thread a class.
fn choose(class: libc::c_int) -> State {
    let parameters = libc::sched_param { sched_priority: 0 };
    // A refusal costs no more than time.
    // SAFETY: 0 is this thread, and the parameters outlive the call.
    unsafe { libc::sched_setscheduler(0, class, &raw const parameters) };
    if class == libc::SCHED_BATCH { State::Patient { shallow: 0 } } else { State::Eager }
}

/// The scheduling class of this thread, a negative number if the kernel does not tell.
fn class() -> libc::c_int {
    // SAFETY: the call takes a number; 0 is this thread.
    unsafe { libc::sched_getscheduler(0) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn class_after(depths: &[usize]) -> libc::c_int {
        depths.iter().copied().for_each(adapt);
        class()
    }

    #[test]
    fn a_thread_is_patient_while_the_queue_is_deep() {
        let classes = thread::spawn(|| {
            let shallow = |times: u32| vec![DEEP - 1; times.try_into().unwrap()];
            let once_more = [shallow(SHALLOW_TIMES - 1), vec![DEEP, 0, 1]].concat();
            [vec![1], vec![DEEP], once_more, shallow(SHALLOW_TIMES)].map(|all| class_after(&all))
        });

        let [eager, patient] = [libc::SCHED_OTHER, libc::SCHED_BATCH];
        assert_eq!(classes.join().unwrap(), [eager, patient, patient, eager]);
    }

    #[test]
    fn a_class_that_somebody_else_chose_stays() {
        let classes = thread::spawn(|| {
            let parameters = libc::sched_param { sched_priority: 0 };
            // SAFETY: 0 is this thread, and the parameters outlive the call.
            unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
            [class_after(&[DEEP]), class_after(&[1])]
        });

        assert_eq!(classes.join().unwrap(), [libc::SCHED_IDLE; 2]);
    }
}
