//! The control stream: requests in, responses and events out, without blocking.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use agent_protocol::frame::{self, Decoder, FrameError};
use agent_protocol::{Message, Request};
use nix::poll::PollFlags;

/// Unsent bytes beyond which no more requests are taken: the host does not read its answers.
const MAX_UNSENT_BYTES: usize = 1 << 20;

/// Bytes read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// The agent's end of the control stream.
#[derive(Debug)]
pub struct Control {
    stream: File,
    requests: Decoder,
    unsent: Vec<u8>,
    asked: bool,
    ended: bool,
}

impl Control {
    /// Serves `stream`, which is in non-blocking mode.
    pub fn new(stream: OwnedFd) -> Self {
        let stream = File::from(stream);
        let (requests, unsent) = (Decoder::default(), Vec::new());
        Self { stream, requests, unsent, asked: false, ended: false }
    }

    /// What to wait for; `idle` means that a request could be served now.
    pub fn interest(&self, idle: bool) -> PollFlags {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::POLLIN, idle && self.unsent.len() < MAX_UNSENT_BYTES);
        interest.set(PollFlags::POLLOUT, !self.unsent.is_empty());
        interest
    }

    /// Whether a request has arrived yet.
    pub fn was_asked(&self) -> bool {
        self.asked
    }

    /// Whether the host closed the stream.
    pub fn is_over(&self) -> bool {
        self.ended
    }

    /// Whether everything was sent.
    pub fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// The next request, if one has arrived. An error means that the stream makes no sense any more.
    pub fn take(&mut self) -> Result<Option<Request>, FrameError> {
        let mut bytes = [0; CHUNK_BYTES];
        loop {
            if let Some(request) = self.requests.take()? {
                self.asked = true;
                return Ok(Some(request));
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    self.ended = true;
                    return Ok(None);
                }
                Ok(count) => self.requests.push(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Queues a message and sends what can be sent.
    pub fn send(&mut self, message: &Message) -> Result<(), FrameError> {
        self.unsent.extend(frame::encode(message)?);
        Ok(self.flush()?)
    }

    /// Sends what can be sent.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
