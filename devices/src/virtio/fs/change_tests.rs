//! Changes that others make, as the host hears of them, and as a guest repeats them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use event_manager::EventSet;
use tempfile::TempDir;
use vm_memory::GuestMemoryMmap;

use super::changes::{Change, ChangeKind, Changes, Telling};
use super::tests::{Answer, Guest, words};
use super::{Options, VirtioDevice};
use crate::virtio::testing::memory;

const LOOKUP: u32 = 1;
const SETATTR: u32 = 4;
const MKNOD: u32 = 8;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const OPEN: u32 = 14;
const WRITE: u32 = 16;

const ROOT: u64 = 1;

const TOUCH: u32 = 0xffff_f000;
const MAKE: u32 = TOUCH + 1;
const REMOVE: u32 = TOUCH + 2;

/// A guest of a folder whose part `told` is told of. Not on overlayfs, which many kernels cannot tell of.
struct Told<'m> {
    root: TempDir,
    guest: Guest<'m>,
    changes: Arc<Changes>,
}

impl<'m> Told<'m> {
    fn new(memory: &'m GuestMemoryMmap) -> Self {
        let root = TempDir::new_in("/dev/shm").unwrap();
        fs::create_dir_all(root.path().join("told/folder")).unwrap();
        fs::create_dir(root.path().join("untold")).unwrap();
        fs::write(root.path().join("told/file"), "one").unwrap();
        let changes = Arc::new(Changes::new().unwrap());
        let telling = Telling { below: "told".into(), first_group: TOUCH, to: changes.clone() };
        let options = Options { telling: Some(telling), ..Options::default() };
        let guest = Guest::mount_with(memory, &root, options);
        assert!(guest.device.server.observer().is_some(), "this host's kernel can tell");
        Told { root, guest, changes }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Answer {
        self.guest.ask(LOOKUP, parent, &[name.as_bytes(), b"\0"])
    }

    /// The node of a folder that the guest finds.
    fn find(&mut self, path: &str) -> u64 {
        path.split('/').fold(ROOT, |parent, name| self.lookup(parent, name).node())
    }

    /// What somebody else does, and what is told of it.
    fn other(&mut self, script: &str) -> Vec<(String, String, ChangeKind)> {
        let mut shell = Command::new("sh");
        let done = shell.args(["-ec", script]).current_dir(self.root.path()).status().unwrap();
        assert!(done.success());
        self.told()
    }

    fn told(&mut self) -> Vec<(String, String, ChangeKind)> {
        let device = &mut self.guest.device;
        let woken = 0;
        let mut next = device.backends().len() - 1;
        loop {
            device.backend_ready(next, EventSet::IN).unwrap();
            next = woken;
            if device.server.woken().read().is_err() {
                break;
            }
        }
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let plain = |Change { folder, name, kind }| (text(&folder), text(name.as_ref()), kind);
        self.changes.take().into_iter().map(plain).collect()
    }

    /// Asks as one of the groups that only repeat.
    fn repeat(&mut self, group: u32, opcode: u32, node: u64, body: &[&[u8]]) -> Answer {
        let own = std::mem::replace(&mut self.guest.gid, group);
        let answer = self.guest.ask(opcode, node, body);
        self.guest.gid = own;
        answer
    }
}

fn at(folder: &str, name: &str, kind: ChangeKind) -> (String, String, ChangeKind) {
    (folder.into(), name.into(), kind)
}

#[test]
fn changes_in_a_folder_that_the_guest_knows_are_told() {
    let memory = memory();
    let mut told = Told::new(&memory);
    told.find("told/folder");

    let changes = told.other("umask 022; echo x > told/folder/new");
    let folder = "told/folder";
    let made = at(folder, "new", ChangeKind::Made { mode: libc::S_IFREG | 0o644 });
    assert_eq!(changes, [made, at(folder, "new", ChangeKind::Written)]);

    let changes = told.other("chmod 600 told/folder/new");
    assert_eq!(changes, [at(folder, "new", ChangeKind::Attributes)]);

    let changes = told.other("mv told/folder/new told/folder/old");
    let (to, name) = (folder.into(), "old".into());
    assert_eq!(changes, [at(folder, "new", ChangeKind::Moved { folder: to, name })]);

    let changes = told.other("rm told/folder/old");
    assert_eq!(changes, [at(folder, "old", ChangeKind::Removed { is_directory: false })]);
}

#[test]
fn folders_come_and_go() {
    let memory = memory();
    let mut told = Told::new(&memory);
    told.find("told/folder");

    let changes = told.other("umask 022; mkdir told/folder/d");
    let made = ChangeKind::Made { mode: libc::S_IFDIR | 0o755 };
    assert_eq!(changes, [at("told/folder", "d", made.clone())]);

    let changes = told.other("mv told/folder/d told/folder/e; mv told/folder/e .; rmdir e");
    let made = at("told/folder", "e", ChangeKind::Made { mode: libc::S_IFDIR });
    let removed = |name| at("told/folder", name, ChangeKind::Removed { is_directory: true });
    assert_eq!(changes, [removed("d"), made, removed("e")]);
}

#[test]
fn a_folder_is_told_of_where_it_is() {
    let memory = memory();
    let mut told = Told::new(&memory);
    told.find("told/folder");

    let changes =
        told.other("mv told/folder told/elsewhere; : > told/elsewhere/x; rm told/elsewhere/x");

    let folder = "told/elsewhere";
    let made = at(folder, "x", ChangeKind::Made { mode: libc::S_IFREG });
    assert_eq!(changes, [made, at(folder, "x", ChangeKind::Removed { is_directory: false })]);
}

#[test]
fn a_folder_that_the_guest_forgets_is_told_of_when_it_finds_it_again() {
    let memory = memory();
    let mut told = Told::new(&memory);
    let folder = told.find("told/folder");

    told.guest.forget(folder);
    assert_eq!(told.other(": > told/folder/x"), []);
    told.find("told/folder");

    let changes = told.other("echo > told/folder/x");
    assert_eq!(changes, [at("told/folder", "x", ChangeKind::Written)]);
}

#[test]
fn more_than_is_read_at_once_is_told_later() {
    let memory = memory();
    let mut told = Told::new(&memory);
    told.find("told/folder");

    let changes = told.other("for n in $(seq 2000); do : > told/folder/$n; done");

    assert_eq!(changes.len(), 2000);
}

#[test]
fn a_file_that_is_shared_alone_is_told_of() {
    let memory = memory();
    let mut told = Told::new(&memory);
    told.find("told/file");

    let changes = told.other("echo two >> told/file");

    assert_eq!(changes, [at("told", "file", ChangeKind::Written)]);
}

#[test]
fn what_the_guest_does_or_does_not_know_is_not_told() {
    let memory = memory();
    let mut told = Told::new(&memory);
    let (folder, untold) = (told.find("told/folder"), told.find("untold"));

    for parent in [folder, untold] {
        let made =
            told.guest.ask(MKNOD, parent, &[&words(&[libc::S_IFREG | 0o644, 0, 0, 0]), b"own\0"]);
        assert_eq!(made.errno, 0);
    }

    assert_eq!(told.told(), []);
    assert_eq!(told.other("touch untold/x; mkdir told/later; touch told/later/x"), []);
}

#[test]
fn a_guest_repeats_that_a_file_was_made() {
    let memory = memory();
    let mut told = Told::new(&memory);
    let folder = told.find("told/folder");
    fs::write(told.root.path().join("told/folder/new"), "contents").unwrap();

    assert_eq!(told.repeat(MAKE, LOOKUP, folder, &[b"new\0"]).errno, libc::ENOENT);
    let body = words(&[libc::S_IFREG | 0o600, 0, 0, 0]);
    let made = told.repeat(MAKE, MKNOD, folder, &[&body, b"new\0"]);

    assert_eq!(made.node(), told.find("told/folder/new"));
    // Or what was there for a moment.
    assert_eq!(told.repeat(MAKE, MKNOD, folder, &[&body, b"gone\0"]).errno, 0);
    assert!(!told.root.path().join("told/folder/gone").exists());
    assert_eq!(fs::read(told.root.path().join("told/folder/new")).unwrap(), b"contents");
}

#[test]
fn a_guest_repeats_that_a_file_is_gone() {
    let memory = memory();
    let mut told = Told::new(&memory);
    let folder = told.find("told/folder");
    fs::write(told.root.path().join("told/folder/stays"), "").unwrap();

    assert_eq!(told.lookup(folder, "gone").errno, libc::ENOENT);
    assert_eq!(told.repeat(REMOVE, LOOKUP, folder, &[b"gone\0"]).errno, 0);
    assert_eq!(told.repeat(REMOVE, UNLINK, folder, &[b"gone\0"]).errno, 0);
    assert_eq!(told.repeat(REMOVE, UNLINK, folder, &[b"stays\0"]).errno, 0);
    let to = folder.to_le_bytes();
    assert_eq!(told.repeat(REMOVE, RENAME, folder, &[&to, b"gone\0stays\0"]).errno, 0);

    assert!(told.root.path().join("told/folder/stays").exists());
}

#[test]
fn a_folder_that_is_there_again_stays_alive_for_the_guest() {
    let memory = memory();
    let mut told = Told::new(&memory);
    let parent = told.find("told");

    assert_eq!(told.repeat(REMOVE + 1, RMDIR, parent, &[b"gone\0"]).errno, 0);
    assert_eq!(told.repeat(REMOVE + 1, RMDIR, parent, &[b"folder\0"]).errno, libc::ENOTEMPTY);

    assert!(told.root.path().join("told/folder").exists());
}

#[test]
fn a_guest_repeats_that_a_file_was_written_and_writes_nothing() {
    let memory = memory();
    let mut told = Told::new(&memory);
    let file = told.find("told/file");

    let flags = (libc::O_WRONLY | libc::O_TRUNC) as u32;
    let handle = told.repeat(TOUCH, OPEN, file, &[&words(&[flags, 0])]).data[..8].to_vec();
    // FATTR_SIZE, with 0 for the size.
    let body = [words(&[1 << 3, 0]), vec![0; 80]].concat();
    assert_eq!(told.repeat(TOUCH, SETATTR, file, &[&body]).errno, 0);
    let write = [&handle[..], &words(&[0, 0, 1, 0, 0, 0, flags, 0]), b"x"].concat();
    assert_eq!(told.repeat(TOUCH, WRITE, file, &[&write]).errno, libc::EBADF);

    assert_eq!(fs::read(told.root.path().join("told/file")).unwrap(), b"one");
}
