//! Paths inside a container's root file system, resolved so that no symbolic link leads out of it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};

/// Dangling links followed while creating one path, as many as the kernel follows (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// `openat2` asks to be called again when a rename or mount raced with it.
const MAX_RACES: u32 = 64;

/// A directory that is the root of every path given to it.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
}

/// What to create where nothing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

impl Root {
    /// The directory at `path`.
    pub fn open(path: &Path) -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { directory: open(path, flags, Mode::empty())? })
    }

    /// An `O_PATH` descriptor of what is at `path`, on the topmost mount there.
    pub fn find(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open_at(path, OFlag::O_PATH)
    }

    /// Opens `path` with `flags`.
    pub fn open_at(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        for _ in 0..MAX_RACES {
            match openat2(&self.directory, path, how) {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// Like [`find`](Self::find), but creates what is missing, with parent directories. A link that
    /// leads nowhere gets its target created: images have such links, for instance
    /// `/etc/resolv.conf` to a file below `/run`.
    pub fn create(&self, path: &Path, kind: Kind) -> nix::Result<OwnedFd> {
        self.create_through(path, kind, MAX_LINKS)
    }

    fn create_through(&self, path: &Path, kind: Kind, links: u32) -> nix::Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::ENOENT) => {}
            result => return result,
        }
        let parent = path.parent().ok_or(Errno::ENOENT)?;
        let directory = self.create_through(parent, Kind::Directory, links)?;
        // What ends in `..` is there once its parent is.
        let Some(name) = path.file_name() else { return self.find(path) };
        match make(directory.as_fd(), Path::new(name), kind) {
            Ok(()) => return self.find(path),
            Err(Errno::EEXIST) => {}
            Err(error) => return Err(error),
        }
        match readlinkat(&directory, name) {
            Ok(_) if links == 0 => Err(Errno::ELOOP),
            Ok(target) => self.create_through(&parent.join(target), kind, links - 1),
            Err(_) => self.find(path),
        }
    }
}

fn make(parent: BorrowedFd<'_>, name: &Path, kind: Kind) -> nix::Result<()> {
    match kind {
        Kind::Directory => mkdirat(parent, name, Mode::from_bits_truncate(0o755)),
        Kind::File => mknodat(parent, name, SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0),
    }
}

/// A path that reaches what `descriptor` stands for, for system calls that take paths only.
pub fn proc_path(descriptor: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn target(descriptor: &OwnedFd) -> std::path::PathBuf {
        fs::read_link(proc_path(descriptor)).unwrap()
    }

    #[test]
    fn missing_parents_are_created() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::open(folder.path()).unwrap();

        let made = root.create(Path::new("/a/b/file"), Kind::File).unwrap();

        assert_eq!(target(&made), folder.path().join("a/b/file"));
        assert!(folder.path().join("a/b/file").is_file());
    }

    #[test]
    fn a_missing_parent_may_be_left_again() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::open(folder.path()).unwrap();

        let made = root.create(Path::new("/a/../../b/c"), Kind::Directory).unwrap();

        assert_eq!(target(&made), folder.path().join("b/c"));
    }

    #[test]
    fn links_out_of_the_root_stay_inside() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        symlink("../../../../etc", folder.path().join("up")).unwrap();
        let root = Root::open(folder.path()).unwrap();

        let found = root.create(Path::new("/up/new"), Kind::File).unwrap();

        assert_eq!(target(&found), folder.path().join("etc/new"));
    }

    #[test]
    fn a_dangling_link_gets_its_target() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        symlink("/run/resolve/stub.conf", folder.path().join("etc/resolv.conf")).unwrap();
        let root = Root::open(folder.path()).unwrap();

        let made = root.create(Path::new("/etc/resolv.conf"), Kind::File).unwrap();

        assert_eq!(target(&made), folder.path().join("run/resolve/stub.conf"));
    }

    #[test]
    fn a_link_to_itself_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        symlink("loop", folder.path().join("loop")).unwrap();
        let root = Root::open(folder.path()).unwrap();

        assert_eq!(root.create(Path::new("/loop"), Kind::File).unwrap_err(), Errno::ELOOP);
    }
}
