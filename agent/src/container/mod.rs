//! A container: created, then running, then stopped (runtime.md, Lifecycle).

pub mod cgroup;
pub mod listing;
pub mod report;
pub mod stats;
pub mod terminal;

mod capabilities;
mod copy_up;
mod devices;
mod hooks;
mod mounts;
mod namespaces;
mod process;
mod program;
mod root;
mod seccomp;
mod user;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use agent_protocol::{Failed, Process};
use nix::errno::Errno;
use nix::unistd::Pid;

use crate::failure::{Context, failed, failed_with};
use crate::stdio::Stdio;
use cgroup::{Cgroup, MemoryWatch};
use namespaces::Fork;
use process::Handover;

/// How far a container has come.
#[derive(Debug)]
pub enum Status {
    /// Its first process is being made.
    Creating,
    /// Its first process waits on this channel for its start.
    Created(UnixStream),
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its first process has ended.
    Stopped,
}

/// One container.
#[derive(Debug)]
pub struct Container {
    /// How far it has come.
    pub status: Status,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Tells of out-of-memory kills.
    pub memory: Option<MemoryWatch>,
    /// Pid of its first process.
    pub init: Pid,
    pidfd: OwnedFd,
    namespaces: u64,
}

/// A process that is being made.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid.
    pub pid: Pid,
    /// Its stdio, seen from the agent.
    pub stdio: Stdio,
    /// Where it reports; without blocking.
    pub channel: UnixStream,
    /// Its pidfd.
    pub pidfd: OwnedFd,
}

impl Container {
    /// Makes the cgroup and the first process of `configuration`; the process reports the rest.
    pub fn create(
        configuration: &agent_protocol::Container,
        cgroups: &Path,
    ) -> Result<(Self, Spawned), Failed> {
        let id = &configuration.id;
        if id.is_empty() || id.contains('/') || id.starts_with('.') {
            return Err(failed_with(format!("{id:?} is no container id"), Errno::EINVAL));
        }
        if configuration.namespaces & libc::CLONE_NEWUSER as u64 != 0 {
            let message = "user namespaces are not supported: the virtual machine isolates users";
            return Err(failed(message));
        }
        let cgroup = Cgroup::create(cgroups, id, &configuration.cgroup.files)?;
        let spawned = spawn(
            &configuration.process,
            || namespaces::fork(configuration.namespaces, &cgroup.open()?),
            |handover| process::init(configuration, handover),
        );
        let spawned = match spawned {
            Ok(spawned) => spawned,
            Err(failure) => {
                cgroup.remove()?;
                return Err(failure);
            }
        };
        let pidfd = spawned.pidfd.try_clone().context("duplicate a pidfd")?;
        let container = Self {
            status: Status::Creating,
            memory: cgroup.watch_memory(),
            cgroup,
            init: spawned.pid,
            pidfd,
            namespaces: configuration.namespaces,
        };
        Ok((container, spawned))
    }

    /// Makes one more process.
    pub fn exec(&self, process: &Process) -> Result<Spawned, Failed> {
        match self.status {
            Status::Running => {}
            Status::Paused => return Err(failed("cannot exec in a paused container")),
            Status::Created(_) => {
                return Err(failed("cannot exec in a container that is not started"));
            }
            _ => return Err(failed("cannot exec in a stopped container")),
        }
        spawn(
            process,
            || self.fork_beside(),
            |handover| process::exec(process, &self.pidfd, self.namespaces, handover),
        )
    }

    fn fork_beside(&self) -> io::Result<Fork> {
        let fork = |cgroup| namespaces::fork_beside(&self.pidfd, self.namespaces, &cgroup);
        match fork(self.cgroup.open()?) {
            // A cgroup that hands controllers down may have no processes of its own: what runs
            // inside, such as systemd, has moved all to cgroups below. runc does the same.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                fork(self.cgroup.open_of(self.init)?)
            }
            result => result,
        }
    }

    /// Whether its first process has not ended.
    pub fn is_alive(&self) -> bool {
        !matches!(self.status, Status::Stopped)
    }
}

fn spawn(
    process: &Process,
    fork: impl FnOnce() -> io::Result<Fork>,
    child: impl FnOnce(Handover) -> Result<Spawned, Failed>,
) -> Result<Spawned, Failed> {
    let (stdio, given) = Stdio::open(process)?;
    let (channel, theirs) = UnixStream::pair().context("make a channel")?;
    channel.set_nonblocking(true).context("make a channel")?;
    match fork().context("fork")? {
        Fork::Child => child(Handover { stdio: given, channel: theirs }),
        Fork::Parent { pid, pidfd } => Ok(Spawned { pid, stdio, channel, pidfd }),
    }
}

/// Kills the process behind `pidfd` (pidfd_send_signal(2)).
pub fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: pidfd_send_signal takes integers and, instead of a siginfo, null.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, info, 0)
    })?;
    Ok(())
}

/// A copy of descriptor `number` of the process behind `pidfd` (pidfd_getfd(2)).
pub fn fetch_descriptor(pidfd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes integers and returns a new descriptor that nobody else owns.
    unsafe {
        let copy =
            Errno::result(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0))?;
        let copy = RawFd::try_from(copy).expect("descriptors are small numbers");
        Ok(OwnedFd::from_raw_fd(copy))
    }
}
