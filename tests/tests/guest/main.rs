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

use tests::leftovers;

/// Fails with the list of what is still there two seconds after a test is done with it.
fn assert_nothing_left() {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let mut left = leftovers();
    while !left.is_empty() && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(200));
        left = leftovers();
    }
    assert!(left.is_empty(), "left behind: {left:#?}");
}

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
