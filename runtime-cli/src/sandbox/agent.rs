//! The sandbox process's connection to the agent in its guest.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use agent_protocol::frame::{self, Decoder, FrameError};
use agent_protocol::{Event, Message, Request, Response};

/// How much is read at once, in bytes.
const CHUNK_BYTES: usize = 4096;

/// Requests that wait for the guest to take them, in bytes: beyond this it hangs.
const MAX_OUTGOING_BYTES: usize = 8 << 20;

/// Why the agent cannot be talked to any more. The guest is not trusted, so each of these ends it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream ended: the agent is PID 1, so the guest is about to end too.
    #[error("the agent in the guest ended")]
    Ended,
    /// The stream broke.
    #[error("talk to the agent in the guest")]
    Io(#[from] io::Error),
    /// The agent sent what is no message.
    #[error(
        "the agent in the guest sent a message that does not decode: is the guest image \
             of the same version as coracle?"
    )]
    Frame(#[from] FrameError),
    /// The agent answered what was not asked.
    #[error("the agent in the guest answered a question that was not asked")]
    Unasked,
    /// The agent takes no requests.
    #[error("the agent in the guest does not read its requests")]
    Stuck,
}

/// Who asked the agent, and what to do with the answer.
#[derive(Debug)]
pub(super) enum Asker {
    /// A signal that nobody waits for, or a step of `create`.
    Nobody,
    /// The client of this number.
    Peer(u64),
    /// The client that starts the container.
    Start(u64),
    /// The client that freezes (`true`) or thaws it.
    Freeze(u64, bool),
    /// The client that changes the machine, and still has these cgroup files to be written.
    Update(u64, Vec<(String, String)>),
    /// The network of the guest, which changes.
    Network,
    /// Whoever tells what others change.
    Changes,
    /// The client that starts a process of this name.
    Exec(u64, String),
}

/// Something the agent said; `W` is who waits for a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said<W> {
    /// The answer to the oldest request, for the one who asked.
    Answer(W, Response),
    /// Something that happened by itself.
    Event(Event),
}

/// The connection, which never blocks.
#[derive(Debug)]
pub(super) struct Agent<W> {
    stream: UnixStream,
    decoder: Decoder,
    outgoing: Vec<u8>,
    waiting: VecDeque<W>,
}

impl<W> Agent<W> {
    /// An agent at the other end of `stream`.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            decoder: Decoder::default(),
            outgoing: Vec::new(),
            waiting: VecDeque::new(),
        })
    }

    /// Sends a request, now or when the guest takes it; `waiter` comes back with the response.
    pub(super) fn ask(&mut self, request: &Request, waiter: W) -> Result<(), Error> {
        let bytes = frame::encode(request)?;
        if self.outgoing.len() + bytes.len() > MAX_OUTGOING_BYTES {
            return Err(Error::Stuck);
        }
        self.outgoing.extend_from_slice(&bytes);
        self.waiting.push_back(waiter);
        self.flush()
    }

    /// Sends what is still to be sent, as far as the guest takes it.
    pub(super) fn flush(&mut self) -> Result<(), Error> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        // A container description is large, and the only large request there is.
        self.outgoing.shrink_to(CHUNK_BYTES);
        Ok(())
    }

    /// Whether there is something left to send.
    pub(super) fn wants_to_send(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Takes what has arrived, a bounded amount at a time.
    pub(super) fn receive(&mut self) -> Result<(), Error> {
        let mut bytes = [0; CHUNK_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(Error::Ended),
            Ok(count) => {
                self.decoder.push(&bytes[..count]);
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The next whole thing said.
    pub(super) fn next(&mut self) -> Result<Option<Said<W>>, Error> {
        Ok(match self.decoder.take()? {
            None => None,
            Some(Message::Event(event)) => Some(Said::Event(event)),
            Some(Message::Response(response)) => {
                let waiter = self.waiting.pop_front().ok_or(Error::Unasked)?;
                Some(Said::Answer(waiter, response))
            }
        })
    }
}

impl<W> AsFd for Agent<W> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Agent<u32>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Agent::new(ours).unwrap(), theirs)
    }

    #[test]
    fn answers_go_to_those_who_asked_in_order_and_events_come_between() {
        let (mut agent, mut guest) = pair();
        let oom = Event::OutOfMemory { container: "a".into() };

        agent.ask(&Request::Shutdown, 1).unwrap();
        agent.ask(&Request::Shutdown, 2).unwrap();
        for message in [
            Message::Response(Response::Done),
            Message::Event(oom.clone()),
            Message::Response(Response::Created { pid: 7 }),
        ] {
            frame::write(&mut guest, &message).unwrap();
        }
        agent.receive().unwrap();

        assert_eq!(agent.next().unwrap(), Some(Said::Answer(1, Response::Done)));
        assert_eq!(agent.next().unwrap(), Some(Said::Event(oom)));
        assert_eq!(agent.next().unwrap(), Some(Said::Answer(2, Response::Created { pid: 7 })));
        assert_eq!(agent.next().unwrap(), None);
    }

    #[test]
    fn an_answer_that_nobody_asked_for_is_an_error() {
        let (mut agent, mut guest) = pair();

        frame::write(&mut guest, &Message::Response(Response::Done)).unwrap();
        agent.receive().unwrap();

        assert!(matches!(agent.next(), Err(Error::Unasked)));
    }

    #[test]
    fn a_guest_that_reads_nothing_is_given_up_at_a_bound() {
        let (mut agent, _guest) = pair();
        let files = vec![("x".repeat(1 << 20), String::new())];
        let update = Request::Update { container: String::new(), files };

        let outcome = (0..20).try_for_each(|number| agent.ask(&update, number));

        assert!(matches!(outcome, Err(Error::Stuck)));
        assert!(agent.wants_to_send());
    }

    #[test]
    fn an_agent_that_is_gone_is_noticed() {
        let (mut agent, guest) = pair();

        drop(guest);

        assert!(matches!(agent.receive(), Err(Error::Ended)));
    }
}
