//! What tests of several crates need.

use std::panic::{self, AssertUnwindSafe};

/// Whether `body` is true in a process of its own, within half a minute. One that panics is not.
pub fn in_a_child(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child has one thread, in which `malloc` works, and takes no lock that another thread of
    // this process may hold.
    match unsafe { libc::fork() } {
        0 => {
            // One that panics may wait for a lock of a thread that is not there.
            // SAFETY: its signal ends the child.
            unsafe { libc::alarm(30) };
            // Its last thread must not end: that is a success.
            let is_true = panic::catch_unwind(AssertUnwindSafe(body)).unwrap_or(false);
            // SAFETY: ends the child here, as it must not return into the test's runner.
            unsafe { libc::_exit(i32::from(!is_true)) }
        }
        child => {
            assert!(child > 0);
            let mut status = 0;
            // SAFETY: `status` is a number that outlives the call.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            status == 0
        }
    }
}
