//! How many system calls a program makes before its first guest runs.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// `ioctl(KVM_RUN)` (Documentation/virt/kvm/api.rst, section 4.10).
const KVM_RUN: u64 = 0xae80;

/// Runs `command` until one of its threads enters a guest, and gives the number of system calls that
/// all its threads made before. The program is ended then.
pub fn before_first_entry(command: &Command) -> Result<u64> {
    let mut traced = Command::new(command.get_program());
    traced.args(command.get_args()).stdout(std::process::Stdio::null());
    // SAFETY: between fork and exec the child makes one system call, and allocates nothing.
    unsafe { traced.pre_exec(|| ptrace::traceme().map_err(Into::into)) };
    let child = traced.spawn().context("start the program")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let counted = count(pid);
    // It may have ended; a tracer that is gone takes it along in any case.
    let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
    // All of its threads, one by one: the first one has not ended before the others are waited for.
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::__WALL)) {
        let ended = matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..));
        if ended && status.pid() == Some(pid) {
            break;
        }
    }
    counted
}

fn count(pid: Pid) -> Result<u64> {
    waitpid(pid, None).context("wait for its first instruction")?;
    let options =
        Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options)?;
    ptrace::syscall(pid, None)?;
    let mut calls = 0;
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceSyscall(thread) => {
                let call = ptrace::syscall_info(thread)?;
                if call.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
                    // SAFETY: at an entry the kernel fills in this member.
                    let entry = unsafe { call.u.entry };
                    let is_ioctl = entry.nr == libc::SYS_ioctl.unsigned_abs();
                    if is_ioctl && entry.args[1] == KVM_RUN {
                        return Ok(calls);
                    }
                    calls += 1;
                }
                ptrace::syscall(thread, None)?;
            }
            WaitStatus::PtraceEvent(thread, ..) | WaitStatus::Stopped(thread, Signal::SIGSTOP) => {
                ptrace::syscall(thread, None)?;
            }
            WaitStatus::Stopped(thread, signal) => ptrace::syscall(thread, signal)?,
            WaitStatus::Exited(ended, code) if ended == pid => {
                bail!("the program ended with code {code} before a guest ran");
            }
            WaitStatus::Signaled(ended, signal, _) if ended == pid => {
                bail!("the program ended by {signal} before a guest ran");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_without_a_guest_is_told_so() {
        let error = before_first_entry(&Command::new("/bin/true")).unwrap_err().to_string();

        assert_eq!(error, "the program ended with code 0 before a guest ran");
    }
}
