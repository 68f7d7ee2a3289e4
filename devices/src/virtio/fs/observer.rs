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
const MARK: MarkFlags = MarkFlags::FAN_MARK_ADD
    .union(MarkFlags::FAN_MARK_EVICTABLE)
    .union(MarkFlags::FAN_MARK_DONT_FOLLOW);
const UNMARK: MarkFlags = MarkFlags::FAN_MARK_REMOVE.union(MarkFlags::FAN_MARK_DONT_FOLLOW);

/// Most inodes that are watched: all processes of a user share what the kernel has of marks.
const MAX_WATCHED: usize = 4096;

/// Longest handle of a file, in bytes (MAX_HANDLE_SZ of fcntl.h).
const MAX_HANDLE_BYTES: usize = 128;

/// What file systems and kernels say that cannot tell (fanotify_mark(2)).
const CANNOT_TELL: [Errno; 4] = [Errno::EINVAL, Errno::ENODEV, Errno::EOPNOTSUPP, Errno::EXDEV];

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
    /// What the tree calls an inode: several where it is mounted more than once.
    nodes: BTreeMap<Handle, Vec<Node>>,
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

/// Something that is watched, by the tree's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    number: u64,
    is_directory: bool,
}

/// Tells where a node is, for the thread that serves.
type PathOf<'a> = &'a dyn Fn(u64) -> io::Result<PathBuf>;

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

    /// The guest has been told of `node`, which it found in `parent`. To be called by the thread that serves,
    /// as everything but [`Observer::clear`]. File systems that cannot tell, such as those over a network,
    /// are left out.
    pub fn know(&self, parent: u64, node: u64, mode: u32, path: PathOf<'_>) {
        let mut known = self.known();
        let is_directory = mode & libc::S_IFMT == libc::S_IFDIR;
        let is_alone = known.folder == Some(parent);
        let mount = node >> INODE_BITS;
        let is_of_interest = (is_directory || is_alone)
            && known.file_systems.get(&mount) != Some(&None)
            && known.handles.len() < MAX_WATCHED
            && !known.handles.contains_key(&node);
        if !is_of_interest {
            return;
        }
        let Ok(path) = path(node) else { return };
        let Some(below) = self.below(&path) else {
            known.file_systems.insert(mount, None);
            return;
        };
        if below == self.telling.below {
            known.folder = Some(node);
            return;
        }
        let node = Node { number: node, is_directory };
        if let Err(error) = self.watch(&mut known, node, &path) {
            if CANNOT_TELL.contains(&error) {
                known.file_systems.insert(mount, None);
                log::info!("changes of files are not seen at {}: {error}", path.display());
            }
        }
    }

    fn watch(&self, known: &mut Known, node: Node, path: &Path) -> nix::Result<()> {
        let mount = node.number >> INODE_BITS;
        let file_system = match known.file_systems.get(&mount).copied().flatten() {
            Some(file_system) => file_system,
            None => file_system(path)?,
        };
        known.file_systems.insert(mount, Some(file_system));
        let handle = handle(file_system, path)?;
        self.group.mark(MARK, node.told(), AT_FDCWD, Some(path))?;
        known.nodes.entry(handle.clone()).or_default().push(node);
        known.handles.insert(node.number, handle);
        Ok(())
    }

    /// The guest has forgotten `node`.
    pub fn forget(&self, node: u64, path: PathOf<'_>) {
        let mut known = self.known();
        let Some(handle) = known.handles.remove(&node) else { return };
        let Some(nodes) = known.nodes.get_mut(&handle) else { return };
        let forgotten = nodes.iter().position(|known| known.number == node);
        let forgotten = forgotten.map(|place| nodes.swap_remove(place));
        if nodes.is_empty() {
            known.nodes.remove(&handle);
            if let (Some(forgotten), Ok(path)) = (forgotten, path(node)) {
                // What has no name any more loses its mark with the last one that has it open.
                let _ = self.group.mark(UNMARK, forgotten.told(), AT_FDCWD, Some(&path));
            }
        }
    }

    /// The guest has forgotten everything.
    pub fn clear(&self) {
        // The library numbers mounts anew.
        *self.known() = Known::default();
    }

    /// Tells of what happened, if it did. Returns whether there may be more: it is to be called again then, as
    /// nobody is woken up for that.
    pub fn look(&self, path: PathOf<'_>) -> bool {
        let mut buffer = [0; READ_BYTES];
        for _ in 0..READS {
            let Ok(count @ 1..) = nix::unistd::read(&self.group, &mut buffer) else { return false };
            let known = self.known();
            for event in events(&buffer[..count]) {
                self.tell(&known, &event, path);
            }
        }
        true
    }

    fn tell(&self, known: &Known, event: &Event<'_>, path: PathOf<'_>) {
        // What this process does it does for the guest, which knows. The pid of others may be hidden.
        if u32::try_from(event.pid) == Ok(process::id()) {
            return;
        }
        let has = |bit| event.mask & bit != 0;
        let is_directory = has(libc::FAN_ONDIR);
        let entries = |entry: Option<&(Handle, &OsStr)>| -> Vec<Entry> {
            let Some((folder, name)) = entry else { return Vec::new() };
            let folders =
                known.numbers(folder, true).filter_map(|node| self.below(&path(node).ok()?));
            folders.map(|folder| (folder, (*name).to_owned())).collect()
        };
        let (old, new) = (entries(event.old.as_ref()), entries(event.new.as_ref()));
        match (&old[..], &new[..]) {
            ([old], [(folder, name)]) if !is_directory => {
                let (folder, name) = (folder.clone(), name.clone());
                self.add(old.clone(), ChangeKind::Moved { folder, name });
            }
            _ => {
                old.into_iter().for_each(|old| self.add(old, ChangeKind::Removed { is_directory }));
                new.into_iter().for_each(|new| self.add_made(new, is_directory));
            }
        }
        let alone = event.file.iter().flat_map(|file| known.numbers(file, false));
        let alone = alone.filter_map(|node| {
            let path = self.below(&path(node).ok()?)?;
            Some((path.parent()?.to_owned(), path.file_name()?.to_owned()))
        });
        for entry in entries(event.entry.as_ref()).into_iter().chain(alone) {
            self.add_life(&entry, event.mask);
        }
    }

    /// Tells of what happened to one file: several things may come together, and what is there now tells in
    /// which order.
    fn add_life(&self, entry: &Entry, mask: u64) {
        let has = |bit| mask & bit != 0;
        let removed = ChangeKind::Removed { is_directory: has(libc::FAN_ONDIR) };
        let is_gone = has(libc::FAN_DELETE) && self.mode(entry).is_none();
        if has(libc::FAN_DELETE) && !is_gone {
            self.add(entry.clone(), removed.clone());
        }
        if has(libc::FAN_CREATE) {
            self.add_made(entry.clone(), has(libc::FAN_ONDIR));
        }
        if has(libc::FAN_MODIFY) {
            self.add(entry.clone(), ChangeKind::Written);
        }
        if has(libc::FAN_ATTRIB) {
            self.add(entry.clone(), ChangeKind::Attributes);
        }
        if is_gone {
            self.add(entry.clone(), removed);
        }
    }

    fn add(&self, (folder, name): Entry, kind: ChangeKind) {
        self.telling.to.add(Change { folder, name, kind });
    }

    /// Tells of a file that was made, even if it is gone by now.
    fn add_made(&self, entry: Entry, is_directory: bool) {
        let kind = if is_directory { libc::S_IFDIR } else { libc::S_IFREG };
        let mode = self.mode(&entry).unwrap_or(kind);
        self.add(entry, ChangeKind::Made { mode });
    }

    /// `st_mode` of what is there.
    fn mode(&self, (folder, name): &Entry) -> Option<u32> {
        let path = self.root_path.get()?.join(folder).join(name);
        Some(fs::symlink_metadata(path).ok()?.mode())
    }

    /// Where something is below the shared directory, if it is told of.
    fn below(&self, path: &Path) -> Option<PathBuf> {
        let root = self.root_path.get_or_init(|| {
            let link = format!("/proc/self/fd/{}", self.root.as_raw_fd());
            readlinkat(AT_FDCWD, link.as_str()).map(PathBuf::from).unwrap_or_default()
        });
        let path = path.strip_prefix(root).ok()?;
        path.starts_with(&self.telling.below).then(|| path.to_owned())
    }
}

impl Known {
    /// The nodes of a directory or of a file that is shared alone.
    fn numbers(&self, handle: &Handle, is_directory: bool) -> impl Iterator<Item = u64> {
        let nodes = self.nodes.get(handle).into_iter().flatten();
        nodes.filter(move |node| node.is_directory == is_directory).map(|node| node.number)
    }
}

impl Node {
    fn told(self) -> MaskFlags {
        if self.is_directory { OF_DIRECTORY } else { OF_FILE }
    }
}

fn file_system(path: &Path) -> nix::Result<[u8; 8]> {
    let id = statfs(path)?.filesystem_id();
    // SAFETY: the structure is two numbers, and every byte of it is one of an array's.
    Ok(unsafe { std::mem::transmute::<libc::fsid_t, [u8; 8]>(id) })
}

fn handle(file_system: [u8; 8], path: &Path) -> nix::Result<Handle> {
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
