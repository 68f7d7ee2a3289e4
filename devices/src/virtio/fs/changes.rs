//! What others change in a shared directory. virtio-fs has no word for it, so whoever runs the machine is
//! told, and may have somebody in the guest repeat it: see [`Echo`].

use std::ffi::{CStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ledger::Ledger;
use super::observer::Observer;

/// Most changes that wait to be taken; what is more is not told.
const MAX_CHANGES: usize = 4096;

/// Node numbers of what is gone have the first of these bits, any of those below the second and none above:
/// the tree's numbers do not.
const GONE: u64 = 1 << 61;
const GONE_BITS: u64 = 1 << 60;

/// A change that is not the guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Where, below the shared directory.
    pub folder: PathBuf,
    /// What, in there.
    pub name: OsString,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// What happened to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    /// It was made, or came from where the guest has not looked.
    Made {
        /// `st_mode` (inode(7)).
        mode: u32,
    },
    /// Its contents changed.
    Written,
    /// Its attributes changed.
    Attributes,
    /// It was removed, or went where the guest has not looked.
    Removed {
        /// Whether it was a directory.
        is_directory: bool,
    },
    /// It, which is no directory, has another name.
    Moved {
        /// The folder it is in now, below the shared directory.
        folder: PathBuf,
        /// Its name there.
        name: OsString,
    },
}

/// Changes that wait for whoever runs the machine.
#[derive(Debug)]
pub struct Changes {
    waiting: Mutex<Vec<Change>>,
    event: EventFd,
}

impl Changes {
    /// None yet. The error is that the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Changes { waiting: Mutex::default(), event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Takes what has come since the last time.
    pub fn take(&self) -> Vec<Change> {
        // Empty or not, what comes from here on makes it readable again.
        let _ = self.event.read();
        std::mem::take(&mut self.waiting())
    }

