//! What a program does before its first guest runs: how many system calls, and in how much processor time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

/// `ioctl(KVM_RUN)` (Documentation/virt/kvm/api.rst, section 4.10).
const KVM_RUN: u64 = 0xae80;

/// Runs `command` until one of its threads enters a guest, and gives the number of system calls that
/// all its threads made before. The program is ended then.
pub fn before_first_entry(command: &Command) -> Result<u64> {
    traced(command, || ptrace::traceme().map_err(Into::into), count)
}

/// Runs `command` until one of its threads enters a guest, and gives the processor time in milliseconds that
/// all its threads took before: they are stopped by nothing else but the start of a thread. It counts from
/// the execve(2) on: what the copy of this process took that made it is not the program's. The program is
/// ended then.
pub fn processor_ms_before_first_entry(command: &Command) -> Result<f64> {
    let filter = at_entry()?;
    let (mut before_exec, mut told) = UnixStream::pair()?;
    let begin = move || {
        ptrace::traceme()?;
        apply_filter(&filter).map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        let used = Duration::from(ClockId::CLOCK_PROCESS_CPUTIME_ID.now()?);
        told.write_all(&used.as_nanos().to_ne_bytes())
    };
    traced(command, begin, |pid| {
        let mut nanoseconds = [0; size_of::<u128>()];
        before_exec.read_exact(&mut nanoseconds)?;
        let not_ours = u128::from_ne_bytes(nanoseconds);
        let options = Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACESECCOMP
            | Options::PTRACE_O_EXITKILL;
        start(pid, options, ptrace::cont)?;
        loop {
            match waitpid(None, Some(WaitPidFlag::__WALL))? {
                WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_SECCOMP) => {
                    let used = clock_getcpuclockid(pid).and_then(|clock| clock.now())?;
                    let used = Duration::from(used).as_nanos() - not_ours;
                    return Ok(used as f64 / 1e6);
                }
                other => go_on(pid, other, ptrace::cont)?,
            }
        }
    })
}

/// Tells the tracer of `KVM_RUN` and lets everything pass.
fn at_entry() -> Result<BpfProgram> {
    let is_run = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, KVM_RUN)?;
    let rules = [(libc::SYS_ioctl, vec![SeccompRule::new(vec![is_run])?])];
    let (pass, tell) = (SeccompAction::Allow, SeccompAction::Trace(0));
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules.into(), pass, tell, arch)?.try_into()?)
}

/// Starts `command`, which has this thread trace it when it does `begin`, has it `watch`ed and ends it.
fn traced<T>(
    command: &Command,
    begin: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    watch: impl FnOnce(Pid) -> Result<T>,
) -> Result<T> {
    let mut traced = Command::new(command.get_program());
    traced.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: between fork and exec the child makes a few system calls, and allocates nothing.
    unsafe { traced.pre_exec(begin) };
    let child = traced.spawn().context("start the program")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let outcome = watch(pid);
    // It may have ended; a tracer that is gone takes it along in any case.
    let _ = kill(pid, Signal::SIGKILL);
    // All of its threads, one by one: the first one has not ended before the others are waited for.
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::__WALL)) {
        let ended = matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..));
        if ended && status.pid() == Some(pid) {
            break;
        }
    }
    outcome
}

/// Lets a program run that has just been started.
fn start(
    pid: Pid,
    options: Options,
    resume: impl Fn(Pid, Option<Signal>) -> nix::Result<()>,
) -> Result<()> {
    waitpid(pid, None).context("wait for its first instruction")?;
    ptrace::setoptions(pid, options)?;
    Ok(resume(pid, None)?)
}

/// Lets a thread go on that stopped for something that does not matter; the error is that the program
/// `pid` has ended.
fn go_on(
    pid: Pid,
    status: WaitStatus,
    resume: impl Fn(Pid, Option<Signal>) -> nix::Result<()>,
) -> Result<()> {
    match status {
        WaitStatus::PtraceEvent(thread, ..) | WaitStatus::Stopped(thread, Signal::SIGSTOP) => {
            resume(thread, None)?;
        }
        WaitStatus::Stopped(thread, signal) => resume(thread, Some(signal))?,
        WaitStatus::Exited(ended, code) if ended == pid => {
            bail!("the program ended with code {code} before a guest ran");
        }
        WaitStatus::Signaled(ended, signal, _) if ended == pid => {
            bail!("the program ended by {signal} before a guest ran");
        }
        _ => {}
    }
    Ok(())
}

fn count(pid: Pid) -> Result<u64> {
    let options =
        Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL;
    start(pid, options, ptrace::syscall)?;
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
            other => go_on(pid, other, ptrace::syscall)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, because each waits for whichever child of this process stops.
    #[test]
    fn a_program_without_a_guest_is_told_so() {
        let program = Command::new("/bin/true");
        let counted = before_first_entry(&program).unwrap_err();
        let timed = processor_ms_before_first_entry(&program).unwrap_err();

        let expected = "the program ended with code 0 before a guest ran";
        assert_eq!([counted, timed].map(|error| error.to_string()), [expected, expected]);
    }
}
