//! A process beside that of the machine, where nothing of the guest ever comes: it serves the control
//! socket, opens what clients attach, and removes the machine's sockets in the end. So the machine's own
//! process needs no privilege, no file of the host and no client once its guest runs.
//!
//! The two have a socket between them. The first message tells which sockets to remove; from then on each
//! is a request of a client with the files that it needs, or the answer. The one ends when the other does.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use devices::listener::SocketFile;
use log::error;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, dup2_stdin, dup2_stdout, fork};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::thread::{CapabilitySet, set_no_new_privs};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmm::{ConfigError, Opened, keep_capabilities};

use crate::asker::Asker;
use crate::http::{Request, Response};
use crate::opener::Opener;
use crate::poll;
use crate::server::Server;

/// How long a control socket rests that cannot let a client in.
const RETRY_MS: u16 = 1000;

/// How long the machine's process waits for the end of this one.
const END_PATIENCE_MS: u16 = 2000;

/// Most bytes of a message: metrics of many devices are some ten thousand.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Most descriptors that come with a message: an interface has two for each pair of queues.
const MAX_FILES: usize = 64;

/// The process; dropping it ends it, and waits a moment for that.
pub struct Warden {
    process: Pid,
    channel: UnixStream,
}

/// What a client wants of the machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// What it wrote.
    pub request: Request,
    /// [`Opened::mtu`] of what it attaches, or why that could not be opened.
    opened: Result<Option<u16>, ConfigError>,
    #[serde(skip)]
    files: Vec<OwnedFd>,
}

impl Order {
    /// What was opened for it, or why that could not be opened.
    pub fn take_opened(&mut self) -> Result<Opened, ConfigError> {
        let files = std::mem::take(&mut self.files);
        self.opened.clone().map(|mtu| Opened { files, mtu })
    }
}

impl Warden {
    /// Starts it, with `server` if there is a control socket: before this process has a second thread, or
    /// anything that the other one should not have.
    ///
    /// It opens nothing for clients unless the machine `may_attach` something: what it opens comes to the
    /// machine's process, also where that refuses it.
    pub fn start(server: Option<Server>, may_attach: bool) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let maker = Pid::this();
        // SAFETY: this process has one thread, so that the child may do whatever it could.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                if let Some(server) = server {
                    server.leave();
                }
                Ok(Warden { process: child, channel: ours })
            }
            ForkResult::Child => {
                drop(ours);
                let server = server.map(|mut server| {
                    server.keep_out(maker);
                    server
                });
                let outcome = serve(server, &theirs, may_attach);
                if let Err(error) = &outcome {
                    error!("serve the control socket: {error}");
                }
                // SAFETY: it ends the process, which owes nothing to anybody.
                unsafe { libc::_exit(outcome.is_err().into()) }
            }
        }
    }

    /// Has it serve clients, and leaves `sockets` to it, which it removes in the end.
    pub fn set_out(&self, sockets: &[PathBuf]) -> io::Result<()> {
        send(&self.channel, &sockets, &[])
    }

    /// Takes the next order, and waits for it if there is none. An error says that there will be none any
    /// more.
    pub fn receive(&self) -> io::Result<Order> {
        let received = receive_with_files::<Order>(&self.channel)?;
        let (order, files) = received.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(match files {
            Some(files) => Order { files, ..order },
            None => Order { opened: Err(no_room()), ..order },
        })
    }

    /// Answers the order that was taken.
    pub fn answer(&self, response: &Response) -> io::Result<()> {
        send(&self.channel, response, &[])
    }
}

impl AsFd for Warden {
    /// Readable when there is an order.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        let mut ended = [PollFd::new(self.channel.as_fd(), PollFlags::empty())];
        // It may be stopped, or open what does not answer: then it ends later, and nobody waits for that.
        let is_over = self.channel.shutdown(Shutdown::Write).is_ok()
            && poll(&mut ended, END_PATIENCE_MS.into()).is_ok()
            && ended[0].any().unwrap_or(false);
        if is_over {
            // The kernel gives out no child's pid before it was waited for.
            let _ = waitpid(self.process, None);
        }
    }
}

/// Why a client gets nothing attached that was opened, but did not come here.
fn no_room() -> ConfigError {
    let rule = "must wait: the machine's process has no descriptor left (raise the limit: \
                --resource-limit no-file=N, or ulimit -n)";
    ConfigError { field: "(document)".to_owned(), rule: rule.to_owned() }
}

/// Does all that the process is there for, until the machine's process closes `channel`.
fn serve(server: Option<Server>, channel: &UnixStream, may_attach: bool) -> io::Result<()> {
    // Whoever waits for the end of the machine's output does not wait for this process.
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&nothing)?;
    dup2_stdout(&nothing)?;
    set_no_new_privs(true)?;
    if !may_attach {
        // All that is left for root to do is to remove sockets, from whomever's folder.
        keep_capabilities(CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER)?;
    }
    let Some(sockets) = receive::<Vec<PathBuf>>(channel)? else { return Ok(()) };
    let _sockets: Vec<_> = sockets.into_iter().map(SocketFile::at).collect();
    match server {
        Some(server) => serve_clients(server, channel, may_attach),
        None => wait_for_end(channel),
    }
}

