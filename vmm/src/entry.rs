//! The start of a program that holds a virtual machine, in place of the standard library's.
//!
//! The standard library prepares each program, and each of its threads, to tell an overflow of the
//! stack from other faults. That takes 15 system calls, and six for each thread, and all it gives is
//! another message: the page behind a stack ends the process in any case.

use std::ffi::c_int;
use std::process;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;

/// What the standard streams are.
const STREAMS: [c_int; 3] = [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO];

/// Does what else the standard library does, then what `body` says, and ends the process with the
/// exit code that it gives. For the `main` of a program without the standard library's
/// (`#![no_main]`):
///
/// ```ignore
/// #[cfg_attr(not(test), unsafe(no_mangle))]
/// extern "C" fn main() -> std::ffi::c_int {
///     vmm::run_program(|| 0)
/// }
/// ```
pub fn run_program(body: impl FnOnce() -> u8) -> ! {
    if let Err(error) = keep_standard_streams() {
        eprintln!("open /dev/null in place of a closed standard stream: {error}");
        process::abort();
    }
    // A write that nobody will read is an error, and not the end.
    // SAFETY: no handler is installed that could be unsafe.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("this signal can be ignored");
    process::exit(body().into())
}

/// Makes sure that no file that is opened later takes the place of a standard stream.
fn keep_standard_streams() -> nix::Result<()> {
    let mut looks = STREAMS.map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: `looks` has three elements; their numbers may be those of no open files.
    let answers = unsafe { libc::poll(looks.as_mut_ptr(), STREAMS.len() as libc::nfds_t, 0) };
    Errno::result(answers)?;
    for _ in looks.iter().filter(|look| look.revents & libc::POLLNVAL != 0) {
        // The kernel gives out the lowest number that is free. Programs that are executed inherit it.
        let stream = open("/dev/null", OFlag::O_RDWR, Mode::empty())?;
        std::mem::forget(stream);
    }
    Ok(())
}
