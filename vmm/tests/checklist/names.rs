//! Names, and what they stand for.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;

use super::{c, fresh, outcome};

fn rename(from: &Path, to: &Path, flags: u32) -> i64 {
    let (from, to) = (c(from), c(to));
    // SAFETY: both paths outlive the call.
    outcome(unsafe {
        libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags)
    })
}

fn two_files(name: &str) -> [std::path::PathBuf; 2] {
    let paths = [fresh(&format!("{name}-a")), fresh(&format!("{name}-b"))];
    fs::write(&paths[0], "a").unwrap();
    fs::write(&paths[1], "b").unwrap();
    paths
}

#[test]
#[ignore = "part of the checklist"]
fn a_rename_replaces_a_file_but_not_when_it_must_not() {
    let [a, b] = two_files("rename");

    assert_eq!(rename(&a, &b, libc::RENAME_NOREPLACE), -i64::from(libc::EEXIST));
    assert_eq!(rename(&a, &b, 0), 0);

    assert_eq!(fs::read(&b).unwrap(), b"a");
    assert!(!a.exists());
}

#[test]
#[ignore = "part of the checklist"]
fn two_files_change_their_names() {
    let [a, b] = two_files("exchange");

    assert_eq!(rename(&a, &b, libc::RENAME_EXCHANGE), 0);

    assert_eq!((fs::read(&a).unwrap(), fs::read(&b).unwrap()), (b"b".to_vec(), b"a".to_vec()));
}

#[test]
#[ignore = "part of the checklist"]
fn a_rename_replaces_an_empty_directory_and_no_other() {
    let [a, b] = [fresh("rename-dir-a"), fresh("rename-dir-b")];
    fs::create_dir(&a).unwrap();
    fs::create_dir(&b).unwrap();
    fs::write(b.join("file"), "").unwrap();

    assert_eq!(rename(&a, &b, 0), -i64::from(libc::ENOTEMPTY));
    fs::remove_file(b.join("file")).unwrap();
    assert_eq!(rename(&a, &b, 0), 0);

    assert!(!a.exists());
}

#[test]
#[ignore = "part of the checklist"]
fn a_hard_link_is_the_same_file() {
    let [a, b] = [fresh("link-a"), fresh("link-b")];
    fs::write(&a, "same").unwrap();

    fs::hard_link(&a, &b).unwrap();

    let (a, b) = (fs::metadata(&a).unwrap(), fs::metadata(&b).unwrap());
    assert_eq!((a.ino(), a.nlink(), b.nlink()), (b.ino(), 2, 2));
}

#[test]
#[ignore = "part of the checklist"]
fn a_symbolic_link_is_as_long_as_what_it_says() {
    let path = fresh("symlink");
    let target = "t".repeat(4095);

    symlink(&target, &path).unwrap();

    assert_eq!(fs::read_link(&path).unwrap().to_str(), Some(&target[..]));
    assert_eq!(fs::symlink_metadata(&path).unwrap().len(), 4095);
}

#[test]
#[ignore = "part of the checklist"]
fn a_name_has_255_bytes_at_most() {
    let (longest, longer) = (fresh(&"n".repeat(255)), fresh(&"n".repeat(256)));

    fs::write(&longest, "x").unwrap();

    assert_eq!(fs::read(&longest).unwrap(), b"x");
    let error = fs::write(&longer, "x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
}

#[test]
#[ignore = "part of the checklist"]
fn special_files_are_made() {
    // The null device, whose number says what the node must lead to.
    let null = libc::makedev(1, 3);
    let make = |name: &str, kind: libc::mode_t, device| {
        let path = fresh(name);
        let c_path: CString = c(&path);
        // SAFETY: the path outlives the call.
        assert_eq!(outcome(unsafe { libc::mknod(c_path.as_ptr(), kind | 0o600, device) }), 0);
        fs::symlink_metadata(&path).unwrap()
    };

    assert!(make("fifo", libc::S_IFIFO, 0).file_type().is_fifo());
    assert!(make("socket", libc::S_IFSOCK, 0).file_type().is_socket());
    assert!(make("block", libc::S_IFBLK, libc::makedev(7, 0)).file_type().is_block_device());
    let node = make("char", libc::S_IFCHR, null);
    assert!(node.file_type().is_char_device());
    assert_eq!((node.rdev(), node.mode() & 0o777), (null, 0o600));
}

#[test]
#[ignore = "part of the checklist"]
fn a_fifo_connects_two_processes() {
    let path = fresh("pipe");
    let c_path = c(&path);
    // SAFETY: the path outlives the call.
    assert_eq!(outcome(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }), 0);

    let writer = {
        let path = path.clone();
        std::thread::spawn(move || fs::write(path, "through").unwrap())
    };

    assert_eq!(fs::read(&path).unwrap(), b"through");
    writer.join().unwrap();
}
