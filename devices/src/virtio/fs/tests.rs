//! The device as a guest's FUSE client sees it, without a VM.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use tempfile::TempDir;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::window::tests::use_up_mappings;
use super::*;
use crate::testing::in_a_child;
use crate::virtio::testing::{Driver, MEMORY_BYTES, NEXT, QUEUE_SIZE, RINGS, memory};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SYMLINK: u32 = 6;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const IOCTL: u32 = 39;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const COPY_FILE_RANGE: u32 = 47;
const SETUPMAPPING: u32 = 48;
const REMOVEMAPPING: u32 = 49;
const TMPFILE: u32 = 51;

const ROOT: u64 = 1;
const REQUESTS: usize = 1;
const ROOM: u32 = 4096;

/// Where a guest sees its window.
const WINDOW: u64 = 8 << 30;

/// A guest that has mounted a directory.
pub(super) struct Guest<'m> {
    pub(super) device: Fs,
    driver: Driver<'m>,
    uid: u32,
    pub(super) gid: u32,
}

/// What came back: the error number, 0 for none, and the bytes behind the header.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) errno: i32,
    pub(super) data: Vec<u8>,
}

impl Answer {
    fn field(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.data[offset..offset + 8].try_into().unwrap())
    }

    /// The node of an answer to a lookup and the like.
    pub(super) fn node(&self) -> u64 {
        assert_eq!(self.errno, 0);
        self.field(0)
    }
}

impl<'m> Guest<'m> {
    fn mount(memory: &'m GuestMemoryMmap, root: impl AsRef<Path>, read_only: bool) -> Self {
        Guest::mount_with(memory, root, Options { read_only, ..Options::default() })
    }

    pub(super) fn mount_with(
        memory: &'m GuestMemoryMmap,
        root: impl AsRef<Path>,
        options: Options,
    ) -> Self {
        let root = root.as_ref();
        let server = Server::with_options(root, options).unwrap();
        let mut device = Fs::new("root", server).with_window_at(WINDOW).unwrap();
        let driver = Driver::with_queues(memory, 2);
        device.activate(driver.activation()).unwrap();
        let about = root.metadata().unwrap();
        let mut guest = Guest { device, driver, uid: about.uid(), gid: about.gid() };
        assert_eq!(guest.init().errno, 0);
        guest
    }

    /// Says hello as Linux 6.1 does, offering every feature of the first word but the second.
    fn init(&mut self) -> Answer {
        self.ask(INIT, ROOT, &[&words(&[7, 38, 0x2_0000, 0x3fff_ffff])])
    }

    fn header(&self, opcode: u32, node: u64, body: usize) -> Vec<u8> {
        let length = u32::try_from(40 + body).unwrap();
        let mut header = words(&[length, opcode, 77, 0]);
        header.extend(node.to_le_bytes());
        header.extend(words(&[self.uid, self.gid, 1, 0]));
        header
    }

    pub(super) fn ask(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Answer {
        let body = body.concat();
        let header = self.header(opcode, node, body.len());
        self.ask_raw(&[&header, &body], &[16, ROOM]).expect("an answer")
    }

    /// Sends anything; `None` if nothing was answered.
    fn ask_raw(&mut self, request: &[&[u8]], room: &[u32]) -> Option<Answer> {
        self.driver.offer(REQUESTS, request, room);
        self.device.queue_ready(REQUESTS).unwrap();
        let answer = self.driver.written(REQUESTS, self.driver.used_of(REQUESTS).len() - 1);
        let (header, data) = answer.split_first_chunk::<16>()?;
        let errno = -i32::from_le_bytes(header[4..8].try_into().unwrap());
        Some(Answer { errno, data: data.to_vec() })
    }

    /// Maps the first slot of the file `node` at `place` in the window.
    fn map(&mut self, node: u64, place: u64, flags: u64) -> Answer {
        let fields = [0, 0, SLOT_BYTES, flags, place].map(u64::to_le_bytes);
        self.ask(SETUPMAPPING, node, &[&fields.concat()])
    }

    /// Forgets that it was ever told of `node`.
    pub(super) fn forget(&mut self, node: u64) {
        let header = self.header(FORGET, node, 8);
        assert!(self.ask_raw(&[&header, &u64::MAX.to_le_bytes()], &[]).is_none());
    }

    fn lookup(&mut self, name: &str) -> Answer {
        self.ask(LOOKUP, ROOT, &[name.as_bytes(), b"\0"])
    }

    fn create(&mut self, name: &str) -> Answer {
        let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
        self.ask(CREATE, ROOT, &[&words(&[flags, 0o644, 0, 0]), name.as_bytes(), b"\0"])
    }

    fn write(&mut self, node: u64, handle: u64, data: &[u8]) -> Answer {
        let size = u32::try_from(data.len()).unwrap();
        let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
        let rest = words(&[0, 0, size, 0, 0, 0, flags, 0]);
        self.ask(WRITE, node, &[&handle.to_le_bytes(), &rest, data])
    }

    fn read(&mut self, node: u64, handle: u64, flags: u32) -> Answer {
        let rest = words(&[0, 0, ROOM, 0, 0, 0, flags, 0]);
        self.ask(READ, node, &[&handle.to_le_bytes(), &rest])
    }

    fn rename(&mut self, from: &str, to: &str) -> Answer {
        let body = [&ROOT.to_le_bytes()[..], &[0; 8]].concat();
        self.ask(RENAME2, ROOT, &[&body, from.as_bytes(), b"\0", to.as_bytes(), b"\0"])
    }
}

pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Where the handle is in the answer to CREATE, behind `struct fuse_entry_out`.
const CREATED_HANDLE: usize = 128;
/// Where the inode number is in `struct fuse_entry_out`.
const ENTRY_INODE: usize = 40;

#[test]
fn the_configuration_space_is_the_tag_and_one_queue() {
    let root = TempDir::new().unwrap();
    let device = Fs::new("root", Server::open(root.path(), false).unwrap());
    let mut config = [0xff; 41];

    device.read_config(0, &mut config);

    assert_eq!(&config[..5], b"root\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0]);
}

#[test]
fn a_directory_that_is_not_there_is_an_error_with_its_name() {
    let error = Server::open("/nowhere/at/all".as_ref(), false).err().unwrap();

    assert!(error.to_string().contains("/nowhere/at/all"));
}

#[test]
fn writes_of_a_mebibyte_are_negotiated_and_write_back_is_not() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);

