//! What others change in a shared directory. virtio-fs has no word for it, so whoever runs the machine is
//! told, and may have somebody in the guest repeat it: see [`Echo`].

use std::ffi::{CStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ledger::Ledger;

/// Most changes that wait to be taken. Whoever misses one sees the next.
const MAX_CHANGES: usize = 4096;

/// Node numbers of what is gone: a file, and a directory. The tree has no numbers of this size.
const GONE: [u64; 2] = [1 << 61, (1 << 61) + 1];

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
        if waiting.len() < MAX_CHANGES && waiting.last() != Some(&change) {
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
/// who watch (inotify(7)). Nothing is done but answered as if it had been. It is made in the name of one of
/// four groups that nobody else is in; a guest that uses them for something else fools itself.
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
    /// What a name stands for, if the host says `found`.
    pub fn lookup(self, found: impl FnOnce() -> io::Result<Entry>) -> io::Result<Entry> {
        match self {
            Echo::Touch => found(),
            Echo::Make => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            // Not to be believed for longer than the request takes.
            Echo::Remove { is_directory } => Ok(found().map_or_else(
                |_| gone(is_directory),
                |entry| Entry {
                    entry_timeout: Duration::ZERO,
                    attr_timeout: Duration::ZERO,
                    ..entry
                },
            )),
        }
    }
}

impl Ledger {
    /// What the request only repeats, if it does.
    pub(super) fn echo(&self, context: &Context) -> Option<Echo> {
        self.observer.as_ref()?.telling.echo(context)
    }

    /// Tells the guest of a file that it found or made in `parent`, which is the tree's number.
    pub(super) fn tell_in(&self, parent: u64, entry: Entry) -> Entry {
        self.observe(parent, entry.inode, entry.attr.st_mode);
        self.tell(entry)
    }

    /// Has a directory watched that the guest has been told of; all numbers are the tree's.
    pub(super) fn observe(&self, parent: u64, inode: u64, mode: u32) {
        if let Some(observer) = &self.observer {
            let path = || self.tree.files.readlinkat_proc_file(inode);
            observer.know(parent, inode, mode, path);
        }
    }

    /// Has `make` make `name` in a directory, unless the guest only repeats that somebody else did.
    pub(super) fn make(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(u64) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let parent = self.file(parent)?;
        let entry = match self.echo(context) {
            Some(_) => self.tree.lookup(context, parent, name)?,
            None => make(parent)?,
        };
        Ok(self.tell_in(parent, entry))
    }
}

/// Stands for a file that was there.
fn gone(is_directory: bool) -> Entry {
    let kind = if is_directory { libc::S_IFDIR } else { libc::S_IFREG };
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut attr: stat64 = unsafe { std::mem::zeroed() };
    let inode = GONE[usize::from(is_directory)];
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
    fn changes_are_taken_once_and_what_repeats_the_last_is_left_out() {
        let changes = Changes::new().unwrap();

        for name in ["x", "x", "y", "x"] {
            changes.add(written(name));
        }

        assert_eq!(changes.take(), ["x", "y", "x"].map(written));
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
