//! When the thread that serves devices is to take the processor from the guest that asks.
//!
//! A thread that sleeps most of the time takes the processor from whoever has it as soon as it is woken: where
//! a guest asks for one thing at a time, that is what makes an answer fast. A guest that goes on to ask is
//! interrupted by it at each request, though, and then every request costs a wake-up, a system call and an
//! interrupt of its own. Of class `SCHED_BATCH` (sched(7)) the thread runs when the guest waits, or its time is
//! up, and finds all of them. Where a processor is idle, it runs at once in any case.

use std::cell::Cell;

/// From how many requests on, in flight or found at once, a queue is deep.
const DEEP: usize = 4;

/// How many times in a row the thread is woken and finds no deep queue until it is eager again: some of what
/// wakes it are completions, and a guest may be looked at while it begins to ask.
const WAKES: u32 = 64;

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
    /// To wait its turn. It was woken `wakes` times since it found a deep queue.
    Patient { wakes: u32 },
}

/// Tells that this thread was woken to serve some device.
pub fn woken() {
    if let State::Patient { wakes } = STATE.get() {
        let next = State::Patient { wakes: wakes + 1 };
        STATE.set(if wakes + 1 < WAKES { next } else { choose(libc::SCHED_OTHER) });
    }
}

/// Tells that a guest keeps `depth` requests going in a queue that this thread serves. A class that somebody
/// else chose for the thread stays.
pub fn found(depth: usize) {
    if depth >= DEEP {
        STATE.set(match STATE.get() {
            State::Foreign => State::Foreign,
            State::Unknown if class() != libc::SCHED_OTHER => State::Foreign,
            State::Unknown | State::Eager => choose(libc::SCHED_BATCH),
            State::Patient { .. } => State::Patient { wakes: 0 },
        });
    }
}

/// Gives this thread a class.
fn choose(class: libc::c_int) -> State {
    let parameters = libc::sched_param { sched_priority: 0 };
    // A refusal costs no more than time.
    // SAFETY: 0 is this thread, and the parameters outlive the call.
    unsafe { libc::sched_setscheduler(0, class, &raw const parameters) };
    if class == libc::SCHED_BATCH { State::Patient { wakes: 0 } } else { State::Eager }
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

    fn class_after(step: &(dyn Fn() + Sync)) -> libc::c_int {
        step();
        class()
    }

    #[test]
    fn a_thread_is_patient_for_as_long_as_it_finds_deep_queues() {
        let wake = |times: u32| (0..times).for_each(|_| woken());
        let steps: [&(dyn Fn() + Sync); 6] = [
            &|| found(DEEP - 1),
            &|| found(DEEP),
            &|| wake(WAKES - 1),
            &|| found(DEEP),
            &|| wake(WAKES - 1),
            &|| wake(1),
        ];

        let classes = thread::scope(|scope| {
            let classes = scope.spawn(|| steps.map(class_after));
            classes.join().unwrap()
        });

        let [eager, patient] = [libc::SCHED_OTHER, libc::SCHED_BATCH];
        assert_eq!(classes, [eager, patient, patient, patient, patient, eager]);
    }

    #[test]
    fn a_class_that_somebody_else_chose_stays() {
        let classes = thread::spawn(|| {
            choose(libc::SCHED_IDLE);
            STATE.set(State::Unknown);
            found(DEEP);
            let deep = class();
            (0..WAKES).for_each(|_| woken());
            [deep, class()]
        });

        assert_eq!(classes.join().unwrap(), [libc::SCHED_IDLE; 2]);
    }
}
