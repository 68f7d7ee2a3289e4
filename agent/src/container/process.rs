//! The life of a new process from the fork to its program. Everything here runs in the child.

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use agent_protocol::{Container, Failed, Process};
use nix::errno::Errno;
use nix::sys::resource::Resource;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, sethostname, setsid};

use super::program::Program;
use super::report::{Channel, Report};
use super::root::{Kind, Root};
use super::terminal::Terminal;
use super::{capabilities, devices, hooks, mounts, namespaces, seccomp, user};
use crate::failure::{Context, failed_with};
use crate::limits;

/// Where the channel is once all descriptors of the agent are closed.
const CHANNEL_FD: i32 = 3;

/// Exit code of a process that failed before its program ran; nobody but a log sees it.
const SETUP_FAILED: i32 = 1;

/// What the agent hands to a new process.
#[derive(Debug)]
pub struct Handover {
    /// Its stdin, stdout and stderr.
    pub stdio: [OwnedFd; 3],
    /// Its end of the channel.
    pub channel: UnixStream,
}

/// Becomes the first process of `container`; never returns.
pub fn init(container: &Container, handover: Handover) -> ! {
    let Ok(mut channel) = detach(handover) else { exit() };
    let Err(failure) = run_init(container, &mut channel);
    give_up(&mut channel, failure)
}

/// Becomes another process of the container whose first process is `target`; never returns.
pub fn exec(process: &Process, target: &OwnedFd, namespaces: u64, handover: Handover) -> ! {
    // The namespaces come first: `target` is one of the descriptors that `detach` closes.
    let entered = set_oom_score(process).and_then(|()| {
        hide_from_the_container();
        namespaces::join(target, namespaces).context("join the container's namespaces")
    });
    let Ok(mut channel) = detach(handover) else { exit() };
    let Err(failure) = entered.and_then(|()| run_exec(process, &mut channel));
    give_up(&mut channel, failure)
}

fn give_up(channel: &mut Channel, failure: Failed) -> ! {
    // If the agent is gone, so is the guest.
    let _ = channel.tell(&Report::Failed(failure));
    exit()
}

fn exit() -> ! {
    // SAFETY: _exit ends the process without running the agent's exit handlers.
    unsafe { libc::_exit(SETUP_FAILED) }
}

/// Keeps nothing of the agent but stdio and the channel: a descriptor of another process's pipe
/// would keep that pipe open as long as this process waits.
fn detach(handover: Handover) -> nix::Result<Channel> {
    let [stdin, stdout, stderr] = &handover.stdio;
    dup2_stdin(stdin)?;
    dup2_stdout(stdout)?;
    dup2_stderr(stderr)?;
    let channel = handover.channel.as_raw_fd();
    if channel != CHANNEL_FD {
        // SAFETY: dup3 takes integers; whatever was at CHANNEL_FD is the agent's and not used again.
        Errno::result(unsafe { libc::dup3(channel, CHANNEL_FD, libc::O_CLOEXEC) })?;
    }
    // The descriptors are closed below, by number.
    std::mem::forget(handover);
    // SAFETY: close_range takes integers; nothing above CHANNEL_FD is used after this.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, CHANNEL_FD + 1, u32::MAX, 0) })?;
    reset_signals()?;
    // SAFETY: CHANNEL_FD is open and has no other owner in this process.
    Ok(Channel::new(unsafe { UnixStream::from_raw_fd(CHANNEL_FD) }))
}

