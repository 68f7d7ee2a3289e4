//! A unix socket in the host's file system that listens for as long as its owner lives.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{SockFlag, accept4};

/// A listening socket; dropping it removes its file.
///
/// Who may connect is up to the file's mode, which the process's umask decides: with the usual one,
/// only the owner.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    _file: Option<SocketFile>,
}

/// The file of a listening socket; dropping it removes the file.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Listener {
    /// Listens at `path`. A file that is there already is an error: it may be another process's.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = UnixListener::bind(path)?;
        let file = SocketFile(path.to_owned());
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, path: path.to_owned(), _file: Some(file) })
    }

    /// Leaves the file to whoever keeps the second of the two. The first is for a thread that finds
    /// the file at `path`, and may not remove it.
    pub fn without_file(mut self, path: PathBuf) -> (Listener, Option<SocketFile>) {
        let file = self._file.take();
        (Listener { path, ..self }, file)
    }

    /// Where it listens, for its thread.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next client's connection, in non-blocking mode; `None` if nobody waits for one.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        loop {
            match accept4(self.socket.as_raw_fd(), flags) {
                Ok(client) => {
                    // SAFETY: the kernel has just given us this descriptor.
                    let client = unsafe { OwnedFd::from_raw_fd(client) };
                    return Ok(Some(client.into()));
                }
                Err(Errno::EAGAIN) => return Ok(None),
                // A client that gave up does not keep the next one waiting.
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl SocketFile {
    /// Leaves the file to whoever gets to know where it is.
    pub fn into_path(mut self) -> PathBuf {
        mem::take(&mut self.0)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // Somebody else may have removed it, and that is as good.
            let _ = fs::remove_file(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_at_a_fresh_listener() {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&folder.path().join("s")).unwrap();

        assert!(listener.accept().unwrap().is_none());
    }

    #[test]
    fn the_file_goes_with_the_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        assert!(path.exists());

        drop(listener);

        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_was_handed_over_outlives_the_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (listener, file) = Listener::bind(&path).unwrap().without_file("/elsewhere/s".into());
        assert_eq!(listener.path(), Path::new("/elsewhere/s"));

        drop(listener);
        assert!(path.exists());
        drop(file);

        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_there_already_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();

        let error = Listener::bind(file.path()).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(file.path().exists());
    }
}
