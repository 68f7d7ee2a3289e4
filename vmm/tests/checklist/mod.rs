//! What programs expect of a file system, as tests that run in the directory they are given: in a guest
//! on a share, or on the host for comparison.

mod data;
mod locks;
mod many;
mod metadata;
mod names;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

/// Names the directory to test in, which must exist.
pub const DIRECTORY: &str = "CORACLE_TEST_DIRECTORY";

/// Names a directory of [`many::FILES`] files, called by their numbers.
pub const MANY: &str = "CORACLE_TEST_MANY";

pub use many::FILES;

/// A path of this test's own in the directory under test; nothing is there.
fn fresh(name: &str) -> PathBuf {
    let path = directory(DIRECTORY).join(name);
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir_all(&path);
    path
}

fn directory(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}")).into()
}

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

/// What a system call said: 0 or more, or its error number, negated.
fn outcome(result: impl Into<i64>) -> i64 {
    let result = result.into();
    if result >= 0 {
        return result;
    }
    -i64::from(io::Error::last_os_error().raw_os_error().unwrap())
}

/// Opens a new file to read and write.
fn create(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).unwrap()
}

fn fd(file: &File) -> RawFd {
    file.as_raw_fd()
}
