//! The file system device: FUSE requests that lie, against a directory nothing else is in reach of.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::thread;

use devices::virtio::fs::{Fs, Server};
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

/// The queue for ordinary requests.
const REQUESTS: u8 = 1;

/// Operations (linux/fuse.h).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;

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
    let server = Server::open(Path::new(SHARE), variant & READ_ONLY != 0).expect("it is there");
    let mut guest = Guest::new(Fs::new("share", server), Box::new(|_, _| ()));
    guest.play(data);
    let answer = guest.ask(REQUESTS, &init(), 256).expect("an answer");
    assert!(answer.len() > 16, "a guest that starts over can mount: {answer:?}");
    drop(guest);
    let outside = fs::read(OUTSIDE).expect("nobody has removed it");
    assert_eq!(outside, SECRET, "the guest wrote outside of its directory");
    assert_eq!(fs::read_dir("/").expect("the root").count(), 3, "the guest made something outside");
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
    let read_write = 2;
    let read =
        |operation, handle| fuse(operation, 1, &words(&[handle, 0, 0, 0, 4096, 0, 0, 0, 0, 0]));
    let names = [
        fuse(LOOKUP, 1, b"a\0"),
        fuse(LOOKUP, 1, b"l\0"),
        fuse(LOOKUP, 1, b"..\0"),
        fuse(LOOKUP, 1, b"b/c\0"),
        fuse(LOOKUP, 1, b"no end"),
        fuse(MKDIR, 1, &named(&[0o755, 0o22], "d\0")),
        fuse(SYMLINK, 1, b"s\0/outside\0"),
        fuse(MKNOD, 1, &named(&[0o20666, 0x101, 0, 0], "m\0")),
        fuse(RENAME2, 1, &named(&[1, 0, 0, 0], "a\0z\0")),
        fuse(UNLINK, 1, b"z\0"),
        fuse(GETXATTR, 1, &named(&[u32::MAX, 0], "user.x\0")),
    ];
    let files = [
        fuse(CREATE, 1, &named(&[read_write | 0o100, 0o644, 0, 0], "n\0")),
        fuse(WRITE, 1, &[words(&[0, 0, 0, 0, 4, 0, 0, 0, 0, 0]), b"data".to_vec()].concat()),
        fuse(OPENDIR, 1, &words(&[0, 0])),
        read(READ, 0),
        read(READDIR, 1),
        read(READDIRPLUS, 1),
        fuse(FALLOCATE, 1, &words(&[0, 0, 0, 0, u32::MAX, u32::MAX, 0, 0])),
        fuse(LSEEK, 1, &words(&[0, 0, u32::MAX, u32::MAX, 4, 0])),
        fuse(GETATTR, 1, &words(&[0, 0, 0, 0])),
        fuse(SETATTR, 1, &[0xff; 88]),
        fuse(OPEN, 1, &words(&[read_write, 0])),
    ];
    let lies = [
        fuse(BATCH_FORGET, 0, &words(&[u32::MAX, 0, 1, 0, u32::MAX, u32::MAX])),
        fuse(FORGET, 1, &words(&[u32::MAX, u32::MAX])),
        fuse(WRITE, 1, &words(&[0, 0, u32::MAX, u32::MAX, u32::MAX, 0, 0, 0, 0, 0])),
        fuse(4096, 1, b"no such request"),
        words(&[u32::MAX, INIT, 7, 0, 1, 0, 0, 0, 1, 0]),
        words(&[1, LOOKUP]),
        fuse(READ, u32::MAX, &words(&[0, 0, 0, 0, u32::MAX, 0, 0, 0, 0, 0])),
    ];
    vec![
        ("names", session(0, &names)),
        ("files", session(0, &files)),
        ("lies", session(0, &lies)),
        ("read_only", session(READ_ONLY, &[&names[..], &files].concat())),
        ("broken_rings", [vec![0], input(&broken_rings(REQUESTS))].concat()),
    ]
}