/// Back to what a program expects: nothing ignored, nothing blocked.
fn reset_signals() -> nix::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the default action needs no handler; signals that refuse it are left as they are.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// Keeps processes of the container away from this one's memory and descriptors (`/proc/PID`) until
/// it is one of theirs.
fn hide_from_the_container() {
    // SAFETY: this prctl operation reads its integer arguments only; it cannot fail for 0.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

fn run_init(container: &Container, channel: &mut Channel) -> Result<Infallible, Failed> {
    let process = &container.process;
    set_oom_score(process)?;
    hide_from_the_container();
    setsid().context("setsid")?;
    umask(Mode::empty());
    namespaces::enter_new(container.namespaces).context("create namespaces")?;
    set_names(container)?;
    enter_root(container, channel)?;
    let program = settle(process)?;
    channel.ask(&Report::Created).context("wait for start")?;
    hooks::run(&container.start_hooks, &container.state)?;
    run_program(process, &program)
}

fn run_exec(process: &Process, channel: &mut Channel) -> Result<Infallible, Failed> {
    setsid().context("setsid")?;
    if process.terminal.is_some() {
        let root = Root::open(Path::new("/")).context("open /")?;
        take_terminal(process, &root, channel, false)?;
    }
    let program = settle(process)?;
    run_program(process, &program)
}

/// Builds the container's file system and makes it this process's root.
fn enter_root(container: &Container, channel: &mut Channel) -> Result<(), Failed> {
    let root = mounts::open_root(Path::new(&container.rootfs))?;
    container.mounts.iter().try_for_each(|entry| mounts::add(&root, entry))?;
    devices::add(&root, container)?;
    for (name, value) in &container.sysctl {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(path, value).context(format_args!("set sysctl {name} to {value:?}"))?;
    }
    take_terminal(&container.process, &root, channel, true)?;
    let cwd = Path::new(&container.process.cwd);
    root.create(cwd, Kind::Directory)
        .context(format_args!("create working directory {:?}", container.process.cwd))?;
    mounts::finish(&root, container)?;
    mounts::pivot(&root, container.rootfs_propagation)
}

fn set_names(container: &Container) -> Result<(), Failed> {
    if let Some(name) = &container.hostname {
        sethostname(name).context(format_args!("set host name {name:?}"))?;
    }
    if let Some(name) = &container.domainname {
        let (text, length) = (name.as_ptr().cast(), name.len());
        // SAFETY: the kernel reads `length` bytes, which is how long `name` is.
        Errno::result(unsafe { libc::setdomainname(text, length) })
            .context(format_args!("set domain name {name:?}"))?;
    }
    Ok(())
}

/// Opens the process's terminal, if it has one, and hands the master side to the agent.
fn take_terminal(
    process: &Process,
    root: &Root,
    channel: &mut Channel,
    console: bool,
) -> Result<(), Failed> {
    let Some(size) = process.terminal else { return Ok(()) };
    let terminal = Terminal::open(root, size).context("open a terminal")?;
    if console {
        devices::bind_console(root, &terminal.slave).context("mount /dev/console")?;
    }
    terminal.take_over().context("take the terminal")?;
    channel.ask(&Report::Terminal(terminal.master.as_raw_fd())).context("hand over the terminal")
}

/// Takes the limits, the identity and the working directory of `process`, and finds its program.
/// The order is runc's: each step needs rights that a later one gives up.
fn settle(process: &Process) -> Result<Program, Failed> {
    set_limits(process)?;
    user::own_stdio(process.uid).context("give stdio to the user")?;
    umask(Mode::from_bits_truncate(process.umask.unwrap_or(0o022)));
    if process.no_new_privs {
        nix::sys::prctl::set_no_new_privs().context("set no_new_privs")?;
    } else {
        // Without no_new_privs this takes a capability, so it cannot wait.
        install_filter(process)?;
    }
    capabilities::limit(process.capabilities.bounding).context("limit capabilities")?;
    capabilities::keep(true).context("keep capabilities")?;
    let entered = chdir(process.cwd.as_str());
    user::become_user(process).context("set user and groups")?;
    let entered = match entered {
        // Some file systems let the user in, but not root.
        Err(Errno::EPERM | Errno::EACCES) => chdir(process.cwd.as_str()),
        result => result,
    };
    capabilities::keep(false).context("keep capabilities")?;
    capabilities::apply(&process.capabilities).context("apply capabilities")?;
    entered.context(format_args!("chdir to cwd ({:?}) set in config.json failed", process.cwd))?;
    Program::find(process)
}

fn run_program(process: &Process, program: &Program) -> Result<Infallible, Failed> {
    if process.no_new_privs {
        install_filter(process)?;
    }
    Err(program.execute())
}

fn install_filter(process: &Process) -> Result<(), Failed> {
    let Some(filter) = &process.seccomp else { return Ok(()) };
    seccomp::install(filter).context("install seccomp filter")
}

/// While the guest's own `/proc` is at hand and this process is root.
fn set_oom_score(process: &Process) -> Result<(), Failed> {
    let Some(score) = process.oom_score_adj else { return Ok(()) };
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .context(format_args!("set oom_score_adj to {score}"))
}

fn set_limits(process: &Process) -> Result<(), Failed> {
    limits::lower().context("set the limit of open files")?;
    for (number, soft, hard) in &process.rlimits {
        let limit = libc::rlimit { rlim_cur: *soft, rlim_max: *hard };
        if *number > Resource::RLIMIT_RTTIME as u32 {
            return Err(failed_with(format!("no resource limit {number}"), Errno::EINVAL));
        }
        // SAFETY: `limit` outlives the call, and the kernel knows this number.
        Errno::result(unsafe { libc::setrlimit(*number, &limit) })
            .context(format_args!("set resource limit {number} to {soft}:{hard}"))?;
    }
    Ok(())
}
