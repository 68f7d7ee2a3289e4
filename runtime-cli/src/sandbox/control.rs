//! The unix socket by which later verbs talk to a sandbox process.
//!
//! Both directions carry frames of the agent's protocol. The file descriptors that become a new
//! process's stdio travel with the first byte of their request.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use agent_protocol::frame::{self, Decoder, FrameError};
use agent_protocol::{ExitStatus, Failed, Process, ProcessInfo, Stats, WindowSize};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt,
};
use serde::{Deserialize, Serialize};

use super::machine::{Change, Room};
use crate::state::ContainerDir;

/// Name of the socket in the state folder.
const SOCKET: &str = "control.sock";

/// stdin, stdout and stderr.
const MAX_FDS: usize = 3;

/// How much is read at once, in bytes.
const CHUNK_BYTES: usize = 4096;

/// How long a client may refuse to take an answer before it is left.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// What a verb asks. Each is answered once, in order; [`Request::Exec`] is answered a second time
/// when the process ends.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Run the container's program.
    Start,
    /// Send a signal to a process, or to all of the container.
    Signal { process: String, signal: i32, all: bool },
    /// Start a process, whose stdio comes along: the terminal, or what its `stdio` names. It is
    /// killed when the connection closes before it ends.
    Exec { name: String, process: Box<Process> },
    /// Set the size of a process's terminal.
    Resize { process: String, size: WindowSize },
    /// Freeze the container.
    Pause,
    /// Thaw it.
    Resume,
    /// Change the machine, and write cgroup files in the guest.
    Update { change: Change, files: Vec<(String, String)> },
    /// Say what the machine can have.
    Room,
    /// List the container's processes.
    Processes,
    /// Read its counters.
    Stats,
    /// Repeat what the guest's kernel printed last.
    Console,
    /// Tell what the machine costs.
    Metrics,
}

/// What the sandbox process answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// Done, nothing to tell.
    Done,
    /// The container's processes.
    Processes(Vec<ProcessInfo>),
    /// The container's counters.
    Stats(Box<Stats>),
    /// What the machine can have.
    Room(Room),
    /// What was asked for, as people read it.
    Text(String),
    /// Not done.
    Failed(Failed),
    /// The process started over this connection has ended.
    Exited(ExitStatus),
}

/// Path of the socket by the open state folder: `sun_path` is too short for many a `--root`.
fn socket_path(dir: &ContainerDir) -> PathBuf {
    format!("/proc/self/fd/{}/{SOCKET}", dir.fd().as_raw_fd()).into()
}

/// Listens in the state folder.
pub(super) fn listen(dir: &ContainerDir) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(socket_path(dir))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to the process that listens in the state folder.
pub(super) fn connect(dir: &ContainerDir) -> io::Result<UnixStream> {
    UnixStream::connect(socket_path(dir))
}

/// Sends a request with its descriptors.
pub(super) fn send(
    mut stream: &UnixStream,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    let bytes = frame::encode(request)?;
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let messages = if fds.is_empty() { &rights[..0] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&bytes)], messages, flags, None)
        .map_err(io::Error::from)?;
    stream.write_all(&bytes[sent..])?;
    Ok(())
}

/// A connected verb, as the sandbox process sees it.
#[derive(Debug)]
pub(super) struct Peer {
    stream: UnixStream,
    decoder: Decoder,
    fds: Vec<OwnedFd>,
}

impl Peer {
    /// Accepts a connection, if one is waiting. Only root and the owner of this process may talk.
    pub(super) fn accept(listener: &UnixListener) -> io::Result<Option<Self>> {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        let uid = getsockopt(&stream, sockopt::PeerCredentials)?.uid();
        if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Some(Self { stream, decoder: Decoder::default(), fds: Vec::new() }))
    }

    /// Takes what has arrived; `false` at the end of the connection.
    pub(super) fn receive(&mut self) -> io::Result<bool> {
        let mut bytes = [0; CHUNK_BYTES];
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let count = {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            let fd = self.stream.as_raw_fd();
            let message = match recvmsg::<()>(fd, &mut slices, Some(&mut space), flags) {
                Ok(message) => message,
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(true),
                Err(error) => return Err(error.into()),
            };
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    // SAFETY: the kernel just made these descriptors for this process.
                    self.fds.extend(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
                }
            }
            message.bytes
        };
        if self.fds.len() > MAX_FDS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.decoder.push(&bytes[..count]);
        Ok(count > 0)
    }

    /// The next whole request, with the descriptors that came with it.
    pub(super) fn request(&mut self) -> Result<Option<(Request, Vec<OwnedFd>)>, FrameError> {
        let request = self.decoder.take()?;
        Ok(request.map(|request| (request, mem::take(&mut self.fds))))
    }

    /// Answers. A client that does not take the answer is not worth waiting for.
    pub(super) fn answer(&mut self, answer: &Answer) -> Result<(), FrameError> {
        frame::write(&mut self.stream, answer)
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;
    use crate::state::{ContainerId, StateRoot};

    fn connected() -> (UnixStream, Peer, tempfile::TempDir) {
        let root = tempfile::tempdir().unwrap();
        let dir = StateRoot::new(root.path().join("x".repeat(200)))
            .create(&ContainerId::parse("a").unwrap())
            .unwrap();
        let listener = listen(&dir).unwrap();
        let client = connect(&dir).unwrap();
        let peer = Peer::accept(&listener).unwrap().unwrap();
        (client, peer, root)
    }

    #[test]
    fn a_request_arrives_with_its_descriptors_however_long_the_root_is() {
        let (client, mut peer, _root) = connected();
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();

        send(&client, &Request::Pause, &[writer.as_fd()]).unwrap();
        drop(writer);
        assert!(peer.receive().unwrap());

        let (request, fds) = peer.request().unwrap().unwrap();
        assert!(matches!(request, Request::Pause));
        for fd in fds {
            File::from(fd).write_all(b"hello").unwrap();
        }
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_request_larger_than_one_read_is_put_together() {
        let (client, mut peer, _root) = connected();
        let files = vec![("a".repeat(CHUNK_BYTES), "b".repeat(CHUNK_BYTES))];

        send(&client, &Request::Update { change: Change::default(), files: files.clone() }, &[])
            .unwrap();

        let request = loop {
            assert!(peer.receive().unwrap());
            if let Some((request, _)) = peer.request().unwrap() {
                break request;
            }
        };
        assert!(matches!(request, Request::Update { files: arrived, .. } if arrived == files));
    }

    #[test]
    fn the_end_of_a_connection_is_seen() {
        let (client, mut peer, _root) = connected();

        drop(client);

        assert!(!peer.receive().unwrap());
    }

    #[test]
    fn more_descriptors_than_stdio_has_are_refused() {
        let (client, mut peer, _root) = connected();
        let fd = client.as_fd();

        send(&client, &Request::Start, &[fd, fd, fd]).unwrap();
        send(&client, &Request::Start, &[fd]).unwrap();

        assert!(peer.receive().and_then(|_| peer.receive()).is_err());
    }
}
