//! What a guest that opens a file may spare itself: to read again what it has read before, and to say
//! that it closes the file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Context, FileSystem, OpenOptions};

use super::server::Cache;
use super::tree::Tree;

/// `FOPEN_NOFLUSH` (linux/fuse.h), of which the library does not know.
// SAFETY: the library passes on the bits and does nothing else with them.
const NO_FLUSH: OpenOptions = unsafe { OpenOptions::from_bits_unchecked(1 << 5) };

/// What a node number has below the number of the mount.
pub(super) const INODE_BITS: u32 = 47;

/// The coarsest clock that file systems have for their time stamps: two changes within one tick of it
/// may look like one.
const COARSEST_TICK: Duration = Duration::from_secs(2);

/// File systems to which the close of a descriptor means nothing while others are open. To others it
/// may: a network file system writes back what it has, and says where that fails.
const LOCAL: [i64; 6] = [
    libc::BTRFS_SUPER_MAGIC,
    libc::EXT4_SUPER_MAGIC,
    libc::F2FS_SUPER_MAGIC,
    libc::OVERLAYFS_SUPER_MAGIC,
    libc::TMPFS_MAGIC,
    libc::XFS_SUPER_MAGIC,
];

/// What files were when they were last opened, and what mounts are.
#[derive(Debug, Default)]
pub(super) struct Opening {
    /// By node.
    versions: Mutex<BTreeMap<u64, Version>>,
    /// Whether closing means nothing, by number of the mount.
    local: Mutex<BTreeMap<u64, bool>>,
}

/// The last change of a file's contents or attributes, and its length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    changed: Duration,
    bytes: i64,
}

impl Tree {
    /// What the guest may spare itself that has just opened `inode` as `handle`.
    pub(super) fn spared(&self, context: &Context, inode: u64, handle: Option<u64>) -> OpenOptions {
        let mut options = self.close_options(inode);
        if self.cache == Cache::Auto {
            let attributes = self.files.getattr(context, inode, handle);
            let is_unchanged = attributes
                .is_ok_and(|(attributes, _)| self.opening.is_unchanged(inode, &attributes));
            options.set(OpenOptions::KEEP_CACHE, is_unchanged);
        }
        options
    }

    /// What the guest may spare itself when it closes `inode`.
    pub(super) fn close_options(&self, inode: u64) -> OpenOptions {
        self.opening.close_options(inode, || self.files.readlinkat_proc_file(inode))
    }
}

impl Opening {
    /// Whether what the guest has read of `node` when it was open last is still what is there, if it is
    /// opened now with these `attributes`.
    fn is_unchanged(&self, node: u64, attributes: &stat64) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.is_unchanged_at(now, node, Version::of(attributes))
    }

    fn is_unchanged_at(&self, now: Duration, node: u64, version: Version) -> bool {
        let mut versions = lock(&self.versions);
        // What changed just now may change once more without another time stamp.
        if version.changed + COARSEST_TICK > now {
            versions.remove(&node);
            return false;
        }
        versions.insert(node, version) == Some(version)
    }

    /// What spares the request that comes with a close, where `node` lies on a file system that has
    /// nothing to do then. `path` tells where it is.
    fn close_options(&self, node: u64, path: impl FnOnce() -> io::Result<PathBuf>) -> OpenOptions {
        let look = || path().and_then(|path| is_local(&path)).unwrap_or(false);
        let local = *lock(&self.local).entry(node >> INODE_BITS).or_insert_with(look);
        if local { NO_FLUSH } else { OpenOptions::empty() }
    }

    /// The guest has forgotten `node`, and with it what it has read.
    pub fn forget(&self, node: u64) {
        lock(&self.versions).remove(&node);
    }

    /// The guest has forgotten everything.
    pub fn clear(&self) {
        lock(&self.versions).clear();
        // The library numbers mounts anew.
        lock(&self.local).clear();
    }
}

impl Version {
    fn of(attributes: &stat64) -> Self {
        let seconds = u64::try_from(attributes.st_ctime).unwrap_or_default();
        let nanoseconds = u32::try_from(attributes.st_ctime_nsec).unwrap_or_default();
        Version { changed: Duration::new(seconds, nanoseconds), bytes: attributes.st_size }
    }
}

/// Whether `path` lies on one of the [`LOCAL`] file systems.
fn is_local(path: &Path) -> io::Result<bool> {
    let file = File::options().read(true).custom_flags(libc::O_PATH).open(path)?;
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `about` outlives the call that fills it.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut about) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(LOCAL.contains(&about.f_type))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it looks something up")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: u64 = 4711;

    fn version(changed_s: u64, bytes: i64) -> Version {
        Version { changed: Duration::from_secs(changed_s), bytes }
    }

    #[test]
    fn what_is_opened_again_as_it_was_is_unchanged() {
        let opening = Opening::default();
        let now = Duration::from_secs(100);

        assert!(!opening.is_unchanged_at(now, NODE, version(10, 5)));
        assert!(opening.is_unchanged_at(now, NODE, version(10, 5)));
        assert!(!opening.is_unchanged_at(now, NODE, version(11, 5)));
        assert!(!opening.is_unchanged_at(now, NODE, version(11, 6)));
        assert!(opening.is_unchanged_at(now, NODE, version(11, 6)));
    }

    #[test]
    fn what_changed_just_now_may_change_again_unnoticed() {
        let opening = Opening::default();
        let now = Duration::from_secs(100);

        assert!(!opening.is_unchanged_at(now, NODE, version(99, 5)));
        assert!(!opening.is_unchanged_at(now, NODE, version(99, 5)));
    }

    #[test]
    fn what_the_guest_forgot_it_has_not_read() {
        let opening = Opening::default();
        let now = Duration::from_secs(100);
        opening.is_unchanged_at(now, NODE, version(10, 5));

        opening.forget(NODE);

        assert!(!opening.is_unchanged_at(now, NODE, version(10, 5)));
    }

    #[test]
    fn a_close_is_told_where_it_may_mean_something() {
        let opening = Opening::default();

        let options = |mount: u64, path: &str| {
            opening.close_options(mount << INODE_BITS | NODE, || Ok(path.into()))
        };

        assert_eq!(options(1, "/proc/self"), OpenOptions::empty());
        assert_eq!(options(2, "/dev/shm"), NO_FLUSH);
        assert_eq!(options(3, "/nowhere"), OpenOptions::empty());
    }
}
