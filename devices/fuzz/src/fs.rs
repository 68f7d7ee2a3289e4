//! The file system device: FUSE requests that lie, against a directory nothing else is in reach of.

mod window;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use devices::virtio::fs::{Changes, Fs, Options, Server, Telling, Window};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot};

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, Step, broken_rings, input, request, variant, words};

/// The shared directory, and what lies beside it and must stay as it is.
const SHARE: &str = "/share";
const OUTSIDE: &str = "/outside";
const SECRET: &[u8] = b"nothing the guest may see or change";

/// What the first byte of an input chooses.
const READ_ONLY: u8 = 1;
const TELLING: u8 = 2;
const WINDOW: u8 = 4;

/// The groups in whose names the guest repeats what others changed, if the host tells it.
const FIRST_GROUP: u32 = 4;

/// The queue for ordinary requests.
const REQUESTS: u8 = 1;

/// Operations (linux/fuse.h).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;

/// The thread that has the directory, its inputs and its answers.
struct Worker {
    inputs: Sender<Vec<u8>>,
    done: Receiver<()>,
}

/// Plays `data`, whose first byte chooses how the directory is shared, in a thread that sees an empty
/// file system of a few megabytes as its root: a guest that gets out of the shared directory, or fills
/// it, does no harm.
pub fn run(data: &[u8]) {
    static WORKER: OnceLock<Mutex<Worker>> = OnceLock::new();
    let worker = WORKER.get_or_init(|| Mutex::new(start())).lock().expect("no input has failed");
    worker.inputs.send(data.to_vec()).expect("the thread waits for it");
    worker.done.recv().expect("the thread has played it");
}

fn start() -> Worker {
    let (inputs, received) = channel::<Vec<u8>>();
    let (answers, done) = channel();
    thread::spawn(move || {
        move_away();
        for input in received {
            play(&input);
            if answers.send(()).is_err() {
                return;
            }
        }
    });
    Worker { inputs, done }
}

/// Gives this thread a root of its own; the process must be root. Devices on it cannot be opened.
fn move_away() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("a mount namespace; be root");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("a private tree");
    let root = std::env::temp_dir();
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(none, &root, Some("tmpfs"), flags, Some("size=8m,nr_inodes=4k")).expect("an empty tree");
    let proc = root.join("proc");
    fs::create_dir(&proc).expect("room in an empty tree");
    mount(Some("/proc"), &proc, none, MsFlags::MS_BIND, none).expect("the library needs /proc");
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags;
    mount(none, &proc, none, read_only, none).expect("a /proc that nobody writes to");
    chroot(&root).expect("a root of its own");
    chdir("/").expect("the new root");
    fs::write(OUTSIDE, SECRET).expect("room in an empty tree");
}

/// A new directory with a file, a directory, a link out of it and a pipe.
fn fill() {
    if Path::new(SHARE).exists() {
        fs::remove_dir_all(SHARE).expect("the last input's files can be removed");
    }
    let share = Path::new(SHARE);
    fs::create_dir_all(share.join("b")).expect("room in an empty tree");
    fs::write(share.join("a"), [7; 5000]).expect("room in an empty tree");
    fs::write(share.join("b/c"), "c").expect("room in an empty tree");
    symlink(OUTSIDE, share.join("l")).expect("room in an empty tree");
    let mode = nix::sys::stat::Mode::S_IRWXU;
    nix::unistd::mkfifo(&share.join("p"), mode).expect("room in an empty tree");
}

fn play(data: &[u8]) {
    let Some((&variant, data)) = data.split_first() else { return };
    fill();
    let telling = || {
        let to = Arc::new(Changes::new().expect("the process has descriptors left"));
        Telling { below: "b".into(), first_group: FIRST_GROUP, to }
    };
    let read_only = variant & READ_ONLY != 0;
    let telling = (variant & TELLING != 0).then(telling);
    let window =
        || Arc::new(Window::reserve(window::BYTES).expect("the process has addresses left"));
    let window = (variant & WINDOW != 0).then(window);
    let options = Options { read_only, telling, window: window.clone(), ..Options::default() };
    let server = Server::with_options(Path::new(SHARE), options).expect("it is there");
    let device = Fs::new("share", server)
        .with_window_at(window::START)
        .and_then(Fs::with_deferred_forgetting)
        .expect("the host has a timer");
    let mut guest = Guest::new(device, window::host(window.clone()));
    let nodes = look_around(&mut guest);
    guest.patch(Box::new(move |request| name_nodes(request, &nodes)));
    guest.play(data);
    let answer = guest.ask(REQUESTS, &init(), 256).expect("an answer");
    assert!(answer.len() > 16, "a guest that starts over can mount: {answer:?}");
    let is_empty =
        |window: &Arc<Window>| window::mappings(window).iter().all(|maps| maps.contains("---p"));
    assert!(window.as_ref().is_none_or(is_empty), "what is mapped stays when a guest starts over");
    drop(guest);
    let outside = fs::read(OUTSIDE).expect("nobody has removed it");
    assert_eq!(outside, SECRET, "the guest wrote outside of its directory");
    assert_eq!(fs::read_dir("/").expect("the root").count(), 3, "the guest made something outside");
}

