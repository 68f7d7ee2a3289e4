//! A unix socket in the host's file system that listens for as long as its owner lives.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, accept4, connect, socket};
use nix::unistd::{Gid, Uid, fchownat};

/// Longer than bind(2) and listen(2) take, one after the other: in between whoever listens looks as if
/// nobody did.
const TWO_STEPS: Duration = Duration::from_millis(10);

/// How long others may take who change something in the same folder.
const TURN: Duration = Duration::from_secs(1);

/// A listening socket; dropping it removes its file.
///
/// Who may connect is up to the file's mode, which the process's umask decides: with the usual one,
/// only the owner.
#[derive(Debug)]
pub struct Listener {
    /// Removed before the socket is closed: a file at which nobody listens makes room for another one.
    _file: Option<SocketFile>,
    socket: UnixListener,
    path: PathBuf,
}

/// The file of a listening socket; dropping it removes the file, unless another one is in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode. None if there is nothing to remove.
    made: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`. A socket that nobody listens at any more, as a process leaves behind that was
    /// killed, makes room; for one process, if several come at once. Whatever else is there already is an
    /// error of the kind `AddrInUse`.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = match UnixListener::bind(path) {
            // Looked at only now, so that it costs nothing where nothing is in the way.
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                take_place(path, || thread::sleep(TWO_STEPS))?
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(folder_error(path, &error));
            }
            bound => bound?,
        };
        let file = SocketFile::at(path.to_owned());
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, path: path.to_owned(), _file: Some(file) })
    }

    /// Refuses a `path` at which [`Listener::bind`] would not listen. To learn whether somebody listens
    /// at a socket that is there, it connects, and says nothing.
    pub fn check(path: &Path) -> io::Result<()> {
        SocketAddr::from_pathname(path)?;
        match fs::symlink_metadata(path) {
            Ok(_) => refuse_unless_left_behind(path),
            Err(error) if error.kind() == ErrorKind::NotFound => check_folder_of(path),
            Err(error) => Err(error),
        }
    }

    /// Makes the file `uid`'s and `gid`'s, who may connect then; nothing that somebody has put in its place.
    pub fn give_to(&self, uid: u32, gid: u32) -> io::Result<()> {
        let there = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&self.path)?;
        if !there.metadata()?.file_type().is_socket() {
            return Err(in_use("another file has taken its place"));
        }
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(fchownat(&there, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?)
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
    /// The one that is at `path`.
    pub fn at(path: PathBuf) -> Self {
        SocketFile { made: identity(&path), path }
    }

    /// Leaves the file to whoever gets to know where it is.
    pub fn into_path(mut self) -> PathBuf {
        self.made = None;
        mem::take(&mut self.path)
    }
}

/// Device and inode of what is at `path`.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// Listens at `path` in the place of a socket that nobody listens at any more, for which it looks twice, and
/// does `between` in between. Of several that try at once, one does: the others would take away what it has
/// just made.
fn take_place(path: &Path, between: impl FnOnce()) -> io::Result<UnixListener> {
    let _turn = take_turn(folder_of(path));
    refuse_unless_left_behind(path)?;
    between();
    refuse_unless_left_behind(path)?;
    fs::remove_file(path)?;
    UnixListener::bind(path)
}

/// Keeps others of our kind waiting who want to change something in `folder`, for as long as what it returns
/// lasts. None after a while: anybody else may have locked the folder, who need not hold us up, and one that
/// cannot be read is locked by nobody.
fn take_turn(folder: &Path) -> Option<Flock<File>> {
    let mut file = File::open(folder).ok()?;
    let deadline = Instant::now() + TURN;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(turn) => return Some(turn),
            Err((again, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = again,
            Err(_) => return None,
        }
        thread::sleep(TWO_STEPS);
    }
}

fn in_use(what: &str) -> io::Error {
    io::Error::new(ErrorKind::AddrInUse, what)
}

/// Refuses whatever is at `path` unless it is a socket at which nobody listens.
fn refuse_unless_left_behind(path: &Path) -> io::Result<()> {
    // Connecting to another file is refused, too.
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use("a file that is no socket is there already"));
    }
    // Whoever listens may be slow to answer, and is not waited for.
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => Ok(()),
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => {
            Err(in_use("another process listens there already"))
        }
        Err(error) => Err(error.into()),
    }
}

/// The folder that the file at `path` is made in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Refuses a `path` whose folder is not there.
pub fn check_folder_of(path: &Path) -> io::Result<()> {
    match fs::metadata(folder_of(path)) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(folder_error(path, &ErrorKind::NotADirectory.into())),
        Err(error) => Err(folder_error(path, &error)),
    }
}

/// `error`, which is about the folder of `path`.
fn folder_error(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("directory {:?}: {error}", folder_of(path)))
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
        if self.made.is_some() && identity(&self.path) == self.made {
            // Somebody else may have removed it, and that is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use nix::sys::socket::{Backlog, bind, listen};

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
    fn a_file_in_the_place_of_the_listeners_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        // The one that is put there has another inode for sure, as both are there.
        let other = folder.path().join("other");
        let _other = Listener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();

        drop(listener);

        assert!(path.exists());
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

        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        assert!(file.path().exists());
    }

    #[test]
    fn a_socket_that_was_left_behind_makes_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        // The standard library's does not remove its file.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());

        Listener::check(&path).unwrap();
        let listener = Listener::bind(&path).unwrap();

        UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
    }

    #[test]
    fn of_many_that_come_at_once_one_gets_the_place_of_a_socket_that_was_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let start = Barrier::new(4);

        let outcomes = thread::scope(|scope| {
            let take = || {
                start.wait();
                take_place(&path, || thread::sleep(TWO_STEPS))
            };
            [(); 4].map(|()| scope.spawn(take)).map(|thread| thread.join().unwrap())
        });

        let (ours, others): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        for error in others.into_iter().map(Result::unwrap_err) {
            assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
        }
        assert_eq!(ours.len(), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_folder_that_somebody_keeps_locked_holds_nobody_up_for_long() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let _locked = take_turn(folder.path()).unwrap();

        Listener::bind(&path).unwrap();
    }

    #[test]
    fn a_socket_of_somebody_who_is_about_to_listen_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let ours = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        bind(ours.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();

        let error =
            take_place(&path, || listen(&ours, Backlog::new(1).unwrap()).unwrap()).unwrap_err();

        assert_eq!(error.to_string(), "another process listens there already");
    }

    #[test]
    fn no_link_that_was_put_in_the_place_of_the_listeners_file_is_given_away() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("s"), folder.path().join("other"));
        let listener = Listener::bind(&path).unwrap();
        let own = fs::metadata(&path).unwrap();
        listener.give_to(own.uid(), own.gid()).unwrap();
        fs::write(&other, "").unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();

        let error = listener.give_to(own.uid(), own.gid()).unwrap_err();

        assert_eq!(error.to_string(), "another file has taken its place");
    }

    #[test]
    fn a_socket_in_use_is_refused_and_stays_even_if_nobody_accepts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        // As many as may wait, so that the next one would have to.
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();

        for error in [Listener::bind(&path).unwrap_err(), Listener::check(&path).unwrap_err()] {
            assert_eq!(error.to_string(), "another process listens there already");
        }
        assert!(path.exists());
    }

    #[test]
    fn a_link_to_a_socket_that_was_left_behind_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("s"), folder.path().join("link"));
        drop(UnixListener::bind(&path).unwrap());
        std::os::unix::fs::symlink(&path, &link).unwrap();

        let error = Listener::bind(&link).unwrap_err();

        assert_eq!(error.to_string(), "a file that is no socket is there already");
        assert!(path.exists() && link.exists());
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let path = Path::new("/nowhere/s");
        for error in [Listener::bind(path).unwrap_err(), Listener::check(path).unwrap_err()] {
            assert!(error.to_string().starts_with("directory \"/nowhere\": No such"), "{error}");
        }
    }

    #[test]
    fn a_path_that_is_too_long_for_a_socket_is_refused_by_a_look_at_it() {
        let path = Path::new("/tmp").join("s".repeat(108));
        assert_eq!(Listener::check(&path).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
