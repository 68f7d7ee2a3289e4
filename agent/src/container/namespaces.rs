//! Making processes in new or existing namespaces (namespaces(7), clone(2)).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::Pid;

/// Namespaces only a new process can be put in; the others are entered by the process itself.
const FOR_CHILDREN: u64 = (libc::CLONE_NEWPID as u64) | CLONE_NEWTIME;

/// `CLONE_NEWTIME` (linux/sched.h); clone3 takes it, older calls see signal bits there.
const CLONE_NEWTIME: u64 = 0x80;

const CLONE_PIDFD: u64 = libc::CLONE_PIDFD as u64;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of a fork this is.
#[derive(Debug)]
pub enum Fork {
    /// The agent, with its new child.
    Parent {
        /// Pid of the child in the agent's pid namespace.
        pid: Pid,
        /// The child's pidfd.
        pidfd: OwnedFd,
    },
    /// The child.
    Child,
}

/// Forks into `cgroup`, with those of `namespaces` that only a new process can enter. Being born in
/// the cgroup spares a migration, which waits for a grace period of the whole kernel.
pub fn fork(namespaces: u64, cgroup: &OwnedFd) -> io::Result<Fork> {
    let mut pidfd: RawFd = -1;
    // SAFETY: an all-zero clone_args means: no flags, no pointers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = (namespaces & FOR_CHILDREN) | CLONE_PIDFD | CLONE_INTO_CGROUP;
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM and without a stack this is fork(2): the child continues on a copy
    // of the memory. The agent has one thread, so no lock is held by another.
    let status = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>())
    };
    match Errno::result(status)? {
        0 => Ok(Fork::Child),
        pid => {
            let pid = i32::try_from(pid).expect("pids are small positive numbers");
            // SAFETY: the kernel stored a new descriptor there, because CLONE_PIDFD was given.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Fork::Parent { pid: Pid::from_raw(pid), pidfd })
        }
    }
}

/// Forks into `cgroup` and the pid namespace of the process `target`. The child is the agent's own,
/// because only the namespace for children changes, and only around the fork.
pub fn fork_beside(target: &OwnedFd, namespaces: u64, cgroup: &OwnedFd) -> io::Result<Fork> {
    let changed = CloneFlags::from_bits_retain(to_int(namespaces & FOR_CHILDREN));
    if changed.is_empty() {
        return fork(0, cgroup);
    }
    let own = File::open("/proc/self/ns/pid")?;
    let pid = CloneFlags::CLONE_NEWPID;
    setns(target, pid & changed)?;
    let result = fork(0, cgroup);
    if !matches!(result, Ok(Fork::Child)) {
        setns(&own, pid).expect("a process may return to its own pid namespace");
    }
    result
}

/// Leaves the parent's namespaces for new ones; a mount namespace is always among them.
pub fn enter_new(namespaces: u64) -> nix::Result<()> {
    unshare(own(namespaces))
}

/// Joins the namespaces of the process `target`.
pub fn join(target: &OwnedFd, namespaces: u64) -> nix::Result<()> {
    setns(target, own(namespaces))
}

/// The namespaces a process enters by itself.
fn own(namespaces: u64) -> CloneFlags {
    let flags = CloneFlags::from_bits_retain(to_int(namespaces & !FOR_CHILDREN));
    (flags - CloneFlags::CLONE_NEWNET) | CloneFlags::CLONE_NEWNS
}

#[expect(clippy::cast_possible_truncation, reason = "namespace flags are bits below 32")]
fn to_int(flags: u64) -> i32 {
    flags as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_enters_neither_pid_nor_network_namespaces_by_itself() {
        let all = (libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWUTS) as u64;

        assert_eq!(own(all), CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNS);
    }
}