    let answer = guest.init();

    let word = |at: usize| u32::from_le_bytes(answer.data[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 7);
    assert_eq!(word(20), 1 << 20);
    assert_eq!(word(12) & (1 << 16), 0);
}

#[test]
fn a_file_is_created_written_and_read_back() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);

    let created = guest.create("file");
    let (node, handle) = (created.node(), created.field(CREATED_HANDLE));
    assert_eq!(guest.write(node, handle, b"hello").errno, 0);

    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    assert_eq!(guest.read(node, handle, flags).data, b"hello");
    assert_eq!(fs::read(root.path().join("file")).unwrap(), b"hello");
}

#[test]
fn flags_that_the_host_refuses_leave_a_file_open() {
    let memory = memory();
    // No kernel has direct I/O there.
    let mut guest = Guest::mount(&memory, "/proc/sys/kernel", true);
    let node = guest.lookup("ostype").node();
    let handle = guest.ask(OPEN, node, &[&[0; 8]]).field(0);

    let first = guest.read(node, handle, libc::O_DIRECT as u32);
    let second = guest.read(node, handle, 0);

    assert_eq!((&first.data[..], &second.data[..]), (&b"Linux\n"[..], &b"Linux\n"[..]));
}

#[test]
fn a_lookup_finds_what_the_host_made_meanwhile() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    assert_eq!(guest.lookup("late").errno, libc::ENOENT);

    fs::write(root.path().join("late"), "x").unwrap();
    let entry = guest.lookup("late");

    // A second at most is what the guest may go without asking again.
    assert_eq!((entry.field(16), entry.field(24)), (1, 1));
}

#[test]
fn a_rename_replaces_what_was_there() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    fs::write(root.path().join("old"), "old").unwrap();
    fs::write(root.path().join("new"), "new").unwrap();
    let mut guest = Guest::mount(&memory, &root, false);

    assert_eq!(guest.rename("new", "old").errno, 0);

    assert_eq!(fs::read(root.path().join("old")).unwrap(), b"new");
    assert!(!root.path().join("new").exists());
}

#[test]
fn links_directories_and_attributes_work() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let node = guest.create("file").node();

    assert_eq!(guest.ask(MKDIR, ROOT, &[&words(&[0o755, 0]), b"dir\0"]).errno, 0);
    assert_eq!(guest.ask(LINK, ROOT, &[&node.to_le_bytes(), b"hard\0"]).node(), node);
    assert_eq!(guest.ask(SYMLINK, ROOT, &[b"soft\0file\0"]).errno, 0);
    let set = guest.ask(SETXATTR, node, &[&words(&[3, 0]), b"user.key\0abc"]);
    let get = guest.ask(GETXATTR, node, &[&words(&[100, 0]), b"user.key\0"]);

    assert_eq!(set.errno, 0);
    assert_eq!(get.data, b"abc");
    assert_eq!(fs::metadata(root.path().join("hard")).unwrap().nlink(), 2);
    assert_eq!(fs::read_link(root.path().join("soft")).unwrap().to_str(), Some("file"));
}

#[test]
fn an_inode_is_numbered_like_its_node_wherever_it_is_shown() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    fs::write(root.path().join("file"), "").unwrap();
    let mut guest = Guest::mount(&memory, &root, false);

    let entry = guest.lookup("file");
    let node = entry.node();
    let attributes = guest.ask(GETATTR, node, &[&[0; 16]]);
    let handle = guest.ask(OPENDIR, ROOT, &[&[0; 8]]).field(0);
    let rest = words(&[0, 0, ROOM, 0, 0, 0, 0, 0]);
    let listing = guest.ask(READDIRPLUS, ROOT, &[&handle.to_le_bytes(), &rest]);

    assert_eq!(entry.field(ENTRY_INODE), node);
    assert_eq!(attributes.field(16), node);
    // An entry, and behind it the same number in the list itself.
    assert_eq!((listing.field(0), listing.field(ENTRY_INODE)), (node, node));
    assert_eq!(listing.field(128), node);
}

