//! Has the host's kernel tell what others change in the directories that the guest knows (fanotify(7)). What
//! is watched in the guest it has looked up, so no other directory is of interest.

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::iter;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, MutexGuard, OnceLock};

use event_manager::EventSet;
use nix::NixPath;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, readlinkat};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use nix::sys::statfs::statfs;

use super::changes::{Change, ChangeKind, Telling};
use super::opening::INODE_BITS;
use crate::virtio::Backend;

/// Files are told by handles, and nothing has to be opened (Linux 5.9; for who is not root, 5.13).
const REPORT: InitFlags =
    InitFlags::from_bits_retain(libc::FAN_REPORT_FID | libc::FAN_REPORT_DFID_NAME);

/// What is told of a file that is shared alone.
const OF_FILE: MaskFlags = MaskFlags::FAN_MODIFY.union(MaskFlags::FAN_ATTRIB);

/// What is told of a directory and what is in it. Moves come with both names (Linux 5.17).
const OF_DIRECTORY: MaskFlags = OF_FILE
    .union(MaskFlags::FAN_CREATE)
    .union(MaskFlags::FAN_DELETE)
    .union(MaskFlags::FAN_RENAME)
    .union(MaskFlags::FAN_ONDIR)
    .union(MaskFlags::FAN_EVENT_ON_CHILD);

/// The kernel forgets a mark with its inode (Linux 5.19), which stays in memory while the guest knows it.
const MARK: MarkFlags = MarkFlags::FAN_MARK_ADD.union(MarkFlags::FAN_MARK_EVICTABLE);

/// Longest handle of a file, in bytes (MAX_HANDLE_SZ of fcntl.h).
const MAX_HANDLE_BYTES: usize = 128;

/// How much is read at once, in bytes, and how often until the guest has its turn.
const READ_BYTES: usize = 4096;
const READS: u32 = 16;

/// Asks for a handle that only tells apart (Linux 6.5): overlayfs has no other.
const AT_HANDLE_FID: i32 = 0x200;

/// A folder below the shared directory, and a name in it.
type Entry = (PathBuf, OsString);

/// Watches the directories that the guest knows.
#[derive(Debug)]
pub(super) struct Observer {
    group: Fanotify,
    pub(super) telling: Telling,
    known: Mutex<Known>,
    /// The shared directory, and where it is for the thread that serves.
    root: File,
    root_path: OnceLock<PathBuf>,
}

/// What is watched: directories, and single files that are shared alone.
#[derive(Debug, Default)]
struct Known {
    places: BTreeMap<Handle, Place>,
    handles: BTreeMap<u64, Handle>,
    /// By number of the mount; nothing for one of which nothing is told.
    file_systems: BTreeMap<u64, Option<[u8; 8]>>,
    /// The folder of all that is told of.
    folder: Option<u64>,
}

/// What the kernel calls an inode: the file system (`f_fsid`, statfs(2)), the kind of handle and the
/// handle (name_to_handle_at(2)).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Handle {
    file_system: [u8; 8],
    kind: i32,
    bytes: Vec<u8>,
}

/// Something that is watched, by its path below the shared directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    path: PathBuf,
    is_directory: bool,
}

impl Observer {
    /// Watches nothing of `root` yet. The error is that the host's kernel cannot tell, or has no more groups
    /// for this user.
    pub fn new(root: File, telling: Telling) -> io::Result<Self> {
        let flags =
            InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK | REPORT;
        let group = Fanotify::init(flags, EventFFlags::O_RDONLY)?;
        let (known, root_path) = Default::default();
        Ok(Observer { group, telling, known, root, root_path })
    }

    /// What to wait for.
    pub fn backend(&self) -> Backend {
        Backend { fd: self.group.as_raw_fd(), events: EventSet::IN }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("nothing panics while it looks something up")
    }

    /// The guest has been told of `node`, which it found in `parent`; `path` tells where it is for the thread
    /// that serves, which has to be the one that calls this. File systems that cannot tell, such as those
    /// over a network, are left out.
    pub fn know(
        &self,
        parent: u64,
        node: u64,
        mode: u32,
        path: impl FnOnce() -> io::Result<PathBuf>,
    ) {
        let mut known = self.known();
        let is_directory = mode & libc::S_IFMT == libc::S_IFDIR;
        let is_alone = known.folder == Some(parent);
        let mount = node >> INODE_BITS;
        let is_of_interest = (is_directory || is_alone)
            && known.file_systems.get(&mount) != Some(&None)
            && !known.handles.contains_key(&node);
        if !is_of_interest {
            return;
        }
        let Ok(path) = path() else { return };
        let Some(place) = self.below(&path).map(|path| Place { path, is_directory }) else {
            known.file_systems.insert(mount, None);
            return;
        };
        if place.path == self.telling.below {
            known.folder = Some(node);
        } else if let Err(error) = self.watch(&mut known, node, &path, place) {
            log::debug!("changes are not seen at {}: {error}", path.display());
        }
    }

