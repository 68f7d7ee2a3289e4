//! Answers FUSE requests out of one directory of the host.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ledger::Ledger;
use super::saved::State;
use super::tree::{Access, Tree};
use crate::virtio::queue::Chain;

/// For how long a guest may believe what it was told about a name or a file. The engine rewrites
/// files like `/etc/hosts` while a container runs, and users copy into it.
const BELIEF: Duration = Duration::from_secs(1);

/// Most bytes of a request and of its answer: 1 MiB of data, which is what is negotiated, and the
/// headers. The library allocates as much as it is sent, so nothing larger may reach it.
const MAX_MESSAGE_BYTES: usize = (1 << 20) + (8 << 10);

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, not a directory, or not accessible.
    #[error("open shared directory {path}")]
    OpenRoot {
        /// What the caller asked for.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process may not open enough files.
    #[error("raise the limit of open files")]
    RaiseFileLimit(#[source] io::Error),
    /// The process has no descriptor left.
    #[error("create an eventfd (raise the limit of open files, ulimit -n)")]
    Eventfd(#[source] io::Error),
    /// The file system library refused; it needs `/proc`.
    #[error("serve shared directory {path}; is /proc mounted?")]
    Serve {
        /// What the caller asked for.
        path: PathBuf,
        /// What the library said.
        #[source]
        source: io::Error,
    },
}

/// Why a request got no answer. The guest asked in a way that Linux does not.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("the request or the room for its answer is larger than {MAX_MESSAGE_BYTES} bytes")]
    TooLarge,
    #[error("the request is not in guest memory: {0}")]
    Memory(fuse_backend_rs::transport::Error),
    #[error("the request makes no sense: {0}")]
    Message(fuse_backend_rs::Error),
}

/// Serves one directory tree, including everything that is mounted in it.
///
/// The process must run as root, with `/proc` mounted at its usual place for as long as the server
/// lives: names of open files there are how files are opened and extended attributes are reached.
/// It clears the umask of the process, as each request has its own.
pub struct Server {
    server: server::Server<Arc<Ledger>>,
    ledger: Arc<Ledger>,
    /// The library finds the tree again through this, whatever the mounts of the process become.
    root: File,
    wake: EventFd,
}

impl Server {
    /// Opens the directory `root`. With `read_only` every change is refused with EROFS. Raises the
    /// soft limit of open files to the hard one: each file the guest knows is an open file here.
    pub fn open(root: &Path, read_only: bool) -> Result<Server, Error> {
        raise_file_limit().map_err(Error::RaiseFileLimit)?;
        let directory = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(root)
            .map_err(|source| Error::OpenRoot { path: root.to_owned(), source })?;
        let files = PassthroughFs::new(configuration(&directory))
            .and_then(|files| files.import().map(|()| files))
            .map_err(|source| Error::Serve { path: root.to_owned(), source })?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(Error::Eventfd)?;
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        let ledger = Arc::new(Ledger::new(Tree::new(files, access)));
        Ok(Server { server: server::Server::new(ledger.clone()), ledger, root: directory, wake })
    }

    /// Serves one request and returns the size of the answer in bytes, 0 for a request without one.
    pub(super) fn serve(
        &self,
        chain: &Chain<'_>,
        memory: &GuestMemoryMmap,
    ) -> Result<u32, RequestError> {
        let request =
            Reader::from_descriptor_chain(memory, chain.clone()).map_err(RequestError::Memory)?;
        let answer = VirtioFsWriter::new(memory, chain.clone()).map_err(RequestError::Memory)?;
        // Measured on what the library works with, because a guest may change its descriptors
        // after they were looked at.
        if request.available_bytes().max(answer.available_bytes()) > MAX_MESSAGE_BYTES {
            return Err(RequestError::TooLarge);
        }
        let written = self
            .server
            .handle_message(request, answer.into(), None, None)
            .map_err(RequestError::Message)?;
        Ok(u32::try_from(written).expect("no more than MAX_MESSAGE_BYTES fit"))
    }

    /// Wakes up the thread that serves the directory.
    pub(super) fn wake(&self) {
        // The only failure is a counter at its maximum, and then the thread is woken anyway.
        let _ = self.wake.write(1);
    }

    /// An event of this each time somebody wakes the thread up.
    pub(super) fn woken(&self) -> &EventFd {
        &self.wake
    }

    /// What the guest knows and has open.
    pub(super) fn save(&self) -> State {
        self.ledger.save(&self.root)
    }

    /// Goes on with a guest that knows and has open what `state` says.
    pub(super) fn restore(&self, state: &State) -> io::Result<()> {
        self.ledger.restore(state)
    }

    /// Forgets the guest: closes what it has open.
    pub(super) fn reset(&self) {
        self.ledger.destroy();
    }
}

fn configuration(root: &File) -> Config {
    Config {
        // Through the descriptor, because the library opens it again whenever a guest starts over.
        root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        entry_timeout: BELIEF,
        attr_timeout: BELIEF,
        cache_policy: CachePolicy::Auto,
        writeback: false,
        xattr: true,
        do_import: true,
        killpriv_v2: true,
        // Node numbers are made of the mount's number and the inode's. The alternative is a table
        // of every file ever seen, which grows for as long as the guest makes files.
        use_host_ino: true,
        ..Config::default()
    }
}

/// Lets the process open as many files as the operator allows.
fn raise_file_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit, and outlives the call that fills it.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit, and outlives the call that reads it.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