#[test]
fn a_read_only_directory_refuses_every_change() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    fs::write(root.path().join("file"), "kept").unwrap();
    let mut guest = Guest::mount(&memory, &root, true);
    let node = guest.lookup("file").node();

    let refused = [
        guest.create("other"),
        guest.create("file"),
        guest.rename("file", "other"),
        guest.ask(UNLINK, ROOT, &[b"file\0"]),
        guest.ask(MKDIR, ROOT, &[&words(&[0o755, 0]), b"dir\0"]),
        guest.ask(SYMLINK, ROOT, &[b"soft\0file\0"]),
        guest.ask(LINK, ROOT, &[&node.to_le_bytes(), b"hard\0"]),
        guest.ask(SETXATTR, node, &[&words(&[3, 0]), b"user.key\0abc"]),
        guest.ask(OPEN, node, &[&words(&[libc::O_WRONLY as u32, 0])]),
        guest.ask(OPEN, node, &[&words(&[libc::O_TRUNC as u32, 0])]),
        guest.ask(4, node, &[&[0xff; 88]]),
    ];
    let handle = guest.ask(OPEN, node, &[&[0; 8]]).field(0);
    let written = guest.write(node, handle, b"lost");

    assert!(refused.iter().all(|answer| answer.errno == libc::EROFS), "{refused:?}");
    assert_eq!(written.errno, libc::EROFS);
    assert_eq!(guest.read(node, handle, 0).data, b"kept");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn no_name_leads_out_of_the_directory() {
    let (outside, memory) = (TempDir::new().unwrap(), memory());
    let root = TempDir::new_in(outside.path()).unwrap();
    let mut guest = Guest::mount(&memory, &root, false);

    assert_ne!(guest.lookup("..").errno, 0);
    assert_ne!(guest.lookup("../x").errno, 0);
    assert_ne!(guest.create("../x").errno, 0);
    assert_ne!(guest.create("..").errno, 0);
    assert_ne!(guest.rename("..", "x").errno, 0);
    assert_ne!(guest.ask(MKDIR, ROOT, &[&words(&[0o755, 0]), b"../dir\0"]).errno, 0);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn unknown_nodes_handles_and_operations_are_errors() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);

    assert_eq!(guest.ask(GETATTR, 4711, &[&[0; 16]]).errno, libc::EBADF);
    assert_eq!(guest.read(ROOT, 4711, 0).errno, libc::EBADF);
    assert_eq!(guest.ask(4711, ROOT, &[]).errno, libc::ENOSYS);
}

#[test]
fn requests_that_make_no_sense_are_given_back_unanswered() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let lookup = guest.header(LOOKUP, ROOT, 5);
    let forget = guest.header(BATCH_FORGET, ROOT, 8);
    let too_much = vec![0; 60_000];
    let large: Vec<&[u8]> = (0..20).map(|_| &too_much[..]).collect();

    assert!(guest.ask_raw(&[b"short"], &[16]).is_none());
    assert!(guest.ask_raw(&[&lookup], &[16]).is_none());
    assert!(guest.ask_raw(&[&lookup, b"file\0"], &[]).is_none());
    assert!(guest.ask_raw(&[&lookup, b"file\0"], &[15]).is_none());
    assert!(guest.ask_raw(&[&forget, &words(&[u32::MAX, 0])], &[16]).is_none());
    assert!(guest.ask_raw(&large, &[16]).is_none());
    assert!(guest.ask_raw(&[], &[16, 16]).is_none());

    assert_eq!(guest.lookup("file").errno, libc::ENOENT);
}

#[test]
fn a_request_that_grows_while_it_is_looked_at_costs_the_host_nothing() {
    const LARGE: u32 = 256 << 20;
    const TRIES: usize = 20_000;
    let root = TempDir::new().unwrap();
    let ranges = [(GuestAddress(0), LARGE as usize + MEMORY_BYTES)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let mut guest = Guest::mount(&memory, &root, false);
    let control = [guest.header(IOCTL, ROOT, 32), words(&[0, 0, 0, 0, 0, 0, LARGE, 0])].concat();
    let head = guest.driver.offer(REQUESTS, &[&control, &[0; 8]], &[16]);
    let data = Descriptor::new(MEMORY_BYTES as u64, 8, NEXT, head + 2);
    let grown = Descriptor::new(MEMORY_BYTES as u64, LARGE, NEXT, head + 2);
    let entry = GuestAddress(REQUESTS as u64 * RINGS + u64::from(head + 1) * 16);
    let done = AtomicBool::new(false);

    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                memory.write_obj(data, entry).unwrap();
                memory.write_obj(grown, entry).unwrap();
            }
        });
        for _ in 0..TRIES {
            guest.driver.offer_head(REQUESTS, head);
            guest.device.queue_ready(REQUESTS).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });

    assert!(peak_memory_kib() < LARGE / 1024);
}

/// What this process has had in memory at most.
fn peak_memory_kib() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn an_attribute_of_four_gibibytes_costs_the_host_nothing() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let node = guest.create("file").node();

    let answer = guest.ask(GETXATTR, node, &[&words(&[u32::MAX, 0]), b"user.none\0"]);

    assert_eq!(answer.errno, libc::ENODATA);
}

