//! What a program does before its first guest runs: how many system calls, and in how much processor time.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, clone};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::{Pid, dup2_stdin, dup2_stdout, execvp};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

/// `ioctl(KVM_RUN)` (Documentation/virt/kvm/api.rst, section 4.10).
const KVM_RUN: u64 = 0xae80;

/// Enough for what a program's process does before it is the program's, in bytes.
const STACK_BYTES: usize = 64 << 10;

/// Runs `command` until one of its threads enters a guest, and gives the number of system calls that
/// all its threads made before. The program is ended then.
pub fn before_first_entry(command: &Command) -> Result<u64> {
    traced(command, None, |pid, _| count(pid))
}

/// Runs `command` until one of its threads enters a guest, and gives the processor time in milliseconds that
/// all its threads took before: they are stopped by nothing else but the start of a thread. It counts from
/// the execve(2) on, of a process without memory of its own: what it takes to copy this one, and to throw the
/// copy away, is not the program's. The program is ended then.
pub fn processor_ms_before_first_entry(command: &Command) -> Result<f64> {
    traced(command, Some(&at_entry()?), |pid, not_ours| {
        let options = Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACESECCOMP
            | Options::PTRACE_O_EXITKILL;
        start(pid, options, ptrace::cont)?;
        loop {
            match waitpid(None, Some(WaitPidFlag::__WALL))? {
                WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_SECCOMP) => {
                    let used = clock_getcpuclockid(pid).and_then(|clock| clock.now())?;
                    return Ok((Duration::from(used) - not_ours).as_secs_f64() * 1e3);
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

/// Starts `command` with this thread as its tracer, has it `watch`ed, which is told of the processor time
/// before the program was its process's, and ends it.
fn traced<T>(
    command: &Command,
    filter: Option<&BpfProgram>,
    watch: impl FnOnce(Pid, Duration) -> Result<T>,
) -> Result<T> {
    let (pid, before) = spawn(command, filter).context("start the program")?;
    let outcome = watch(pid, before);
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

/// Starts `command` in a process that this thread traces, with `filter`, if there is one, and without input or
/// output. Returns the processor time that the process took before it executed the program.
fn spawn(command: &Command, filter: Option<&BpfProgram>) -> Result<(Pid, Duration)> {
    let arguments = [command.get_program()].into_iter().chain(command.get_args());
    let arguments = arguments.map(|word| CString::new(word.as_bytes()));
    let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    let mut before = Duration::ZERO;
    let mut execute = || -> Result<Infallible> {
        dup2_stdin(&nothing)?;
        dup2_stdout(&nothing)?;
        ptrace::traceme()?;
        if let Some(filter) = filter {
            apply_filter(filter)?;
        }
        before = ClockId::CLOCK_PROCESS_CPUTIME_ID.now()?.into();
        Ok(execvp(&arguments[0], &arguments)?)
    };
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
    // SAFETY: the new process has its own stack, and this one, the only other that uses the memory, waits
    // until the program is executed or the process has ended.
    let pid = unsafe {
        let body = Box::new(|| execute().map_or(1, |never| match never {}));
        clone(body, &mut vec![0; STACK_BYTES], flags, Some(libc::SIGCHLD))?
    };
    Ok((pid, before))
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
