//! Answers FUSE requests out of one directory of the host.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::InHeader;
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{FsCacheReqHandler, Reader, VirtioFsWriter};
use vm_memory::{Address, ByteValued, Bytes, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::changes::Telling;
use super::extension::{Extension, head_of_answer};
use super::ledger::Ledger;
use super::mapped;
use super::observer::Observer;
use super::saved::State;
use super::tree::Tree;
use super::window::{Mapper, Window};
use crate::virtio::queue::Chain;

/// Least size of a file that the guest maps through the window, in bytes. A smaller one comes whole
/// with one request, and a place in the window has 2 MiB.
const MAPPED_FILE_BYTES: u64 = 64 << 10;

/// Most bytes of a request and of its answer: 1 MiB of data, which is what is negotiated, and the
/// headers. The library allocates as much as it is sent, so nothing larger may reach it.
pub(super) const MAX_MESSAGE_BYTES: usize = (1 << 20) + (8 << 10);

/// Where Linux says how many files a process may have open at most (proc(5)).
const MOST_FILES: &str = "/proc/sys/fs/nr_open";

/// For how long a guest may go by what it has been told or has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// Not at all: it asks every time. For directories that others change all the time.
    Never,
    /// For a second; what it has read of a file, until the next open that finds the file changed. The
    /// engine rewrites files like `/etc/hosts` while a container runs, and users copy into it.
    #[default]
    Auto,
    /// For a day. For directories that nobody else changes.
    Always,
}

impl Cache {
    fn policy(self) -> CachePolicy {
        match self {
            Cache::Never => CachePolicy::Never,
            Cache::Auto => CachePolicy::Auto,
            Cache::Always => CachePolicy::Always,
        }
    }

    /// For how long names and attributes are believed.
    fn belief(self) -> Duration {
        Duration::from_secs(match self {
            Cache::Never => 0,
            Cache::Auto => 1,
            Cache::Always => 24 * 60 * 60,
        })
    }
}

/// How a directory is shared.
#[derive(Clone, Default)]
pub struct Options {
    /// Whether every change is refused with EROFS.
    pub read_only: bool,
    /// For how long the guest may go by what it knows.
    pub cache: Cache,
    /// Whether the guest keeps what is written until it sees fit, or somebody asks for it. Not if
    /// anybody else changes the files, and not with [`Cache::Never`].
    pub writeback: bool,
    /// Where the guest may map files.
    pub window: Option<Arc<Window>>,
    /// Who is told what others change.
    pub telling: Option<Telling>,
}

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
    #[error("the request or the room for its answer is too short: {0}")]
    Extension(io::Error),
    #[error("more than the data of a read or a write lies in the window: {0}")]
    Mapped(io::Error),
}

/// Serves one directory tree, including everything that is mounted in it.
///
/// The process must run as root, with `/proc` mounted at its usual place for as long as the server
/// lives: names of open files there are how files are opened and extended attributes are reached.
/// It clears the umask of the process, as each request has its own.
pub struct Server {
    server: server::Server<Arc<Ledger>>,
    pub(super) ledger: Arc<Ledger>,
    window: Option<Arc<Window>>,
    /// The library finds the tree again through this, whatever the mounts of the process become.
    root: File,
    wake: EventFd,
}

impl Server {
    /// Opens the directory `root` with the usual options. With `read_only` every change is refused
    /// with EROFS.
    pub fn open(root: &Path, read_only: bool) -> Result<Server, Error> {
        Server::with_options(root, Options { read_only, ..Options::default() })
    }

    /// Opens the directory `root`. Each file the guest knows is an open file here: see
    /// [`raise_file_limit`].
    pub fn with_options(root: &Path, options: Options) -> Result<Server, Error> {
        let directory = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(root)
            .map_err(|source| Error::OpenRoot { path: root.to_owned(), source })?;
        let files = PassthroughFs::new(configuration(&directory, &options))
            .and_then(|files| files.import().map(|()| files))
            .map_err(|source| Error::Serve { path: root.to_owned(), source })?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(Error::Eventfd)?;
        let observe = |telling| Observer::new(directory.try_clone()?, telling);
        let observer = options.telling.clone().and_then(|telling| {
            let failed = |error: &io::Error| log::info!("changes of files are not seen: {error}");
            observe(telling).inspect_err(failed).ok()
        });
        let ledger = Arc::new(Ledger::new(Tree::new(files, &options), observer));
        let server = server::Server::new(ledger.clone());
        Ok(Server { server, ledger, window: options.window, root: directory, wake })
    }

    /// Where the guest may map files.
    pub(super) fn window(&self) -> Option<&Arc<Window>> {
        self.window.as_ref()
    }