#[test]
fn a_reset_closes_what_the_guest_had_open() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let created = guest.create("file");
    let (node, handle) = (created.node(), created.field(CREATED_HANDLE));

    guest.device.reset();
    let mut guest = Guest::mount_again(guest, &memory);

    assert_eq!(guest.read(node, handle, 0).errno, libc::EBADF);
    assert_eq!(guest.lookup("file").errno, 0);
}

#[test]
fn a_reset_leaves_it_to_the_devices_thread_to_close_files() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    guest.create("file").node();
    let file = root.path().join("file");
    let is_open = || {
        let open = fs::read_dir("/proc/self/fd").unwrap();
        open.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|name| name == file))
    };

    guest.device.reset();
    assert!(is_open());
    assert!(guest.device.server.woken().read().is_ok());
    guest.device.backend_ready(0, EventSet::IN).unwrap();

    assert!(!is_open());
}

impl<'m> Guest<'m> {
    /// The same device under a driver that starts over.
    fn mount_again(guest: Guest<'_>, memory: &'m GuestMemoryMmap) -> Self {
        let mut device = guest.device;
        memory.write_slice(&[0; 0x2000], GuestAddress(0)).unwrap();
        let driver = Driver::with_queues(memory, 2);
        device.activate(driver.activation()).unwrap();
        let mut guest = Guest { device, driver, uid: guest.uid, gid: guest.gid };
        assert_eq!(guest.init().errno, 0);
        guest
    }
}

#[test]
#[ignore = "needs root"]
fn equal_inodes_of_two_mounts_are_two_nodes() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mounts = ["one", "two"].map(|name| root.path().join(name));
    for mount in &mounts {
        fs::create_dir(mount).unwrap();
        run("mount", &["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), mount.as_os_str()]);
    }
    let inodes = mounts.each_ref().map(|mount| fs::metadata(mount).unwrap().ino());
    let mut guest = Guest::mount(&memory, &root, false);

    let nodes = ["one", "two"].map(|name| guest.lookup(name).node());
    mounts.iter().for_each(|mount| run("umount", &["-l".as_ref(), mount.as_os_str()]));

    assert_eq!(inodes[0], inodes[1]);
    assert_ne!(nodes[0], nodes[1]);
}

fn run(program: &str, arguments: &[&std::ffi::OsStr]) {
    assert!(std::process::Command::new(program).args(arguments).status().unwrap().success());
}

#[test]
#[ignore = "needs root"]
fn a_new_file_belongs_to_the_guests_process_whatever_the_directory_says() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);

    (guest.uid, guest.gid) = (1234, 1234);
    let created = guest.create("file");
    (guest.uid, guest.gid) = (0, 0);
    let other = guest.create("other");

    assert_eq!((created.errno, other.errno), (0, 0));
    assert_eq!(fs::metadata(root.path().join("file")).unwrap().uid(), 1234);
    assert_eq!(fs::metadata(root.path().join("file")).unwrap().gid(), 1234);
    assert_eq!(fs::metadata(root.path().join("other")).unwrap().uid(), 0);
}

/// A guest of a directory with a file of 100 KB, mapped through a window of two slots.
fn with_window<'m>(memory: &'m GuestMemoryMmap, root: &TempDir, read_only: bool) -> Guest<'m> {
    fs::write(root.path().join("file"), [7; 100_000]).unwrap();
    let window = Some(Arc::new(Window::reserve(2 * SLOT_BYTES).unwrap()));
    Guest::mount_with(memory, root, Options { read_only, window, ..Options::default() })
}

#[test]
fn a_window_is_shared_memory_number_0_and_without_one_there_is_none() {
    let (root, memory) = (TempDir::new().unwrap(), memory());

    let with = with_window(&memory, &root, false);
    let regions = [0, 1].map(|id| with.device.shared_memory(id));
    let without = Guest::mount(&memory, &root, false).device.shared_memory(0);

    assert_eq!(regions, [Some(WINDOW..WINDOW + 2 * SLOT_BYTES), None]);
    assert_eq!(without, None);
}

