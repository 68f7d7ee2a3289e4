//! Collects ended children: the processes of containers, and the orphans PID 1 inherits.

use agent_protocol::ExitStatus;
use nix::errno::Errno;
use nix::unistd::Pid;

/// The next child that has ended, if there is one. Not nix's wrapper: that one loses a child which
/// was killed by a realtime signal.
pub fn next() -> Option<(Pid, ExitStatus)> {
    loop {
        let mut status = 0;
        // SAFETY: waitpid stores one int, which outlives the call.
        match Errno::result(unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) }) {
            Ok(0) | Err(Errno::ECHILD) => return None,
            Ok(pid) => return Some((Pid::from_raw(pid), ending(status))),
            Err(Errno::EINTR) => {}
            Err(error) => {
                log::error!("waitpid: {error}");
                return None;
            }
        }
    }
}

/// Waits for the end of `child`, which is certain: it was killed or ends by itself.
pub fn wait(child: Pid) {
    let mut status = 0;
    // SAFETY: waitpid stores one int, which outlives the call.
    while unsafe { libc::waitpid(child.as_raw(), &mut status, 0) } < 0
        && Errno::last() == Errno::EINTR
    {}
}

/// Without WUNTRACED and WCONTINUED a child that is told has exited or was killed.
fn ending(status: i32) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        return ExitStatus::Signal(libc::WTERMSIG(status));
    }
    // Only the low eight bits of an exit code ever reach its parent.
    ExitStatus::Code((libc::WEXITSTATUS(status) & 0xff) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_in_the_second_byte() {
        assert_eq!(ending(3 << 8), ExitStatus::Code(3));
    }

    #[test]
    fn a_realtime_signal_is_told_as_it_is() {
        assert_eq!(ending(64), ExitStatus::Signal(64));
    }

    #[test]
    fn a_core_dump_does_not_change_the_signal() {
        assert_eq!(ending(11 | 0x80), ExitStatus::Signal(11));
    }
}