    pub(super) fn add(&self, change: Change) {
        let mut waiting = self.waiting();
        let is_its = |other: &&Change| other.folder == change.folder && other.name == change.name;
        // Files are written again and again, and nobody has heard of the first time yet.
        let is_new = waiting.iter().rev().find(is_its) != Some(&change);
        if waiting.len() < MAX_CHANGES && is_new {
            waiting.push(change);
            // The only failure is a counter at its maximum, and then it is readable anyway.
            let _ = self.event.write(1);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Change>> {
        self.waiting.lock().expect("nothing panics while it holds this")
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event is open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

/// Whom to tell of changes, and how the guest repeats them.
#[derive(Debug, Clone)]
pub struct Telling {
    /// Where changes are told of: below this folder of the shared directory.
    pub below: PathBuf,
    /// Number of the first group of [`Echo`].
    pub first_group: u32,
    /// Who is told.
    pub to: Arc<Changes>,
}

impl PartialEq for Telling {
    /// Whether both tell of the same things.
    fn eq(&self, other: &Self) -> bool {
        (&self.below, self.first_group) == (&other.below, other.first_group)
    }
}

impl Eq for Telling {}

/// A request by which the guest only repeats to itself what has happened, so that its kernel tells those
/// who watch (inotify(7)): LOOKUP, SETATTR, OPEN, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR and RENAME do nothing
/// then and are answered as if they had. It is made in the name of one of four groups that nobody else is in;
/// a guest that uses them for something else fools itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Echo {
    /// The first group: a file is written, or has other attributes.
    Touch,
    /// The second: a file is made that is there, so it is not seen before.
    Make,
    /// The third and the fourth: a file or a directory is removed or moved that is gone, so it is seen.
    Remove { is_directory: bool },
}

impl Telling {
    /// What the request of `context` repeats, if it does.
    pub(super) fn echo(&self, context: &Context) -> Option<Echo> {
        match context.gid.checked_sub(self.first_group)? {
            0 => Some(Echo::Touch),
            1 => Some(Echo::Make),
            2 => Some(Echo::Remove { is_directory: false }),
            3 => Some(Echo::Remove { is_directory: true }),
            _ => None,
        }
    }
}

impl Echo {
    /// What `name` in `parent` stands for, if the host says `found`.
    pub fn lookup(
        self,
        parent: u64,
        name: &CStr,
        found: impl FnOnce() -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        match self {
            Echo::Touch => found().map(unbelievable),
            Echo::Make => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            Echo::Remove { is_directory } => {
                Ok(found().map_or_else(|_| stand_in(parent, name, is_directory), unbelievable))
            }
        }
    }
}

/// Not to be believed for longer than the request takes: nobody in the guest has looked, and the host may go
/// on, and mount something there.
fn unbelievable(entry: Entry) -> Entry {
    Entry { entry_timeout: Duration::ZERO, attr_timeout: Duration::ZERO, ..entry }
}

impl Ledger {
    /// What the request only repeats, if it does.
    pub(super) fn echo(&self, context: &Context) -> Option<Echo> {
        self.observer.as_ref()?.telling.echo(context)
    }

    /// Has nobody watch a directory that the guest has forgotten.
    pub(super) fn ignore(&self, inode: u64) {
        if let Some(observer) = &self.observer {
            observer.forget(inode, &|node| self.path(node));
        }
    }

    /// Looks at what others changed. Returns whether there may be more.
    pub(super) fn look(&self) -> bool {
        let look = |observer: &Observer| observer.look(&|node| self.path(node));
        self.observer.as_ref().is_some_and(look)
    }

    /// Where a file is, for the thread that serves; the number is the tree's.
    fn path(&self, inode: u64) -> io::Result<PathBuf> {
        self.tree.files.readlinkat_proc_file(inode)
    }

    /// ENOTEMPTY if a directory is there again that the guest repeats to be gone: its kernel would take what
    /// is there for dead.
    pub(super) fn gone(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let Ok(entry) = self.tree.lookup(context, self.file(parent)?, name) else { return Ok(()) };
        self.tree.forget(context, entry.inode, 1);
        Err(io::Error::from_raw_os_error(libc::ENOTEMPTY))
    }

    /// Tells the guest of a file that it found or made in `parent`, which is the tree's number.
    pub(super) fn tell_in(&self, parent: u64, entry: Entry) -> Entry {
        self.observe(parent, entry.inode, entry.attr.st_mode);
        self.tell(entry)
    }

    /// Has a directory watched that the guest has been told of; all numbers are the tree's.
    pub(super) fn observe(&self, parent: u64, inode: u64, mode: u32) {
        if let Some(observer) = &self.observer {
            observer.know(parent, inode, mode, &|node| self.path(node));
        }
    }

    /// Has `make` make a file or directory in another one, unless the guest only repeats that somebody else
    /// did; that may be gone by now.
    pub(super) fn make(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        is_directory: bool,
        make: impl FnOnce(u64) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let parent = self.file(parent)?;
        if self.echo(context).is_none() {
            return Ok(self.tell_in(parent, make(parent)?));
        }
        let found = self.tree.lookup(context, parent, name);
        let found = found.map(|entry| unbelievable(self.tell_in(parent, entry)));
        Ok(found.unwrap_or_else(|_| stand_in(parent, name, is_directory)))
    }
}

/// Stands for a file that was there, not to be believed for longer than a request takes.
fn stand_in(parent: u64, name: &CStr, is_directory: bool) -> Entry {
    // The guest's kernel does nothing where two names are one file.
    let mut hasher = DefaultHasher::new();
    (parent, name, is_directory).hash(&mut hasher);
    let inode = GONE | (hasher.finish() % GONE_BITS);
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut attr: stat64 = unsafe { std::mem::zeroed() };
    let kind = if is_directory { libc::S_IFDIR } else { libc::S_IFREG };
    (attr.st_ino, attr.st_mode) = (inode, kind | 0o700);
    attr.st_nlink = 1;
    Entry { inode, attr, ..Entry::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(name: &str) -> Change {
        Change { folder: "a".into(), name: name.into(), kind: ChangeKind::Written }
    }

    #[test]
    fn changes_are_taken_once_and_what_a_file_has_last_is_not_added_again() {
        let changes = Changes::new().unwrap();
        let other = Change { kind: ChangeKind::Attributes, ..written("x") };

        for name in ["x", "x", "y", "x"] {
            changes.add(written(name));
        }
        changes.add(other.clone());
        changes.add(written("x"));

        assert_eq!(changes.take(), [written("x"), written("y"), other, written("x")]);
        assert_eq!(changes.take(), []);
    }

    #[test]
    fn no_more_than_a_bound_wait() {
        let changes = Changes::new().unwrap();

        for number in 0..2 * MAX_CHANGES {
            changes.add(written(&number.to_string()));
        }

        assert_eq!(changes.take().len(), MAX_CHANGES);
    }

    #[test]
    fn four_groups_repeat() {
        let to = Arc::new(Changes::new().unwrap());
        let telling = Telling { below: "b".into(), first_group: 100, to };
        let of = |gid| telling.echo(&Context { uid: 0, gid, pid: 1 });

        assert_eq!(of(99), None);
        assert_eq!(of(100), Some(Echo::Touch));
        assert_eq!(of(101), Some(Echo::Make));
        assert_eq!(of(102), Some(Echo::Remove { is_directory: false }));
        assert_eq!(of(103), Some(Echo::Remove { is_directory: true }));
        assert_eq!(of(104), None);
    }
}