/// The numbers of the nodes of [`fill`], which stay the same. The guest forgets that it knows them when
/// it starts over.
fn look_around(guest: &mut Guest) -> [[u8; 8]; 5] {
    guest.restart();
    guest.ask(REQUESTS, &init(), 256).expect("an answer");
    let [a, b, link, pipe] =
        ["a\0", "b\0", "l\0", "p\0"].map(|name| find(guest, &fuse(LOOKUP, 1, name.as_bytes())));
    let mut inner = fuse(LOOKUP, 1, b"c\0");
    inner[16..24].copy_from_slice(&b);
    [a, b, find(guest, &inner), link, pipe]
}

/// The node that a lookup finds.
fn find(guest: &mut Guest, lookup: &[u8]) -> [u8; 8] {
    let answer = guest.ask(REQUESTS, lookup, 256).expect("an answer");
    *answer[16..].first_chunk().expect("the answer begins with the node")
}

/// Puts the number of a real node for each that a script names: 2 is the first of `nodes`, and so on.
fn name_nodes(request: &mut [u8], nodes: &[[u8; 8]]) {
    let operation = request.get(4..8).map_or(0, |bytes| u32::from(bytes[0]));
    // Those have a second one behind the header.
    let second = match operation {
        RENAME | LINK | RENAME2 => Some(40),
        COPY_FILE_RANGE => Some(56),
        _ => None,
    };
    for place in [Some(16), second].into_iter().flatten() {
        let Some(field) = request.get_mut(place..place + 8) else { return };
        let [number, 0, 0, 0, 0, 0, 0, 0] = *field else { continue };
        if let Some(node) = usize::from(number).checked_sub(2).and_then(|nth| nodes.get(nth)) {
            field.copy_from_slice(node);
        }
    }
}

/// A request as Linux makes it, by root.
fn fuse(operation: u32, node: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).expect("requests here are short");
    [&words(&[length, operation, 7, 0, node, 0, 0, 0, 1, 0]), body].concat()
}

fn init() -> Vec<u8> {
    fuse(INIT, 1, &words(&[7, 38, 0x2_0000, 0x3fff_ffff]))
}

/// `numbers` in front of `name`.
fn named(numbers: &[u32], name: &str) -> Vec<u8> {
    [&words(numbers), name.as_bytes()].concat()
}

/// A guest that mounts the directory and sends `requests`.
fn session(variant: u8, requests: &[Vec<u8>]) -> Vec<u8> {
    let init = init();
    let ask = |bytes| request(REQUESTS, 40, bytes, [16, 4096]);
    let steps: Vec<Step<'_>> =
        [START, ask(&init)].into_iter().chain(requests.iter().map(|bytes| ask(bytes))).collect();
    self::variant(variant, &steps)
}

/// Requests of many kinds, and some that lie about lengths, nodes and names.
pub fn seeds() -> Vec<Seed> {
    let all = [names(), files()].concat();
    let rings = input(&broken_rings(REQUESTS));
    vec![
        ("names", session(0, &names())),
        ("files", session(0, &files())),
        ("lies", session(0, &lies())),
        ("read_only", session(READ_ONLY, &all)),
        ("repeats", session(TELLING, &repeats())),
        ("window_data", window::data()),
        ("window_headers", window::headers()),
        ("window_lengths", window::lengths()),
        ("window_lies", session(WINDOW, &window::lies())),
        ("broken_rings", [vec![0], rings].concat()),
    ]
}

