//! Signals as something to read: a container's sandbox and an exec's carrier pass them on.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What a process that stands for a workload passes on to it. SIGKILL cannot be caught, and the
/// rest either means this process itself (SIGSEGV, SIGCHLD) or stops it (SIGTSTP).
const PASSED_ON: [Signal; 9] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGCONT,
    Signal::SIGWINCH,
];

/// Those that say nothing about whether to go on: a terminal was resized, a process continued.
const HARMLESS: [i32; 2] = [libc::SIGWINCH, libc::SIGCONT];

/// The signals that arrived.
#[derive(Debug)]
pub(super) struct Signals {
    fd: SignalFd,
    /// Seen already, and still to be passed on.
    held_back: Vec<i32>,
}

impl Signals {
    /// Blocks the signals for this thread and those it starts, and collects them.
    pub(super) fn collect() -> Result<Self, Errno> {
        let set = PASSED_ON.into_iter().collect::<SigSet>();
        set.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Self { fd: SignalFd::with_flags(&set, flags)?, held_back: Vec::new() })
    }

    /// Whether somebody wants this process to give up while there is no workload yet. What is
    /// harmless is held back for the workload.
    pub(super) fn interrupted(&mut self) -> bool {
        while let Some(signal) = self.read() {
            if !HARMLESS.contains(&signal) {
                return true;
            }
            if !self.held_back.contains(&signal) {
                self.held_back.push(signal);
            }
        }
        false
    }

    /// The number of the next signal, if there is one.
    pub(super) fn next(&mut self) -> Option<i32> {
        self.held_back.pop().or_else(|| self.read())
    }

    fn read(&mut self) -> Option<i32> {
        let signal = self.fd.read_signal().ok()??;
        i32::try_from(signal.ssi_signo).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_read_and_not_delivered() {
        let mut signals = Signals::collect().unwrap();

        // To this thread alone: the other threads of the test program do not block it.
        nix::sys::signal::raise(Signal::SIGUSR1).unwrap();

        assert_eq!(signals.next(), Some(libc::SIGUSR1));
        assert_eq!(signals.next(), None);
    }

    #[test]
    fn a_new_size_of_the_terminal_is_no_interruption_and_is_not_lost() {
        let mut signals = Signals::collect().unwrap();

        nix::sys::signal::raise(Signal::SIGWINCH).unwrap();

        assert!(!signals.interrupted());
        assert_eq!(signals.next(), Some(libc::SIGWINCH));
        assert_eq!(signals.next(), None);
    }

    #[test]
    fn a_request_to_end_is_an_interruption() {
        let mut signals = Signals::collect().unwrap();

        nix::sys::signal::raise(Signal::SIGTERM).unwrap();

        assert!(signals.interrupted());
    }
}
