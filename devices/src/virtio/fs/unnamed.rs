//! Files that have no name (yet): what open(2) makes with O_TMPFILE. The library does not know them.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::{File, FileTimes, Permissions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply, SetattrValid};

/// Numbers of nodes and handles of these files have this bit. The library's have 56 bits.
const UNNAMED: u64 = 1 << 60;

/// What a reader and a writer may choose for an open file; the rest is for the guest's kernel.
const KEPT_FLAGS: i32 = libc::O_ACCMODE | libc::O_DIRECT | libc::O_SYNC | libc::O_DSYNC;

/// The files without a name that a guest knows or has open.
///
/// One that gets a name is a file of the library's to who looks the name up, while who has it open goes
/// on here. The two have different numbers, as if they were different files.
#[derive(Default)]
pub(super) struct Unnamed {
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    /// The number that was given last, to a node or a handle.
    last: u64,
    /// By node, with the number of times that the guest was told of it.
    known: BTreeMap<u64, (Arc<File>, u64)>,
    /// By handle.
    open: BTreeMap<u64, Arc<File>>,
}

impl Unnamed {
    /// Makes a file in `directory`. Returns its node and its handle.
    pub fn create(&self, directory: &File, flags: i32, mode: u32) -> io::Result<(u64, u64)> {
        let exclusive = flags & libc::O_EXCL;
        let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC | exclusive;
        // SAFETY: the path is a string that outlives the call, the result is checked.
        let file = unsafe { libc::openat(directory.as_raw_fd(), c".".as_ptr(), flags, mode) };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the file was just opened, and nobody else knows it.
        let file = Arc::new(unsafe { File::from_raw_fd(file) });
        let mut tables = self.lock();
        let (node, handle) = (tables.number(), tables.number());
        tables.known.insert(node, (file.clone(), 1));
        tables.open.insert(handle, file);
        Ok((node, handle))
    }

    /// The file of a node, if it is one of these.
    pub fn of_node(&self, node: u64) -> Option<io::Result<Arc<File>>> {
        let find = || self.lock().known.get(&node).map(|(file, _)| file.clone());
        is_unnamed(node).then(|| find().ok_or_else(bad))
    }

    /// The file of a handle, if it is one of these.
    pub fn of_handle(&self, handle: u64) -> Option<io::Result<Arc<File>>> {
        let find = || self.lock().open.get(&handle).cloned();
        is_unnamed(handle).then(|| find().ok_or_else(bad))
    }

    /// The file of a handle, if there is one, or of a node, if it is one of these.
    pub fn of(&self, node: u64, handle: Option<u64>) -> Option<io::Result<Arc<File>>> {
        self.of_node(node)
            .map(|file| handle.and_then(|handle| self.of_handle(handle)).unwrap_or(file))
    }

    /// Opens `file` once more. Returns the handle.
    pub fn open(&self, file: &File, flags: u32) -> io::Result<u64> {
        let flags = flags as i32;
        let again = File::options()
            .read(flags & libc::O_ACCMODE != libc::O_WRONLY)
            .write(flags & libc::O_ACCMODE != libc::O_RDONLY)
            .truncate(flags & libc::O_TRUNC != 0)
            .custom_flags(flags & KEPT_FLAGS & !libc::O_ACCMODE)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let mut tables = self.lock();
        let handle = tables.number();
        tables.open.insert(handle, Arc::new(again));
        Ok(handle)
    }

    /// Closes a handle, if it is one of these.
    pub fn release(&self, handle: u64) -> Option<io::Result<()>> {
        let close = || self.lock().open.remove(&handle).map(drop);
        is_unnamed(handle).then(|| close().ok_or_else(bad))
    }

    /// The guest is told of a node once more.
    pub fn remember(&self, node: u64) {
        if let Some((_, lookups)) = self.lock().known.get_mut(&node) {
            *lookups = lookups.saturating_add(1);
        }
    }

    /// The guest forgets `count` times that it was told of a node. Returns whether it is one of these.
    pub fn forget(&self, node: u64, count: u64) -> bool {
        if is_unnamed(node) {
            let mut tables = self.lock();
            if let Some((_, lookups)) = tables.known.get_mut(&node) {
                *lookups = lookups.saturating_sub(count);
                if *lookups == 0 {
                    tables.known.remove(&node);
                }
            }
        }
        is_unnamed(node)
    }

    /// Forgets and closes everything.
    pub fn clear(&self) {
        *self.lock() = Tables::default();
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().expect("nothing panics while it looks up a file")
    }
}

impl Tables {
    fn number(&mut self) -> u64 {
        self.last += 1;
        UNNAMED | self.last
    }
}

fn is_unnamed(number: u64) -> bool {
    number & UNNAMED != 0
}

fn bad() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

fn checked(result: i64) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Attributes of an open file.
pub(super) fn attributes(file: &File) -> io::Result<stat64> {
    let mut attributes = MaybeUninit::<stat64>::uninit();
    // SAFETY: the call writes a stat64, and no more.
    checked(unsafe { libc::fstat64(file.as_raw_fd(), attributes.as_mut_ptr()) }.into())?;
    // SAFETY: the call succeeded, so all of it is written.
    Ok(unsafe { attributes.assume_init() })
}

/// What is known of the file system of an open file.
pub(super) fn file_system(file: &File) -> io::Result<statvfs64> {
    let mut status = MaybeUninit::<statvfs64>::uninit();
    // SAFETY: the call writes a statvfs64, and no more.
    checked(unsafe { libc::fstatvfs64(file.as_raw_fd(), status.as_mut_ptr()) }.into())?;
    // SAFETY: the call succeeded, so all of it is written.
    Ok(unsafe { status.assume_init() })
}