    fn watch(&self, known: &mut Known, node: u64, path: &Path, place: Place) -> io::Result<()> {
        let mount = node >> INODE_BITS;
        let file_system = match known.file_systems.get(&mount).copied().flatten() {
            Some(file_system) => file_system,
            None => file_system(path)?,
        };
        known.file_systems.insert(mount, Some(file_system));
        let handle = handle(file_system, path)?;
        let told = if place.is_directory { OF_DIRECTORY } else { OF_FILE };
        self.group.mark(MARK, told, AT_FDCWD, Some(path))?;
        known.places.insert(handle.clone(), place);
        known.handles.insert(node, handle);
        Ok(())
    }

    /// The guest has forgotten `node`.
    pub fn forget(&self, node: u64) {
        let mut known = self.known();
        if let Some(handle) = known.handles.remove(&node) {
            known.places.remove(&handle);
        }
    }

    /// The guest has forgotten everything.
    pub fn clear(&self) {
        // The library numbers mounts anew.
        *self.known() = Known::default();
    }

    /// Tells of what happened, if it did.
    pub fn look(&self) {
        let mut buffer = [0; READ_BYTES];
        for _ in 0..READS {
            let Ok(count @ 1..) = nix::unistd::read(&self.group, &mut buffer) else { return };
            let known = self.known();
            for event in events(&buffer[..count]) {
                self.tell(&known, &event);
            }
        }
    }

    fn tell(&self, known: &Known, event: &Event<'_>) {
        if event.mask & libc::FAN_Q_OVERFLOW != 0 {
            log::warn!("files change on the host faster than the guest is told");
        }
        // What this process does it does for the guest, which knows. The pid of others may be hidden.
        if u32::try_from(event.pid) == Ok(process::id()) {
            return;
        }
        let has = |bit| event.mask & bit != 0;
        let is_directory = has(libc::FAN_ONDIR);
        let (old, new) = (known.entry(event.old.as_ref()), known.entry(event.new.as_ref()));
        match (old, new) {
            (Some(old), Some((folder, name))) if !is_directory => {
                self.add(old, ChangeKind::Moved { folder, name });
            }
            (old, new) => {
                old.into_iter().for_each(|old| self.add(old, ChangeKind::Removed { is_directory }));
                new.into_iter().for_each(|new| self.add_made(new));
            }
        }
        let entry = known.entry(event.entry.as_ref());
        let Some(entry) = entry.or_else(|| known.alone(event.file.as_ref()?)) else { return };
        // Several may come together, which happened in the order of a life.
        if has(libc::FAN_DELETE) {
            self.add(entry.clone(), ChangeKind::Removed { is_directory });
        }
        if has(libc::FAN_CREATE) {
            self.add_made(entry.clone());
        }
        if has(libc::FAN_MODIFY) {
            self.add(entry.clone(), ChangeKind::Written);
        }
        if has(libc::FAN_ATTRIB) {
            self.add(entry, ChangeKind::Attributes);
        }
    }

    fn add(&self, (folder, name): Entry, kind: ChangeKind) {
        self.telling.to.add(Change { folder, name, kind });
    }

    /// Tells of a file that was made, unless it is gone.
    fn add_made(&self, entry: Entry) {
        let root = self.root_path.get().map_or(Path::new(""), PathBuf::as_path);
        if let Ok(attributes) = fs::symlink_metadata(root.join(&entry.0).join(&entry.1)) {
            self.add(entry, ChangeKind::Made { mode: attributes.mode() });
        }
    }

    /// Where something is below the shared directory, if it is told of.
    fn below(&self, path: &Path) -> Option<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.root.as_raw_fd());
        let find = || readlinkat(AT_FDCWD, link.as_str()).map(PathBuf::from).unwrap_or_default();
        let root = self.root_path.get_or_init(find);
        let path = path.strip_prefix(root).ok()?;
        path.starts_with(&self.telling.below).then(|| path.to_owned())
    }
}

impl Known {
    /// A name in a directory that is watched.
    fn entry(&self, entry: Option<&(Handle, &OsStr)>) -> Option<Entry> {
        let (folder, name) = entry?;
        let place = self.places.get(folder).filter(|place| place.is_directory)?;
        Some((place.path.clone(), (*name).to_owned()))
    }

