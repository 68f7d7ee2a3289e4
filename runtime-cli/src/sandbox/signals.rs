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

/// The signals that arrived.
#[derive(Debug)]
pub(super) struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals for this thread and those it starts, and collects them.
    pub(super) fn collect() -> Result<Self, Errno> {
        let set = PASSED_ON.into_iter().collect::<SigSet>();
        set.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        SignalFd::with_flags(&set, flags).map(Self)
    }

    /// The number of the next signal, if there is one.
    pub(super) fn next(&mut self) -> Option<i32> {
        let signal = self.0.read_signal().ok()??;
        i32::try_from(signal.ssi_signo).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
}