/// Changes what of the `attributes` of a file is `valid`.
pub(super) fn set_attributes(
    file: &File,
    attributes: &stat64,
    valid: SetattrValid,
) -> io::Result<()> {
    if valid.contains(SetattrValid::MODE) {
        file.set_permissions(Permissions::from_mode(attributes.st_mode & 0o7777))?;
    }
    let chosen = |flag, id| valid.contains(flag).then_some(id);
    let owner = chosen(SetattrValid::UID, attributes.st_uid);
    let group = chosen(SetattrValid::GID, attributes.st_gid);
    if owner.or(group).is_some() {
        fchown(file, owner, group)?;
    }
    if valid.contains(SetattrValid::SIZE) {
        if valid.contains(SetattrValid::KILL_SUIDGID) {
            drop_privileges(file)?;
        }
        file.set_len(u64::try_from(attributes.st_size).map_err(|_| bad())?)?;
    }
    let time = |now, set, seconds, nanoseconds| {
        if valid.contains(now) {
            Some(SystemTime::now())
        } else {
            valid.contains(set).then(|| instant(seconds, nanoseconds))
        }
    };
    let accessed = time(
        SetattrValid::ATIME_NOW,
        SetattrValid::ATIME,
        attributes.st_atime,
        attributes.st_atime_nsec,
    );
    let modified = time(
        SetattrValid::MTIME_NOW,
        SetattrValid::MTIME,
        attributes.st_mtime,
        attributes.st_mtime_nsec,
    );
    let mut times = FileTimes::new();
    if let Some(accessed) = accessed {
        times = times.set_accessed(accessed);
    }
    if let Some(modified) = modified {
        times = times.set_modified(modified);
    }
    if accessed.or(modified).is_some() { file.set_times(times) } else { Ok(()) }
}

/// A point in time as stat(2) has it.
fn instant(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let whole = if seconds < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    };
    whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

/// Takes the right to act as its owner or group from a program, as a write of somebody else does.
pub(super) fn drop_privileges(file: &File) -> io::Result<()> {
    let mode = attributes(file)?.st_mode & 0o7777;
    let group = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    let rest = mode & !(libc::S_ISUID | group);
    if rest == mode { Ok(()) } else { file.set_permissions(Permissions::from_mode(rest)) }
}

/// Gives a file a name in `directory`.
pub(super) fn link(file: &File, directory: &File, name: &CStr) -> io::Result<()> {
    let (from, to) = (file.as_raw_fd(), directory.as_raw_fd());
    // SAFETY: both paths are strings that outlive the call.
    let linked =
        unsafe { libc::linkat(from, c"".as_ptr(), to, name.as_ptr(), libc::AT_EMPTY_PATH) };
    checked(linked.into()).map(drop)
}

/// Allocates, zeroes or punches out a range of a file.
pub(super) fn allocate(file: &File, mode: u32, offset: u64, length: u64) -> io::Result<()> {
    let number =
        |value| i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let (offset, length) = (number(offset)?, number(length)?);
    // SAFETY: the call takes numbers only.
    let done = unsafe { libc::fallocate64(file.as_raw_fd(), mode as i32, offset, length) };
    checked(done.into()).map(drop)
}

/// Where in a file the next data or the next hole is.
pub(super) fn seek(file: &File, offset: u64, whence: u32) -> io::Result<u64> {
    // SAFETY: the call takes numbers only. The position of these files matters to nobody.
    let place = unsafe { libc::lseek64(file.as_raw_fd(), offset as i64, whence as i32) };
    checked(place)
}

/// Sets an extended attribute.
pub(super) fn set_xattr(file: &File, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
    let (bytes, length, flags) = (value.as_ptr().cast(), value.len(), flags as i32);
    // SAFETY: name and value outlive the call.
    let set = unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), bytes, length, flags) };
    checked(set.into()).map(drop)
}

/// An extended attribute of at most `room` bytes; its length without room.
pub(super) fn xattr(file: &File, name: &CStr, room: u32) -> io::Result<GetxattrReply> {
    let mut value = vec![0; room as usize];
    let place = value.as_mut_ptr().cast();
    // SAFETY: name and value outlive the call, which writes `value.len()` bytes at most.
    let length = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), place, value.len()) };
    let length = checked(i64::try_from(length).expect("isize has 64 bits"))?;
    Ok(match filled(value, length) {
        Some(value) => GetxattrReply::Value(value),
        None => GetxattrReply::Count(u32::try_from(length).unwrap_or(u32::MAX)),
    })
}

/// The names of all extended attributes, in at most `room` bytes; their length without room.
pub(super) fn xattrs(file: &File, room: u32) -> io::Result<ListxattrReply> {
    let mut names = vec![0; room as usize];
    let place = names.as_mut_ptr().cast();
    // SAFETY: the call writes `names.len()` bytes at most.
    let length = unsafe { libc::flistxattr(file.as_raw_fd(), place, names.len()) };
    let length = checked(i64::try_from(length).expect("isize has 64 bits"))?;
    Ok(match filled(names, length) {
        Some(names) => ListxattrReply::Names(names),
        None => ListxattrReply::Count(u32::try_from(length).unwrap_or(u32::MAX)),
    })
}

/// The `length` bytes that were filled in, if there was any room.
fn filled(mut bytes: Vec<u8>, length: u64) -> Option<Vec<u8>> {
    bytes.truncate(usize::try_from(length).expect("it is the length of a slice"));
    (bytes.capacity() != 0).then_some(bytes)
}

/// Removes an extended attribute.
pub(super) fn remove_xattr(file: &File, name: &CStr) -> io::Result<()> {
    // SAFETY: the name outlives the call.
    let removed = unsafe { libc::fremovexattr(file.as_raw_fd(), name.as_ptr()) };
    checked(removed.into()).map(drop)
}
