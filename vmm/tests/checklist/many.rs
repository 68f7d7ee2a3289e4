//! Large directories, and many open files.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::Read;

use super::{MANY, c, directory};

/// How many files there are in the directory of [`MANY`], with their number in each.
pub const FILES: usize = 20_000;

/// How many files are open at once: more than the 4096 of a process whose limit nobody raised. The
/// emulated processor of the lab takes minutes for what needs more.
const OPEN: usize = 8_192;

/// The number the next name in `stream` is; `None` at the end.
///
/// # Safety
///
/// `stream` must be an open directory.
unsafe fn next(stream: *mut libc::DIR) -> Option<usize> {
    loop {
        // SAFETY: the caller's directory is open, and the name is looked at before the next call.
        let name = unsafe {
            let entry = libc::readdir(stream);
            if entry.is_null() {
                return None;
            }
            CStr::from_ptr((*entry).d_name.as_ptr()).to_str().unwrap().to_owned()
        };
        if !name.starts_with('.') {
            return Some(name.parse().unwrap());
        }
    }
}

#[test]
#[ignore = "part of the checklist"]
fn a_large_directory_is_listed_once_from_wherever_one_starts() {
    let path = c(&directory(MANY));

    // SAFETY: the directory stays open until the end of the test; positions are its own.
    unsafe {
        let stream = libc::opendir(path.as_ptr());
        assert!(!stream.is_null());
        let first: Vec<_> = (0..FILES / 2).map_while(|_| next(stream)).collect();
        let half = libc::telldir(stream);
        let second: Vec<_> = std::iter::from_fn(|| next(stream)).collect();
        libc::seekdir(stream, half);
        let again: Vec<_> = std::iter::from_fn(|| next(stream)).collect();
        libc::closedir(stream);

        assert_eq!(first.len() + second.len(), FILES);
        assert!(again == second);
        let all: BTreeSet<_> = first.into_iter().chain(second).collect();
        assert!(all.into_iter().eq(0..FILES));
    }
}

#[test]
#[ignore = "part of the checklist"]
fn more_files_are_open_than_a_process_usually_may() {
    let most = OPEN as u64 + 100;
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: `limit` outlives the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    let folder = directory(MANY);

    let files: Vec<_> =
        (0..OPEN).map(|n| File::open(folder.join((n % FILES).to_string())).unwrap()).collect();

    for n in [0, OPEN / 2, OPEN - 1] {
        let mut text = String::new();
        (&files[n]).read_to_string(&mut text).unwrap();
        assert_eq!(text, (n % FILES).to_string());
    }
    drop(files);
    assert!(fs::metadata(folder).unwrap().is_dir());
}