#[test]
fn only_a_large_file_is_to_be_mapped() {
    /// `FUSE_INIT_EXT`, and `FUSE_HAS_INODE_DAX` in the second word (linux/fuse.h).
    const FLAGS: [u32; 2] = [1 << 30, 1 << 1];
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    fs::write(root.path().join("small"), "small").unwrap();

    let hello = words(&[7, 38, 0, FLAGS[0], FLAGS[1], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let init = guest.ask(INIT, ROOT, &[&hello]);
    // `flags` of `struct fuse_attr`, behind the six numbers of `struct fuse_entry_out`.
    let flags = ["file", "small"].map(|name| guest.lookup(name).data[40 + 84]);

    assert_eq!(u32::from_le_bytes(init.data[32..36].try_into().unwrap()) & FLAGS[1], FLAGS[1]);
    assert_eq!(flags, [2, 0]);
}

/// Where the address of the `nth` buffer of the chain is that begins with descriptor `head`.
fn address_of(head: u16, nth: u16) -> GuestAddress {
    let entry = u64::from((head + nth) % QUEUE_SIZE) * 16;
    GuestAddress(REQUESTS as u64 * RINGS + entry)
}

/// Has the guest write 8 bytes of what lies at `place` in its window to a file. Returns the error number and
/// how many were written.
fn write_from_window(guest: &mut Guest<'_>, file: &Answer, place: u64) -> (i32, u64) {
    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    let rest = words(&[0, 0, 8, 0, 0, 0, flags, 0]);
    let header = guest.header(WRITE, file.node(), 48);
    let body = [&file.field(CREATED_HANDLE).to_le_bytes()[..], &rest].concat();
    let head = guest.driver.offer(REQUESTS, &[&header, &body, &[0; 8]], &[16, ROOM]);
    let data = Descriptor::new(WINDOW + place, 8, NEXT, (head + 3) % QUEUE_SIZE);
    guest.driver.write_descriptor(REQUESTS, (head + 2) % QUEUE_SIZE, data);
    guest.device.queue_ready(REQUESTS).unwrap();
    let answer = guest.driver.written(REQUESTS, guest.driver.used_of(REQUESTS).len() - 1);
    let (header, data) = answer.split_first_chunk::<16>().unwrap();
    let errno = -i32::from_le_bytes(header[4..8].try_into().unwrap());
    (errno, if errno == 0 { Answer { errno, data: data.to_vec() }.field(0) } else { 0 })
}

#[test]
fn data_is_written_from_where_another_file_is_mapped_and_nowhere_else() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    let node = guest.lookup("file").node();
    assert_eq!(guest.map(node, SLOT_BYTES, 2).errno, 0);
    let copy = guest.create("copy");

    let written = [SLOT_BYTES, 0].map(|place| write_from_window(&mut guest, &copy, place));

    assert_eq!(written, [(0, 8), (libc::EFAULT, 0)]);
    assert_eq!(fs::read(root.path().join("copy")).unwrap(), [7; 8]);
}

#[test]
fn data_beyond_the_end_of_a_mapped_file_is_an_error_and_no_fault() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    let node = guest.lookup("file").node();
    assert_eq!(guest.map(node, 0, 2).errno, 0);
    let copy = guest.create("copy");

    let beyond = write_from_window(&mut guest, &copy, 1 << 20);
    fs::write(root.path().join("file"), "").unwrap();
    let truncated = write_from_window(&mut guest, &copy, 0);

    assert_eq!([beyond, truncated], [(libc::EFAULT, 0); 2]);
    assert_eq!(guest.lookup("file").node(), node);
}

#[test]
fn of_data_that_leaves_a_mapped_file_what_is_before_moves() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    fs::write(root.path().join("file"), vec![7; 3 << 20]).unwrap();
    let node = guest.lookup("file").node();
    assert_eq!(guest.map(node, 0, 2).errno, 0);
    let copy = guest.create("copy");

    let written = write_from_window(&mut guest, &copy, SLOT_BYTES - 4);

    assert_eq!(written, (0, 4));
    assert_eq!(fs::read(root.path().join("copy")).unwrap(), [7; 4]);
}

/// Has the guest take what is at `place` out of its window.
fn remove(guest: &mut Guest<'_>, place: u64) -> i32 {
    let removal = [&words(&[1])[..], &place.to_le_bytes(), &SLOT_BYTES.to_le_bytes()].concat();
    guest.ask(REMOVEMAPPING, ROOT, &[&removal]).errno
}

#[test]
fn a_mapping_over_a_mapping_replaces_it_and_what_is_not_mapped_can_be_removed() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    fs::write(root.path().join("other"), [8; 100_000]).unwrap();
    let nodes = ["file", "other"].map(|name| guest.lookup(name).node());
    let copy = guest.create("copy");

    let mapped = nodes.map(|node| guest.map(node, 0, 2).errno);
    let written = write_from_window(&mut guest, &copy, 0);
    let removed = [0, 0, SLOT_BYTES, 2 * SLOT_BYTES].map(|place| remove(&mut guest, place));

    assert_eq!(mapped, [0, 0]);
    assert_eq!(written, (0, 8));
    assert_eq!(fs::read(root.path().join("copy")).unwrap(), [8; 8]);
    assert_eq!(removed, [0, 0, 0, libc::EINVAL]);
}

#[test]
fn without_mappings_left_a_guest_with_a_window_gets_errors() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    let node = guest.lookup("file").node();
    assert_eq!(guest.map(node, 0, 2).errno, 0);
    let copy = guest.create("copy");
    assert!(guest.device.server.window().unwrap().patch());

    assert!(in_a_child(|| {
        use_up_mappings(true);
        // As zeros are shown where a file may be from then on.
        let refused = [guest.create("new").errno, guest.map(node, 0, 2).errno];
        refused == [libc::ENOMEM; 2]
            && write_from_window(&mut guest, &copy, 0).0 == libc::ENOMEM
            && guest.ask_raw(&[&guest.header(FORGET, node, 8), &[1; 8]], &[]).is_none()
            && guest.device.server.ledger.getattr(&Context::default(), node, None).is_err()
    }));
    assert!(!root.path().join("new").exists());
}

/// Offers a read of 8 bytes: buffers of header, arguments, header of the answer, data.
fn offer_read(guest: &mut Guest<'_>, file: &Answer) -> u16 {
    let header = guest.header(READ, file.node(), 40);
    let rest = words(&[0, 0, 8, 0, 0, 0, 0, 0]);
    let body = [&file.field(CREATED_HANDLE).to_le_bytes()[..], &rest].concat();
    guest.driver.offer(REQUESTS, &[&header, &body], &[16, 8])
}