fn serve_clients(mut server: Server, channel: &UnixStream, may_attach: bool) -> io::Result<()> {
    let mut opener = may_attach.then(Opener::default);
    loop {
        let descriptors = [channel.as_fd()].into_iter().chain(server.descriptors());
        let mut descriptors: Vec<_> =
            descriptors.map(|one| PollFd::new(one, PollFlags::POLLIN)).collect();
        let timeout = if server.may_have_more() {
            PollTimeout::ZERO
        } else if server.is_deaf() {
            RETRY_MS.into()
        } else {
            PollTimeout::NONE
        };
        poll(&mut descriptors, timeout)?;
        if descriptors[0].any().unwrap_or(true) {
            // Nothing comes unasked but the end.
            return Ok(());
        }
        server.serve(|request, asker| {
            forward(request, asker, channel, opener.as_mut()).unwrap_or_else(|error| {
                let rule = format!("must be there, and the machine's process is not: {error}");
                Response::failure(503, "machine", &rule)
            })
        });
    }
}

fn wait_for_end(channel: &UnixStream) -> io::Result<()> {
    poll(&mut [PollFd::new(channel.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)
}

/// The machine's answer to `request`, for which what it names is opened here. It is up to the machine
/// which of several reasons it refuses a request for.
fn forward(
    request: &Request,
    asker: &Asker,
    channel: &UnixStream,
    opener: Option<&mut Opener>,
) -> io::Result<Response> {
    let opened = opener.map_or(Ok(Opened::default()), |opener| opener.open_for(request, asker));
    let (opened, files) = match opened {
        Ok(Opened { files, mtu }) => (Ok(mtu), files),
        Err(refusal) => (Err(refusal), Vec::new()),
    };
    let order = Order { request: request.clone(), opened, files: Vec::new() };
    let files: Vec<_> = files.iter().map(OwnedFd::as_fd).collect();
    send(channel, &order, &files)?;
    receive(channel)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Sends `message` with `files`: its length in bytes, which the files come with, and then JSON.
fn send(
    channel: &UnixStream,
    message: &impl Serialize,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut text = serde_json::to_vec(message)?;
    let mut length = u32::try_from(text.len()).map_err(io::Error::other)?.to_ne_bytes().to_vec();
    if files.is_empty() {
        length.append(&mut text);
    } else {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Four bytes go at once or not at all.
        sendmsg(channel, &[IoSlice::new(&length)], &mut control, SendFlags::NOSIGNAL)?;
        length = text;
    }
    let mut channel = channel;
    channel.write_all(&length)
}

/// Waits for a message and takes it, without files; `None` if the other end is closed.
fn receive<T: DeserializeOwned>(mut channel: &UnixStream) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match channel.read(&mut length)? {
        0 => Ok(None),
        4 => receive_text(length, channel).map(Some),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A message and its files; none of those if this process has no room for all.
type MessageWithFiles<T> = (T, Option<Vec<OwnedFd>>);

/// The same with its files.
fn receive_with_files<T: DeserializeOwned>(
    channel: &UnixStream,
) -> io::Result<Option<MessageWithFiles<T>>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [IoSliceMut::new(&mut length)];
    let received = recvmsg(channel, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            files.extend(some);
        }
    }
    match received.bytes {
        0 => Ok(None),
        4 => {
            let are_all = !received.flags.contains(ReturnFlags::CTRUNC);
            let message = receive_text(length, channel)?;
            Ok(Some((message, are_all.then_some(files))))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The rest of a message that begins with `length`.
fn receive_text<T: DeserializeOwned>(length: [u8; 4], mut channel: &UnixStream) -> io::Result<T> {
    let length = usize::try_from(u32::from_ne_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_MESSAGE_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; length];
    channel.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use devices::testing::in_a_child;
    use nix::sys::resource::{Resource, setrlimit};

    use super::*;

    #[test]
    fn a_message_arrives_with_its_files() {
        let (one, other) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let text = "x".repeat(100 << 10);

        let sender = std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(&one, &text, &[file.as_fd()]));
            let (received, files) = receive_with_files::<String>(&other).unwrap().unwrap();
            let files = files.unwrap();
            let [sent, received_file] =
                [file.metadata(), File::from(files.into_iter().next().unwrap()).metadata()];
            assert_eq!(received, text);
            assert_eq!(sent.unwrap().ino(), received_file.unwrap().ino());
            sender.join().unwrap()
        });

        sender.unwrap();
    }

    #[test]
    fn a_message_whose_files_find_no_room_arrives_without_them() {
        let (one, other) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();

        assert!(in_a_child(|| {
            send(&one, &"text", &[file.as_fd(), file.as_fd()]).unwrap();
            send(&one, &"more", &[]).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 0, 0).unwrap();
            let (text, files) = receive_with_files::<String>(&other).unwrap().unwrap();
            let (more, none) = receive_with_files::<String>(&other).unwrap().unwrap();
            text == "text" && files.is_none() && more == "more" && none.unwrap().is_empty()
        }));
    }

    #[test]
    fn the_end_of_the_other_process_is_noticed() {
        let (one, other) = UnixStream::pair().unwrap();
        drop(one);
        assert!(receive::<String>(&other).unwrap().is_none());
    }

    #[test]
    fn a_message_without_end_is_refused() {
        let (mut one, other) = UnixStream::pair().unwrap();
        one.write_all(&u32::MAX.to_ne_bytes()).unwrap();
        let error = receive::<String>(&other).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
