//! Locks between processes and between open files.

use std::fs::File;
use std::path::Path;

use devices::testing::in_a_child;

use super::{create, fd, fresh, outcome};

fn lock(file: &File, command: i32, kind: i32) -> i64 {
    // SAFETY: plain numbers, of which zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap();
    lock.l_len = 10;
    // SAFETY: `lock` outlives the call.
    let result = outcome(unsafe { libc::fcntl(fd(file), command, &raw mut lock) });
    if command == libc::F_GETLK { i64::from(lock.l_type) } else { result }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
#[ignore = "part of the checklist"]
fn a_range_locked_by_one_process_is_refused_to_another() {
    let path = fresh("posix-lock");
    let file = create(&path);
    assert_eq!(lock(&file, libc::F_SETLK, libc::F_WRLCK), 0);

    let other = open(&path);
    let refused = in_a_child(|| {
        lock(&other, libc::F_GETLK, libc::F_RDLCK) == i64::from(libc::F_WRLCK)
            && lock(&other, libc::F_SETLK, libc::F_RDLCK) == -i64::from(libc::EAGAIN)
    });
    assert_eq!(lock(&file, libc::F_SETLK, libc::F_UNLCK), 0);
    let granted = in_a_child(|| lock(&other, libc::F_SETLK, libc::F_WRLCK) == 0);

    assert!(refused);
    assert!(granted);
}

#[test]
#[ignore = "part of the checklist"]
fn a_range_locked_by_one_open_file_is_refused_to_another_of_the_same_process() {
    let path = fresh("ofd-lock");
    let files = [create(&path), open(&path)];

    let first = lock(&files[0], libc::F_OFD_SETLK, libc::F_WRLCK);
    let second = lock(&files[1], libc::F_OFD_SETLK, libc::F_WRLCK);
    drop(files[0].try_clone().unwrap());
    let still = lock(&files[1], libc::F_OFD_SETLK, libc::F_RDLCK);

    let refused = -i64::from(libc::EAGAIN);
    assert_eq!([first, second, still], [0, refused, refused]);
}

#[test]
#[ignore = "part of the checklist"]
fn a_locked_file_is_refused_until_it_is_closed() {
    let path = fresh("flock");
    let (file, other) = (create(&path), open(&path));
    // SAFETY: takes numbers only.
    let flock = |file: &File, how| outcome(unsafe { libc::flock(fd(file), how | libc::LOCK_NB) });

    let taken = [flock(&file, libc::LOCK_EX), flock(&other, libc::LOCK_SH)];
    drop(file);

    assert_eq!(taken, [0, -i64::from(libc::EWOULDBLOCK)]);
    assert_eq!(flock(&other, libc::LOCK_EX), 0);
}