#[test]
fn data_is_read_to_where_another_file_is_mapped() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    let node = guest.lookup("file").node();
    assert_eq!(guest.map(node, SLOT_BYTES, 3).errno, 0);
    let source = guest.create("source");
    fs::write(root.path().join("source"), "contents").unwrap();

    for (place, expected) in [(SLOT_BYTES, 0), (0, libc::EFAULT)] {
        let head = offer_read(&mut guest, &source);
        let answer: u64 = memory.read_obj(address_of(head, 2)).unwrap();
        memory.write_obj(WINDOW + place, address_of(head, 3)).unwrap();
        guest.device.queue_ready(REQUESTS).unwrap();
        let error: i32 = memory.read_obj(GuestAddress(answer + 4)).unwrap();
        assert_eq!(-error, expected);
    }

    assert_eq!(fs::read(root.path().join("file")).unwrap()[..8], *b"contents");
}

#[test]
fn nothing_but_data_may_lie_in_the_window() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    let node = guest.lookup("file").node();
    assert_eq!(guest.map(node, SLOT_BYTES, 2).errno, 0);
    let source = guest.create("source");

    // Where nothing is mapped, and where a file is.
    for place in [0, SLOT_BYTES] {
        for nth in 0..3 {
            let head = offer_read(&mut guest, &source);
            memory.write_obj(WINDOW + place, address_of(head, nth)).unwrap();
            guest.device.queue_ready(REQUESTS).unwrap();
            assert_eq!(guest.driver.used_of(REQUESTS).last().unwrap().1, 0, "{nth} at {place:#x}");
        }
    }

    assert_eq!(guest.lookup("file").node(), node);
}

#[test]
fn a_file_is_mapped_as_it_may_be_used_and_taken_away() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, true);
    let node = guest.lookup("file").node();

    let errors = [guest.map(node, 0, 3), guest.map(node, 0, 2), guest.map(ROOT, 0, 2)]
        .map(|answer| answer.errno);
    let removed = remove(&mut guest, 0);

    assert_eq!(errors, [libc::EROFS, 0, libc::ENODEV]);
    assert_eq!(removed, 0);
    assert!(!guest.device.server.window().unwrap().is_used());
}

#[test]
fn a_driver_that_starts_over_finds_its_window_empty() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = with_window(&memory, &root, false);
    let node = guest.lookup("file").node();
    guest.map(node, 0, 2);
    assert!(guest.device.server.window().unwrap().is_used());

    guest.device.reset();
    // The event that wakes the thread up.
    guest.device.backend_ready(0, EventSet::IN).unwrap();

    assert!(!guest.device.server.window().unwrap().is_used());
}

#[test]
fn without_a_window_nothing_is_mapped() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let node = guest.create("file").node();

    assert_eq!(guest.map(node, 0, 2).errno, libc::EINVAL);
}

fn copy(guest: &mut Guest<'_>, from: u64, to: u64) -> Answer {
    let fields = [0, 1, to, 0, 2, 3, 0].map(u64::to_le_bytes);
    guest.ask(COPY_FILE_RANGE, from, &[&fields.concat()])
}

#[test]
fn a_range_is_copied_on_the_host() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    fs::write(root.path().join("from"), "12345").unwrap();
    fs::write(root.path().join("to"), "abc").unwrap();
    let mut guest = Guest::mount(&memory, &root, false);
    let (from, to) = (guest.lookup("from").node(), guest.lookup("to").node());

    let copied = copy(&mut guest, from, to);

    assert_eq!((copied.errno, copied.field(0)), (0, 3));
    assert_eq!(fs::read(root.path().join("to")).unwrap(), b"ab234");
    assert_eq!(copy(&mut guest, from, 4711).errno, libc::EBADF);
}

#[test]
fn a_read_only_directory_takes_no_copy_and_no_file_without_a_name() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    fs::write(root.path().join("file"), "kept").unwrap();
    let mut guest = Guest::mount(&memory, &root, true);
    let node = guest.lookup("file").node();

    assert_eq!(copy(&mut guest, node, node).errno, libc::EROFS);
    assert_eq!(guest.unnamed().errno, libc::EROFS);
    assert_eq!(fs::read(root.path().join("file")).unwrap(), b"kept");
}

impl Guest<'_> {
    fn unnamed(&mut self) -> Answer {
        let flags = libc::O_RDWR as u32;
        self.ask(TMPFILE, ROOT, &[&words(&[flags, 0o666, 0o022, 0]), b"#1\0"])
    }
}

#[test]
fn a_file_without_a_name_is_written_read_and_named() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);

    let made = guest.unnamed();
    let (node, handle) = (made.node(), made.field(CREATED_HANDLE));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    guest.write(node, handle, b"hello");
    let read = guest.read(node, handle, 0).data;
    let linked = guest.ask(LINK, ROOT, &[&node.to_le_bytes(), b"name\0"]);

    assert_eq!(read, b"hello");
    assert_eq!(linked.node(), node);
    assert_eq!(fs::read(root.path().join("name")).unwrap(), b"hello");
    assert_eq!(fs::metadata(root.path().join("name")).unwrap().mode() & 0o7777, 0o644);
    assert_eq!(guest.lookup("name").errno, 0);
}

