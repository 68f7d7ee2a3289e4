//! Threads that give up, before they do anything else, what their work does not need.
//!
//! What a thread gives up it cannot get back, nor can what it starts. The thread that started the
//! machine keeps everything: it may have more to do than to run a guest.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::config::{ConfigError, UserConfig, VmConfig};
use crate::jail::Jail;
use crate::seccomp::{self, Kind};

/// What serving files takes: to do for every user of the guest what its kernel has allowed already.
const FILE_SERVING: CapabilitySet = CapabilitySet::empty()
    // SETATTR of the owner.
    .union(CapabilitySet::CHOWN)
    // The permission bits were looked at in the guest.
    .union(CapabilitySet::DAC_OVERRIDE)
    // LINK, which names the file by descriptor (linkat(2), AT_EMPTY_PATH).
    .union(CapabilitySet::DAC_READ_SEARCH)
    // SETATTR of mode and times of somebody else's file.
    .union(CapabilitySet::FOWNER)
    // A changed file keeps its set-user-id bits unless the guest's kernel says otherwise.
    .union(CapabilitySet::FSETID)
    // Device nodes; the guest cannot open the host's devices with them.
    .union(CapabilitySet::MKNOD)
    // Capabilities of programs: the extended attribute security.capability.
    .union(CapabilitySet::SETFCAP)
    // Whom a new file belongs to.
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// What the threads of one machine are left with.
#[derive(Debug, Clone)]
pub struct Confinement {
    /// The only file systems they see, if the process may choose.
    pub jail: Option<Arc<Jail>>,
    /// Only the system calls that they need.
    pub seccomp: bool,
    /// Whether one of them serves files to the guest.
    pub serves_files: bool,
    /// Who they are; the one that serves files stays who it is.
    pub user: Option<UserConfig>,
}

impl Confinement {
    /// What a machine of `config` in `jail` can do with.
    pub fn of(config: &VmConfig, jail: Option<Arc<Jail>>) -> Self {
        let serves_files = !config.shares.is_empty();
        Confinement { jail, seccomp: config.seccomp, serves_files, user: config.user }
    }

    /// Refuses a user that this process cannot become.
    pub fn check(config: &VmConfig) -> Result<(), ConfigError> {
        if config.user.is_some() && !has(CapabilitySet::SETUID | CapabilitySet::SETGID) {
            let rule = "must not be given, as only root can become somebody else".to_owned();
            return Err(ConfigError { field: "user".to_owned(), rule });
        }
        Ok(())
    }

    /// Starts a thread of `kind` that runs `body` once it is confined; fails if it cannot be.
    pub fn spawn(
        &self,
        builder: Builder,
        kind: Kind,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let confinement = self.clone();
        let (report, outcome) = sync_channel(1);
        let thread = builder.spawn(move || {
            let confined = confinement.enter(kind);
            let is_confined = confined.is_ok();
            // Whoever starts the thread waits for it, and the room for it is there.
            let _ = report.send(confined);
            drop(report);
            if is_confined {
                body();
            }
        })?;
        outcome.recv().unwrap_or_else(|_| Err(io::Error::other("the thread died")))?;
        Ok(thread)
    }

    /// Confines the calling thread.
    fn enter(self, kind: Kind) -> io::Result<()> {
        if let Some(jail) = self.jail {
            jail.enter()?;
        }
        if self.serves_files && kind == Kind::Io {
            keep_capabilities(FILE_SERVING)?;
        } else {
            self.user.map_or(Ok(()), become_user)?;
            keep_capabilities(CapabilitySet::empty())?;
        }
        if self.seccomp {
            // Gives up new privileges by the way.
            return seccomp::install(kind).map_err(io::Error::other);
        }
        give_up_new_privileges()
    }
}

/// Confines the calling thread, which has started the machine of `config`, to control it from now on:
/// it becomes the machine's user, and keeps no capability and only few system calls. For a thread that
/// has nothing else to do. Where devices or vCPUs can still come, the thread stays who it is: it has to
/// open them, and to confine their threads.
pub fn give_up_privileges(config: &VmConfig) -> io::Result<()> {
    if config.can_grow() {
        return give_up_new_privileges();
    }
    let rest = Confinement { serves_files: false, ..Confinement::of(config, None) };
    rest.enter(Kind::Main)
}

/// Leaves the host's System V IPC and its host name to other processes, if the caller may: for the
/// program's start, as it holds for the calling thread and those it starts.
pub fn leave_namespaces() -> io::Result<()> {
    match unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS) {
        Ok(()) | Err(Errno::EPERM) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Keeps the memory of this process and of its guest out of core dumps; for the program's start.
pub fn forbid_core_dumps() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `none` is a valid rlimit, and outlives the call that reads it.
    match unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Programs the thread executes have no more rights than the thread (prctl(2), `PR_SET_NO_NEW_PRIVS`).
fn give_up_new_privileges() -> io::Result<()> {
    // SAFETY: this operation takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the calling thread, and no other, `user` without further groups. By way of the C library all
/// threads would change at once, which the filters of those that run forbid.
fn become_user(user: UserConfig) -> io::Result<()> {
    let UserConfig { uid, gid } = user;
    // SAFETY: these take numbers only; the list of groups is empty, so its address is not looked at.
    let succeeded = unsafe {
        libc::syscall(libc::SYS_setgroups, 0, 0) == 0
            && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
    };
    if succeeded { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the calling thread has all of `needed`.
pub fn has(needed: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

/// Gives up every capability of the calling thread but those of `needed` that it has.
fn keep_capabilities(needed: CapabilitySet) -> io::Result<()> {
    let kept = if needed.is_empty() { needed } else { capabilities(None)?.permitted & needed };
    // No program will be executed that could inherit one; without these there are no ambient ones.
    let inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable })?)
}
