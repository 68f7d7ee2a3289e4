//! The host's side of streams: the handle other threads use, and the descriptors a stream joins.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// The host's end of one stream. Every descriptor must be in non-blocking mode; a socket is given
/// as two duplicates. The process must ignore SIGPIPE, as Rust programs do by default and
/// `vmm::run_program` does.
#[derive(Debug, Default)]
pub struct HostStream {
    /// Read, and sent to the guest. Its end is a half-close towards the guest and ends nothing else.
    pub input: Option<OwnedFd>,
    /// Gets what the guest sends; without it that is thrown away. Dropped once the guest is done
    /// sending and everything is written; a socket is shut down for writing first.
    pub output: Option<OwnedFd>,
    /// Dropped once the stream is over in both directions and everything is written to `output`.
    pub on_close: Option<OwnedFd>,
}

/// What the handle asks of the device.
pub(super) enum Command {
    Connect { port: u32, greeting: Vec<u8>, stream: HostStream },
    Listen { port: u32, stream: HostStream },
}

/// Opens streams from any thread, before the guest runs as well as later.
#[derive(Debug, Clone)]
pub struct Host {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Host {
    pub(super) fn new(commands: Sender<Command>, wake: Arc<EventFd>) -> Self {
        Host { commands, wake }
    }

    /// Connects `stream` to `port` of the guest. Returns at once: the request waits until the guest's
    /// driver is up, and if the guest refuses the stream is just closed. Fails if the device is gone.
    pub fn connect(&self, port: u32, stream: HostStream) -> io::Result<()> {
        self.greet(port, Vec::new(), stream)
    }

    /// Like [`Host::connect`], and sends `greeting` before anything from the input: who the stream
    /// is for, when the input belongs to someone who does not know.
    pub fn greet(&self, port: u32, greeting: Vec<u8>, stream: HostStream) -> io::Result<()> {
        self.send(Command::Connect { port, greeting, stream })
    }

    /// Joins `stream` to the guest's first connection to `port` of the host. A stream that waits
    /// for the same port already is closed. Fails if the device is gone.
    pub fn listen(&self, port: u32, stream: HostStream) -> io::Result<()> {
        self.send(Command::Listen { port, stream })
    }

    fn send(&self, command: Command) -> io::Result<()> {
        self.commands.send(command).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        self.wake.write(1)
    }
}

/// A descriptor in the muxer's epoll, edge-triggered; leaves it when dropped.
///
/// A closed descriptor leaves an epoll by itself only when no other process holds a duplicate.
#[derive(Debug)]
pub(super) struct End {
    fd: OwnedFd,
    /// The epoll, unless the descriptor cannot be polled and so never blocks.
    watched_by: Option<Arc<Epoll>>,
    /// Neither end of file, error nor EAGAIN has been seen since the last event.
    ready: bool,
}

impl End {
    /// Starts to watch `fd` for `events`, which are reported with `token`.
    pub fn new(fd: OwnedFd, epoll: &Arc<Epoll>, events: EventSet, token: u64) -> io::Result<Self> {
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token);
        let watched_by = match epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event) {
            Ok(()) => Some(epoll.clone()),
            // Regular files and /dev/null.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(error) => return Err(error),
        };
        Ok(End { fd, watched_by, ready: true })
    }

    /// Whether it is worth trying to move data.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Notes that an event came.
    pub fn wake(&mut self) {
        self.ready = true;
    }

    /// Reads into guest memory. 0 is the end, `None` that nothing is there now.
    pub fn read(&mut self, slice: &mut VolatileSlice<'_>) -> io::Result<Option<usize>> {
        let outcome = uninterrupted(|| (&self.fd).read_volatile(slice));
        self.unless_blocked(outcome)
    }

    /// Writes from memory. `None` says that nothing fits now.
    pub fn write(&mut self, slice: &VolatileSlice<'_>) -> io::Result<Option<usize>> {
        let outcome = uninterrupted(|| (&self.fd).write_volatile(slice));
        self.unless_blocked(outcome)
    }

    fn unless_blocked(&mut self, outcome: io::Result<usize>) -> io::Result<Option<usize>> {
        match outcome {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Without an epoll nothing would wake the stream up again.
                self.ready = self.watched_by.is_none();
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Another descriptor of the same file.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Ends the writing side of a socket, also for those who hold duplicates of it.
    pub fn finish_writing(mut self) {
        self.unwatch();
        if let Ok(socket) = self.fd.try_clone().map(UnixStream::from) {
            // Anything but a socket says ENOTSOCK, and dropping it is all there is to do.
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    fn unwatch(&mut self) {
        if let Some(epoll) = self.watched_by.take() {
            // It was added in `new` and is still open, so this cannot fail.
            let _ = epoll.ctl(ControlOperation::Delete, self.fd.as_raw_fd(), EpollEvent::default());
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.unwatch();
    }
}

/// Runs `transfer` until no signal comes in between.
fn uninterrupted(
    mut transfer: impl FnMut() -> Result<usize, VolatileMemoryError>,
) -> io::Result<usize> {
    loop {
        match transfer() {
            Ok(bytes) => return Ok(bytes),
            Err(VolatileMemoryError::IOError(error)) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}