#[test]
fn a_file_without_a_name_is_gone_when_it_is_forgotten_and_closed() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let made = guest.unnamed();
    let (node, handle) = (made.node(), made.field(CREATED_HANDLE));

    let forget = guest.header(2, node, 8);
    assert!(guest.ask_raw(&[&forget, &1_u64.to_le_bytes()], &[]).is_none());
    let attributes = guest.ask(GETATTR, node, &[&[0; 16]]);
    let still_open = guest.write(node, handle, b"x");
    let body = [&handle.to_le_bytes()[..], &[0; 16]].concat();
    let released = guest.ask(18, node, &[&body]);

    assert_eq!((attributes.errno, still_open.errno), (libc::EBADF, 0));
    assert_eq!(released.errno, 0);
    assert_eq!(guest.write(node, handle, b"x").errno, libc::EBADF);
}

#[test]
fn what_is_cached_is_believed_for_as_long_as_it_was_chosen() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    fs::write(root.path().join("file"), "x").unwrap();
    let seconds = [Cache::Never, Cache::Auto, Cache::Always].map(|cache| {
        let memory = memory.clone();
        memory.write_slice(&[0; 0x2000], GuestAddress(0)).unwrap();
        let options = Options { cache, ..Options::default() };
        Guest::mount_with(&memory, &root, options).lookup("file").field(16)
    });

    assert_eq!(seconds, [0, 1, 24 * 60 * 60]);
}

#[test]
fn writes_are_kept_back_if_it_was_chosen() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let options = Options { writeback: true, ..Options::default() };
    let mut guest = Guest::mount_with(&memory, &root, options);

    let answer = guest.init();

    assert_ne!(u32::from_le_bytes(answer.data[12..16].try_into().unwrap()) & (1 << 16), 0);
}

/// The same guest with another device on `root`.
fn handed_over<'m>(mut guest: Guest<'m>, root: &Path) -> Guest<'m> {
    let mut device = Fs::new("root", Server::open(root, false).unwrap());
    guest.driver.hand_over(0, &mut guest.device, &mut device);
    guest.device = device;
    guest
}

const READ_WRITE: u32 = (libc::O_RDWR | libc::O_CREAT) as u32;

#[test]
fn what_the_guest_had_open_goes_on_with_a_device_built_anew() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    fs::create_dir_all(root.path().join("deep/er")).unwrap();
    let mut guest = Guest::mount(&memory, &root, false);
    let created = guest.create("file");
    let (node, handle) = (created.node(), created.field(CREATED_HANDLE));
    guest.write(node, handle, b"hello");
    let deep = guest.lookup("deep").node();
    let deeper = guest.ask(LOOKUP, deep, &[b"er\0"]).node();
    let listing = guest.ask(OPENDIR, deep, &[&[0; 8]]).field(0);
    guest.rename("file", "renamed");

    let mut guest = handed_over(guest, root.path());

    assert_eq!(guest.read(node, handle, READ_WRITE).data, b"hello");
    assert_eq!(guest.write(node, handle, b"HELL").errno, 0);
    assert_eq!(fs::read(root.path().join("renamed")).unwrap(), b"HELLo");
    assert_eq!(guest.lookup("renamed").node(), node);
    assert_eq!(guest.ask(GETATTR, deeper, &[&[0; 16]]).field(16), deeper);
    let rest = words(&[0, 0, ROOM, 0, 0, 0, 0, 0]);
    let entries = guest.ask(READDIRPLUS, deep, &[&listing.to_le_bytes(), &rest]);
    assert_eq!(entries.field(0), deeper);
    let other = guest.create("other");
    assert!(other.field(CREATED_HANDLE) > handle);
    assert_eq!(guest.write(other.node(), other.field(CREATED_HANDLE), b"x").errno, 0);
}

#[test]
fn what_a_driver_that_is_gone_had_open_is_not_taken_over() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let created = guest.create("file");
    let mut device = Fs::new("root", Server::open(root.path(), false).unwrap());

    guest.device.reset();
    device.restore(&guest.device.save()).unwrap();
    guest.device = device;
    let mut guest = Guest::mount_again(guest, &memory);

    let (node, handle) = (created.node(), created.field(CREATED_HANDLE));
    assert_eq!(guest.read(node, handle, READ_WRITE).errno, libc::EBADF);
}

#[test]
fn a_file_that_is_gone_is_stale_for_a_guest_that_knew_it() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut guest = Guest::mount(&memory, &root, false);
    let gone = guest.create("gone");
    let changed = guest.create("changed");
    guest.ask(UNLINK, ROOT, &[b"gone\0"]);
    let mut device = Fs::new("root", Server::open(root.path(), false).unwrap());
    let positions = guest.device.quiesce().unwrap();
    let state = guest.device.save();
    fs::remove_file(root.path().join("changed")).unwrap();
    fs::create_dir(root.path().join("changed")).unwrap();
    device.activate(guest.driver.activation_at(0, &positions)).unwrap();
    device.restore(&state).unwrap();
    guest.device = device;

    for file in [gone, changed] {
        let (node, handle) = (file.node(), file.field(CREATED_HANDLE));
        assert_eq!(guest.read(node, handle, READ_WRITE).errno, libc::ESTALE);
        assert_eq!(guest.ask(GETATTR, node, &[&[0; 16]]).errno, libc::ESTALE);
    }
    assert_ne!(guest.lookup("changed").errno, libc::ESTALE);
}