    /// A file that is shared alone.
    fn alone(&self, file: &Handle) -> Option<Entry> {
        let place = self.places.get(file).filter(|place| !place.is_directory)?;
        Some((place.path.parent()?.to_owned(), place.path.file_name()?.to_owned()))
    }
}

fn file_system(path: &Path) -> io::Result<[u8; 8]> {
    let id = statfs(path)?.filesystem_id();
    // SAFETY: the structure is two numbers, and every byte of it is one of an array's.
    Ok(unsafe { std::mem::transmute::<libc::fsid_t, [u8; 8]>(id) })
}

fn handle(file_system: [u8; 8], path: &Path) -> io::Result<Handle> {
    #[repr(C)]
    struct Buffer {
        bytes: u32,
        kind: i32,
        handle: [u8; MAX_HANDLE_BYTES],
    }
    let ask = |flags| {
        let bytes = u32::try_from(MAX_HANDLE_BYTES).expect("it is small");
        let mut buffer = Buffer { bytes, kind: 0, handle: [0; MAX_HANDLE_BYTES] };
        let mut mount = 0;
        let result = path.with_nix_path(|path| {
            // SAFETY: the buffer begins as `file_handle` does, and has as much room behind that as it says;
            // it, the path and `mount` outlive the call.
            Errno::result(unsafe {
                let buffer = (&raw mut buffer).cast();
                libc::name_to_handle_at(
                    libc::AT_FDCWD,
                    path.as_ptr(),
                    buffer,
                    &raw mut mount,
                    flags,
                )
            })
        });
        result?.map(|_| buffer)
    };
    let Buffer { bytes, kind, handle } = match ask(0) {
        Err(Errno::EOPNOTSUPP) => ask(AT_HANDLE_FID)?,
        buffer => buffer?,
    };
    let bytes = handle.get(..bytes as usize).unwrap_or(&handle).to_vec();
    Ok(Handle { file_system, kind, bytes })
}

/// Something that happened (`struct fanotify_event_metadata`).
#[derive(Debug, Default, PartialEq, Eq)]
struct Event<'a> {
    mask: u64,
    pid: i32,
    /// The file.
    file: Option<Handle>,
    /// Its folder and the name in it; or those it had, and those it has.
    entry: Option<(Handle, &'a OsStr)>,
    old: Option<(Handle, &'a OsStr)>,
    new: Option<(Handle, &'a OsStr)>,
}

/// What the kernel wrote to `bytes`.
fn events(mut bytes: &[u8]) -> impl Iterator<Item = Event<'_>> {
    iter::from_fn(move || {
        let length = u32::from_ne_bytes(field(bytes, 0)?) as usize;
        let (event, rest) = bytes.split_at_checked(length)?;
        bytes = rest;
        parse(event)
    })
}

fn parse(bytes: &[u8]) -> Option<Event<'_>> {
    let mask = u64::from_ne_bytes(field(bytes, 8)?);
    let pid = i32::from_ne_bytes(field(bytes, 20)?);
    let mut event = Event { mask, pid, ..Event::default() };
    let mut records = bytes.get(u16::from_ne_bytes(field(bytes, 6)?).into()..)?;
    // `struct fanotify_event_info_fid`, one behind the other.
    while let Some([kind, _]) = field(records, 0) {
        let length = usize::from(u16::from_ne_bytes(field(records, 2)?)).max(1);
        let (record, rest) = records.split_at_checked(length)?;
        records = rest;
        let count = u32::from_ne_bytes(field(record, 12)?) as usize;
        let (handle, name) = record.get(20..)?.split_at_checked(count)?;
        let handle = Handle {
            file_system: field(record, 4)?,
            kind: i32::from_ne_bytes(field(record, 16)?),
            bytes: handle.to_vec(),
        };
        let name = CStr::from_bytes_until_nul(name).map(CStr::to_bytes).unwrap_or_default();
        let entry = (handle, OsStr::from_bytes(name));
        match kind {
            libc::FAN_EVENT_INFO_TYPE_FID => event.file = Some(entry.0),
            libc::FAN_EVENT_INFO_TYPE_DFID_NAME => event.entry = Some(entry),
            libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => event.old = Some(entry),
            libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => event.new = Some(entry),
            _ => {}
        }
    }
    Some(event)
}

fn field<const BYTES: usize>(bytes: &[u8], at: usize) -> Option<[u8; BYTES]> {
    bytes.get(at..)?.first_chunk().copied()
}
