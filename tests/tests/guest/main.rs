//! What a user sees, on real guests: run by `make guest-tests`, in the lab where the machine has no
//! hardware virtualization. One test at a time: each checks that it leaves nothing behind.

mod bad_input;
mod docker;
mod exec;
mod faults;
mod lifecycle;
mod podman;
mod stdio;
mod template;

use tests::assert_nothing_left;

/// Polls until `done` gives a value.
fn eventually<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + tests::RESULT_TIMEOUT;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(std::time::Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
