//! Repeats in the guest what others have changed in the share. Nobody else makes the guest's kernel tell those
//! who watch files there (inotify(7)), or look at them anew before it is due; see
//! [`agent_protocol::REPEATING_GROUP`] for why nothing is done by that.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};

use agent_protocol::{Change, ChangeKind, REPEATING_GROUP, SHARE_PATH};
use nix::Result;
use nix::errno::Errno;
use nix::fcntl::{
    AtFlags, OFlag, OpenHow, RenameFlags, ResolveFlag, open, openat, openat2, renameat2,
};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstat, fstatat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{
    ForkResult, Gid, Pid, UnlinkatFlags, fork, ftruncate, getegid, setfsgid, symlinkat, unlinkat,
};

/// Most changes that wait; what is more is not repeated.
const MAX_CHANGES: usize = 4096;

/// The groups: for what was written or has other attributes, what was made, and what is gone.
const TOUCH: u32 = REPEATING_GROUP;
const MAKE: u32 = REPEATING_GROUP + 1;
const REMOVE_FILE: u32 = REPEATING_GROUP + 2;
const REMOVE_DIRECTORY: u32 = REPEATING_GROUP + 3;

/// Changes that wait, and the process that repeats earlier ones: files of the host may keep it waiting.
#[derive(Debug, Default)]
pub struct Repeating {
    waiting: Vec<Change>,
    child: Option<Pid>,
}

impl Repeating {
    /// Repeats `changes`, now or when the earlier ones are repeated.
    pub fn add(&mut self, changes: Vec<Change>) {
        let room = MAX_CHANGES - self.waiting.len();
        self.waiting.extend(changes.into_iter().take(room));
        self.go_on();
    }

    /// The child `pid` has ended.
    pub fn ended(&mut self, pid: Pid) {
        if self.child == Some(pid) {
            self.child = None;
            self.go_on();
        }
    }

    fn go_on(&mut self) {
        if self.child.is_some() || self.waiting.is_empty() {
            return;
        }
        let changes = std::mem::take(&mut self.waiting);
        // SAFETY: this process has a single thread.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { child }) => self.child = Some(child),
            Ok(ForkResult::Child) => {
                // Streams end with the last descriptor, and this process may live longer.
                // SAFETY: nothing here uses a descriptor that was opened before.
                unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
                // A file that is not what it was any more has been changed again, which is told next.
                changes.iter().for_each(|change| _ = repeat(change));
                // SAFETY: _exit ends the process and nothing else; what the agent would do at its end is
                // not this process's.
                unsafe { libc::_exit(0) }
            }
            Err(error) => log::debug!("repeat changes of files: {error}"),
        }
    }
}

fn repeat(change: &Change) -> Result<()> {
    let (folder, name) = (folder(&change.folder)?, change.name.as_os_str());
    match &change.kind {
        ChangeKind::Made(mode) => in_group(MAKE, || make(&folder, name, *mode)),
        ChangeKind::Written => in_group(TOUCH, || write(&folder, name)),
        ChangeKind::Attributes => in_group(TOUCH, || touch(&folder, name)),
        ChangeKind::Removed { is_directory } => {
            let (group, flag) = if *is_directory {
                (REMOVE_DIRECTORY, UnlinkatFlags::RemoveDir)
            } else {
                (REMOVE_FILE, UnlinkatFlags::NoRemoveDir)
            };
            in_group(group, || {
                look_anew(&folder, name)?;
                unlinkat(&folder, name, flag)
            })
        }
        ChangeKind::Moved(new_folder, new_name) => {
            let new_folder = self::folder(new_folder)?;
            let (new_name, flags) = (new_name.as_os_str(), RenameFlags::empty());
            in_group(REMOVE_FILE, || {
                look_anew(&folder, name)?;
                renameat2(&folder, name, &new_folder, new_name, flags)
            })
        }
    }
}

/// Opens a folder of the share.
fn folder(path: &OsStr) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let share = open(SHARE_PATH, flags, Mode::empty())?;
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    openat2(share, path, OpenHow::new().flags(flags).resolve(resolve))
}

/// Does something in the name of a group, and nothing without that: it would be done on the host.
fn in_group<T>(group: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let (group, nobody) = (Gid::from_raw(group), Gid::from_raw(u32::MAX));
    setfsgid(group);
    // The only way to ask for it (setfsgid(2)).
    if setfsgid(nobody) != group {
        return Err(Errno::EPERM);
    }
    let outcome = act();
    setfsgid(getegid());
    outcome
}

/// Has the kernel forget what it believes of a name that shall go: the file may be elsewhere now, and alive.
/// In the name of the groups for that every name is there, so nothing is made.
fn look_anew(folder: impl AsFd, name: &OsStr) -> Result<()> {
    match mknodat(folder, name, SFlag::S_IFREG, Mode::empty(), 0) {
        Err(Errno::EEXIST) => Ok(()),
        made => made,
    }
}

fn make(folder: impl AsFd, name: &OsStr, mode: u32) -> Result<()> {
    let (kind, mode) =
        (SFlag::from_bits_truncate(mode & libc::S_IFMT), Mode::from_bits_truncate(mode));
    match kind {
        SFlag::S_IFDIR => mkdirat(folder, name, mode),
        // Where it leads is asked for when somebody follows it.
        SFlag::S_IFLNK => symlinkat(".", folder, name),
        _ => mknodat(folder, name, kind, mode, 0),
    }
}

/// Has a file the length that it has.
fn write(folder: impl AsFd, name: &OsStr) -> Result<()> {
    let about = fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    // What else can be opened may do something then.
    if about.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(());
    }
    let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = openat(folder, name, flags, Mode::empty())?;
    ftruncate(&file, fstat(&file)?.st_size)
}

fn touch(folder: impl AsFd, name: &OsStr) -> Result<()> {
    let now = TimeSpec::UTIME_NOW;
    utimensat(folder, name, &now, &now, UtimensatFlags::NoFollowSymlink)
}
