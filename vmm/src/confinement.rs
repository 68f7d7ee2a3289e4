//! Threads that give up, before they do anything else, what their work does not need.
//!
//! What a thread gives up it cannot get back, nor can what it starts. The thread that started the
//! machine keeps everything unless it says otherwise: it may have more to do than to run a guest.
//! Capability bounding sets stay as they are: they bound what execve(2) gives, which no filter lets through
//! and which `no_new_privs` makes give nothing.

use std::cell::Cell;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use log::debug;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{get_pdeathsig, set_pdeathsig};
use nix::unistd::{getegid, geteuid, getppid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs,
};

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

thread_local! {
    /// Whether this thread has given up what its work does not need.
    static IS_CONFINED: Cell<bool> = const { Cell::new(false) };
}

/// What becoming somebody else takes.
const CHANGE_OF_USER: CapabilitySet = CapabilitySet::SETUID.union(CapabilitySet::SETGID);

/// The first of the user and group ids that no system gives to anybody (systemd, "Users, Groups, UIDs and
/// GIDs on systemd Systems", 1879048192 to 2147483647).
const FIRST_OWN_ID: u32 = 0x7000_0000;

/// How many there are.
const OWN_IDS: u64 = 1 << 28;

/// The host's own user namespace, which has every id (linux/proc_ns.h, `PROC_USER_INIT_INO`).
const FIRST_NAMESPACE: &str = "user:[4026531837]";

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
        if config.user.is_some() && !has(CHANGE_OF_USER) {
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
        // What the caller has given up, the new thread never had.
        let has_less = IS_CONFINED.get();
        let (report, outcome) = sync_channel(1);
        let thread = builder.spawn(move || {
            let applied = if has_less { Ok(()) } else { confinement.apply(kind) };
            let confined = applied.and_then(|()| confinement.filter(kind));
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

    /// Has the calling thread, which controls the machine and serves no files, give up all but system calls,
    /// and with it those that it starts: they can do no more than it.
    pub fn give_up_privileges(&self) -> io::Result<()> {
        let wish = get_pdeathsig()?;
        let parent = wish.map(|_| getppid());
        Confinement { serves_files: false, ..self.clone() }.apply(Kind::Main)?;
        IS_CONFINED.set(true);
        if wish.is_some() {
            // A change of user ends what the parent has asked for (prctl(2), PR_SET_PDEATHSIG).
            set_pdeathsig(wish)?;
            if parent != Some(getppid()) {
                return Err(io::Error::other("the parent has died"));
            }
        }
        Ok(())
    }

    /// Leaves the calling thread the system calls of `kind`.
    pub fn filter(&self, kind: Kind) -> io::Result<()> {
        if self.seccomp {
            // Gives up new privileges by the way.
            return seccomp::install(kind).map_err(io::Error::other);
        }
        // Programs that it executes have no more rights than it has.
        Ok(set_no_new_privs(true)?)
    }

    /// Takes from the calling thread what one of `kind` needs none of, but for system calls.
    fn apply(&self, kind: Kind) -> io::Result<()> {
        if let Some(jail) = &self.jail {
            jail.enter()?;
        }
        if self.serves_files && kind == Kind::Io {
            return keep_capabilities(FILE_SERVING);
        }
        self.user.map_or(Ok(()), |user| become_user(user, &[]))?;
        keep_capabilities(CapabilitySet::empty())
    }
}

/// A user that nobody else is, by chance out of 2²⁸, for a machine that need not be root's; none if the
/// caller cannot become it: it lacks a capability, or its user namespace has not so many users.
pub fn user_of_its_own() -> Option<UserConfig> {
    if !has(CHANGE_OF_USER) {
        return None;
    }
    let chance = RandomState::new().build_hasher().finish();
    let id = FIRST_OWN_ID + u32::try_from(chance % OWN_IDS).expect("fewer than 2³²");
    let is_known = |map| fs::read_to_string(map).is_ok_and(|map| is_mapped(&map, id));
    let all_are_known =
        fs::read_link("/proc/self/ns/user").is_ok_and(|it| it.as_os_str() == FIRST_NAMESPACE);
    (all_are_known || is_known("/proc/self/uid_map") && is_known("/proc/self/gid_map"))
        .then_some(UserConfig { uid: id, gid: id })
}

/// Whether a user namespace with `map` has `id` (user_namespaces(7), "User and group ID mappings").
fn is_mapped(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u32> = line.split_whitespace().flat_map(str::parse).collect();
        matches!(numbers[..], [first, _, count] if id >= first && id - first < count)
    })
}

/// Leaves the host's System V IPC and its host name to other processes: for the start of a program that is
/// to run a machine of `config`, while it has one thread.
///
/// An ordinary user's program gets a user namespace of its own, if the host lets everybody have one: there the
/// machine's threads can be kept from the host's files, too ([`Jail`]). It has one user and one group, so
/// that a machine that serves files does without; and it would take from who has some capability what that is
/// good for.
pub fn leave_namespaces(config: &VmConfig) -> io::Result<()> {
    let namespaces = CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    match unshare(namespaces) {
        Err(Errno::EPERM) => {}
        outcome => return Ok(outcome?),
    }
    let (user, group) = (geteuid(), getegid());
    let is_ordinary = !user.is_root() && capabilities(None)?.permitted.is_empty();
    if !is_ordinary || !config.shares.is_empty() {
        return Ok(());
    }
    let left = unshare(namespaces | CloneFlags::CLONE_NEWUSER);
    let left = left.map_err(io::Error::from).and_then(|()| {
        // user_namespaces(7), "Defining user and group ID mappings".
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
    });
    if let Err(error) = left {
        // Some hosts let everybody have one, but do nothing there: then there is no jail, which is told of.
        debug!("have a user namespace: {error}");
    }
    Ok(())
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

/// Makes the calling thread, and no other, `user` with further `groups` and without a capability, for good.
pub fn become_less(user: UserConfig, groups: &[libc::gid_t]) -> io::Result<()> {
    become_user(user, groups)?;
    keep_capabilities(CapabilitySet::empty())
}

/// Makes the calling thread, and no other, `user` with further `groups`. By way of the C library all
/// threads would change at once, which the filters of those that run forbid.
fn become_user(user: UserConfig, groups: &[libc::gid_t]) -> io::Result<()> {
    let UserConfig { uid, gid } = user;
    // SAFETY: the list of groups is as long as is said, and outlives the call; the others take numbers only.
    let succeeded = unsafe {
        libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) == 0
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
pub fn keep_capabilities(needed: CapabilitySet) -> io::Result<()> {
    let kept = if needed.is_empty() { needed } else { capabilities(None)?.permitted & needed };
    // No program will be executed that could inherit one; without these there are no ambient ones.
    let inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_namespace_has_the_ids_of_its_map() {
        assert!(is_mapped("         0          0 4294967295\n", FIRST_OWN_ID));
        let few = "0 1000 1\n1 100000 65536\n";
        assert!(is_mapped(few, 65_536) && !is_mapped(few, 65_537));
        assert!(!is_mapped("", 0));
    }
}