/// What changes a directory, and names that lead elsewhere.
fn names() -> Vec<Vec<u8>> {
    vec![
        fuse(LOOKUP, 1, b"a\0"),
        fuse(LOOKUP, 1, b"b\0"),
        fuse(LOOKUP, 3, b"c\0"),
        fuse(LOOKUP, 1, b"l\0"),
        fuse(LOOKUP, 1, b"..\0"),
        fuse(LOOKUP, 1, b"b/c\0"),
        fuse(LOOKUP, 1, b"no end"),
        fuse(READLINK, 5, b""),
        fuse(OPEN, 5, &words(&[0, 0])),
        fuse(MKDIR, 1, &named(&[0o755, 0o22], "d\0")),
        fuse(SYMLINK, 1, b"s\0/outside\0"),
        fuse(MKNOD, 1, &named(&[0o20666, 0x101, 0, 0], "m\0")),
        fuse(LINK, 1, &named(&[2, 0], "h\0")),
        fuse(RENAME2, 1, &named(&[3, 0, 0, 0], "a\0z\0")),
        fuse(RENAME, 1, &named(&[3, 0], "b\0../z\0")),
        fuse(UNLINK, 3, b"z\0"),
        fuse(SETXATTR, 2, &[words(&[1, 0]), b"trusted.x\0y".to_vec()].concat()),
        fuse(GETXATTR, 2, &named(&[u32::MAX, 0], "trusted.x\0")),
        fuse(LISTXATTR, 2, &words(&[u32::MAX, 0])),
    ]
}

/// What says that others changed files, true or not, in the name of each group.
fn repeats() -> Vec<Vec<u8>> {
    let all = [names(), files()].concat();
    let in_group = |(mut request, group): (Vec<u8>, u32)| {
        request[28..32].copy_from_slice(&group.to_le_bytes());
        request
    };
    all.into_iter().zip((FIRST_GROUP..FIRST_GROUP + 4).cycle()).map(in_group).collect()
}

/// What opens, reads and writes files. A device gives its handles out from 1 on.
fn files() -> Vec<Vec<u8>> {
    let read_write = 2;
    let at = |handle, offset, size| words(&[handle, 0, offset, 0, size, 0, 0, 0, 0, 0]);
    vec![
        fuse(LOOKUP, 1, b"a\0"),
        fuse(LOOKUP, 1, b"p\0"),
        fuse(OPEN, 2, &words(&[read_write, 0])),
        fuse(READ, 2, &at(1, 4990, 4096)),
        fuse(WRITE, 2, &[at(1, 4999, 4), b"data".to_vec()].concat()),
        fuse(FALLOCATE, 2, &words(&[1, 0, 0, 0, u32::MAX, u32::MAX, 0, 0])),
        fuse(FALLOCATE, 2, &words(&[1, 0, 0, 0, 8192, 0, 0, 0])),
        fuse(LSEEK, 2, &words(&[1, 0, u32::MAX, u32::MAX, 4, 0])),
        fuse(FSYNC, 2, &words(&[1, 0, 0, 0])),
        fuse(FLUSH, 2, &words(&[1, 0, 0, 0, 0, 0])),
        fuse(OPENDIR, 1, &words(&[0, 0])),
        fuse(READDIR, 1, &at(2, 0, 4096)),
        fuse(READDIRPLUS, 1, &at(2, 1, u32::MAX)),
        fuse(CREATE, 1, &named(&[read_write | 0o100, 0o644, 0, 0], "n\0")),
        fuse(OPEN, 6, &words(&[read_write, 0])),
        fuse(GETATTR, 2, &words(&[0, 0, 0, 0])),
        fuse(SETATTR, 2, &[0xff; 88]),
        fuse(STATFS, 1, b""),
        fuse(RELEASE, 2, &words(&[1, 0, 0, 0, 0, 0])),
        fuse(RELEASE, 2, &words(&[1, 0, 0, 0, 0, 0])),
    ]
}

fn lies() -> Vec<Vec<u8>> {
    let everything = words(&[u32::MAX, u32::MAX]);
    vec![
        fuse(LOOKUP, 1, b"a\0"),
        fuse(BATCH_FORGET, 0, &words(&[u32::MAX, 0, 1, 0, u32::MAX, u32::MAX])),
        fuse(FORGET, 2, &everything),
        fuse(GETATTR, 2, &words(&[0, 0, 0, 0])),
        fuse(WRITE, 1, &words(&[0, 0, u32::MAX, u32::MAX, u32::MAX, 0, 0, 0, 0, 0])),
        fuse(4096, 1, b"no such request"),
        words(&[u32::MAX, INIT, 7, 0, 1, 0, 0, 0, 1, 0]),
        words(&[1, LOOKUP]),
        fuse(READ, u32::MAX, &words(&[0, 0, 0, 0, u32::MAX, 0, 0, 0, 0, 0])),
        fuse(FORGET, 1, &everything),
        fuse(DESTROY, 0, b""),
        fuse(LOOKUP, 1, b"a\0"),
    ]
}