    /// Serves one request and returns the size of the answer in bytes, 0 for a request without one.
    /// The data of files may be anywhere in `buffers`, which is more than `memory`: a program writes what it
    /// has mapped.
    pub(super) fn serve(
        &self,
        chain: &Chain<'_>,
        memory: &GuestMemoryMmap,
        buffers: Option<&GuestMemoryMmap>,
    ) -> Result<u32, RequestError> {
        let ready = self.window.as_ref().map_or(Ok(()), |window| window.unpatch());
        let both = Reader::from_descriptor_chain(memory, chain.clone())
            .and_then(|request| Ok((request, VirtioFsWriter::new(memory, chain.clone())?)));
        let (request, answer) = match (both, buffers) {
            (Ok(both), _) => both,
            (Err(error), None) => return Err(RequestError::Memory(error)),
            (Err(_), Some(buffers)) => {
                let written = mapped::serve(&self.ledger, chain, memory, buffers, ready);
                return written.map(bytes_of_answer).map_err(RequestError::Mapped);
            }
        };
        // Measured on what the library works with, because a guest may change its descriptors
        // after they were looked at.
        if request.available_bytes().max(answer.available_bytes()) > MAX_MESSAGE_BYTES {
            return Err(RequestError::TooLarge);
        }
        if let (Err(error), true) = (ready, answer.available_bytes() > 0) {
            let written = refuse(request, answer, &error);
            return written.map(bytes_of_answer).map_err(RequestError::Extension);
        }
        let opcode = opcode(chain, memory);
        if let Some(extension) = opcode.and_then(Extension::of) {
            let written = extension.serve(&self.ledger, request, answer);
            return written.map(bytes_of_answer).map_err(RequestError::Extension);
        }
        let mut mapper = self.window.clone().map(Mapper);
        let mapper = mapper.as_mut().map(|mapper| mapper as &mut dyn FsCacheReqHandler);
        let written = self
            .server
            .handle_message(request, answer.into(), mapper, None)
            .map_err(RequestError::Message)?;
        Ok(bytes_of_answer(written))
    }

    /// Who sees what others change, if anybody is told.
    pub(super) fn observer(&self) -> Option<&Observer> {
        self.ledger.observer.as_ref()
    }

    /// Looks at what others changed, and later at the rest if that is much.
    pub(super) fn look(&self) {
        if self.ledger.look() {
            self.wake();
        }
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

/// Answers with `error`. Returns the size of the answer in bytes.
fn refuse(
    mut request: Reader<'_>,
    mut answer: VirtioFsWriter<'_>,
    error: &io::Error,
) -> io::Result<usize> {
    let header: InHeader = request.read_obj()?;
    let head = head_of_answer(header.unique, Err(error));
    answer.write_all(head.as_slice())?;
    Ok(head.len as usize)
}

/// What kind of a request is in `chain`. Its driver may say something else when it is looked at again.
fn opcode(chain: &Chain<'_>, memory: &GuestMemoryMmap) -> Option<u32> {
    let header = chain.clone().next()?.addr();
    memory.read_obj(header.checked_add(size_of::<u32>() as u64)?).ok()
}

fn bytes_of_answer(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("no more than MAX_MESSAGE_BYTES fit")
}

fn configuration(root: &File, options: &Options) -> Config {
    Config {
        // Through the descriptor, because the library opens it again whenever a guest starts over.
        root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        entry_timeout: options.cache.belief(),
        attr_timeout: options.cache.belief(),
        cache_policy: options.cache.policy(),
        writeback: options.writeback,
        xattr: true,
        do_import: true,
        killpriv_v2: true,
        dax_file_size: options.window.as_ref().map(|_| MAPPED_FILE_BYTES),
        // Node numbers are made of the mount's number and the inode's. The alternative is a table
        // of every file ever seen, which grows for as long as the guest makes files.
        use_host_ino: true,
        ..Config::default()
    }
}

/// Lets the process open as many files as the operator allows: as many as the kernel does, if it may
/// raise its own limit (CAP_SYS_RESOURCE). To be called where `/proc` is whole.
pub fn raise_file_limit() -> Result<(), Error> {
    raise_to_the_most().map_err(Error::RaiseFileLimit)
}

/// The highest limit of open files that Linux lets anybody set (fs.nr_open).
pub fn most_open_files() -> io::Result<u64> {
    fs::read_to_string(MOST_FILES)?.trim().parse().map_err(io::Error::other)
}

fn raise_to_the_most() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit, and outlives the call that fills it.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let most = most_open_files().ok().filter(|&most| most > limit.rlim_max);
    if most.is_some_and(|most| set_file_limit(most).is_ok()) {
        return Ok(());
    }
    set_file_limit(limit.rlim_max)
}

fn set_file_limit(files: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: files, rlim_max: files };
    // SAFETY: `limit` is a valid rlimit, and outlives the call that reads it.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
