//! The start of a program that holds a virtual machine, in place of the standard library's.
//!
//! The standard library prepares each program, and each of its threads, to tell an overflow of the
//! stack from other faults. That takes 15 system calls, and six for each thread, and all it gives is
//! another message: the page behind a stack ends the process in any case.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::process;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Does what else the standard library does, then what `body` says, and ends the process with the
/// exit code that it gives. For the `main` of a program without the standard library's
/// (`#![no_main]`):
///
/// ```ignore
/// #[cfg_attr(not(test), unsafe(no_mangle))]
/// extern "C" fn main() -> std::ffi::c_int {
///     vmm::enter(|| 0)
/// }
/// ```
pub fn enter(body: impl FnOnce() -> u8) -> ! {
    if let Err(error) = keep_standard_descriptors() {
        eprintln!("open /dev/null in place of a closed standard stream: {error}");
        process::abort();
    }
    // A write that nobody will read is an error, and not the end.
    // SAFETY: no handler is installed that could be unsafe.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("this signal can be ignored");
    process::exit(body().into())
}

/// Makes sure that no file that is opened later takes the place of a standard stream.
fn keep_standard_descriptors() -> io::Result<()> {
    let streams = [0, 1, 2].map(|number| {
        // SAFETY: the number is only asked about, which is allowed for one that is closed.
        unsafe { BorrowedFd::borrow_raw(number) }
    });
    let mut polled = streams.map(|stream| PollFd::new(stream, PollFlags::empty()));
    // Fails for closed ones by what it tells of them, and for others not at all.
    poll(&mut polled, PollTimeout::ZERO)?;
    for _ in polled.iter().filter(|stream| stream.revents() == Some(PollFlags::POLLNVAL)) {
        // The kernel gives out the lowest number that is free.
        let file = File::options().read(true).write(true).open("/dev/null")?;
        debug_assert!(file.as_raw_fd() <= 2);
        let _ = file.into_raw_fd();
    }
    Ok(())
}