#[test]
fn a_copy_of_the_directory_does_as_well() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let copy = TempDir::new().unwrap();
    fs::write(root.path().join("file"), "old").unwrap();
    // In another order, so that the numbers are others.
    fs::write(copy.path().join("another"), "another").unwrap();
    fs::write(copy.path().join("file"), "new").unwrap();
    let mut guest = Guest::mount(&memory, &root, false);
    let node = guest.lookup("file").node();
    let handle = guest.ask(OPEN, node, &[&words(&[libc::O_RDONLY as u32, 0])]).field(0);

    let mut guest = handed_over(guest, copy.path());

    assert_eq!(guest.read(node, handle, 0).data, b"new");
    assert_eq!(guest.lookup("file").node(), node);
    let another = guest.lookup("another").node();
    assert_ne!(another, node);
    let forget = words(&[1, 0]);
    let one = [&node.to_le_bytes()[..], &2u64.to_le_bytes()].concat();
    let header = guest.header(BATCH_FORGET, 0, forget.len() + one.len());
    assert!(guest.ask_raw(&[&header, &forget, &one], &[]).is_none());
    assert_eq!(guest.ask(GETATTR, node, &[&[0; 16]]).errno, libc::EBADF);
    assert_eq!(guest.lookup("file").errno, 0);
}

#[test]
fn a_directory_that_was_not_mounted_is_mounted_later() {
    let (root, memory) = (TempDir::new().unwrap(), memory());
    let mut device = Fs::new("root", Server::open(root.path(), false).unwrap());
    let driver = Driver::with_queues(&memory, 2);
    device.activate(driver.activation()).unwrap();
    let uid = root.path().metadata().unwrap().uid();

    let mut guest = handed_over(Guest { device, driver, uid, gid: uid }, root.path());

    assert_eq!(guest.init().errno, 0);
    assert_eq!(guest.create("file").errno, 0);
}

/// Forgets `node`, which the guest was told of once, without a kick.
fn offer_forget(guest: &Guest<'_>, node: u64) {
    let body = 1u64.to_le_bytes();
    guest.driver.offer(URGENT, &[&guest.header(FORGET, node, body.len()), &body], &[]);
}

#[test]
fn what_is_forgotten_without_a_kick_is_forgotten_soon() {
    const TIMER: usize = 1;
    let memory = memory();
    let folder = TempDir::new().unwrap();
    for name in ["a", "b"] {
        fs::write(folder.path().join(name), name).unwrap();
    }
    let server = Server::open(folder.path(), false).unwrap();
    let device = Fs::new("root", server).with_deferred_forgetting().unwrap();
    let driver = Driver::with_queues(&memory, 2).and_event_index();
    let uid = folder.path().metadata().unwrap().uid();
    let mut guest = Guest { device, driver, uid, gid: uid };
    guest.device.activate(guest.driver.activation()).unwrap();
    guest.init();
    let nodes = [&b"a\0"[..], b"b\0"].map(|name| guest.ask(LOOKUP, ROOT, &[name]).node());

    offer_forget(&guest, nodes[0]);
    guest.device.queue_ready(URGENT).unwrap();
    assert_eq!(guest.driver.kick_entry(URGENT), forgetting::KICK_AT);

    offer_forget(&guest, nodes[1]);
    let mut ready =
        libc::pollfd { fd: guest.device.backends()[TIMER].fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: `ready` is one descriptor, which the device keeps open.
    assert_eq!(unsafe { libc::poll(&raw mut ready, 1, 10_000) }, 1);
    guest.device.backend_ready(TIMER, EventSet::IN).unwrap();
    assert_eq!(guest.driver.used_of(URGENT).len(), 2);
    assert_eq!(guest.ask(GETATTR, nodes[1], &[&[0; 16]]).errno, libc::EBADF);

    // Nothing came since, so the next kick is wanted.
    guest.device.backend_ready(TIMER, EventSet::IN).unwrap();
    assert_eq!(guest.driver.kick_entry(URGENT), 2);
}

#[test]
#[ignore = "needs CAP_SYS_RESOURCE"]
fn sixty_four_ki_files_are_open_at_once() {
    const FILES: usize = 1024;
    const TIMES: usize = 64;
    raise_file_limit().unwrap();
    let folder = TempDir::new().unwrap();
    let server = Server::open(folder.path(), false).unwrap();
    let context = Context::default();
    let open_here = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open_here();

    let mut handles = Vec::new();
    for name in (0..FILES).map(|file| file.to_string()) {
        fs::write(folder.path().join(&name), &name).unwrap();
        let name = CString::new(name).unwrap();
        let node = server.ledger.lookup(&context, ROOT, &name).unwrap().inode;
        for _ in 0..TIMES {
            let (handle, ..) = server.ledger.open(&context, node, 0, 0).unwrap();
            handles.push((node, handle.unwrap()));
        }
    }

    assert!(open_here() >= before + FILES + FILES * TIMES);
    for &(node, handle) in &handles {
        server.ledger.release(&context, node, 0, handle, false, false, None).unwrap();
    }
    server.reset();
    assert!(open_here() < before + FILES);
}
