//! Where the bytes of a guest go: straight to a descriptor, or to memory while that one blocks.

use std::io;

use vm_memory::{VolatileSlice, WriteVolatile};

use super::host::End;

/// The guest-to-host direction of one stream.
pub(super) enum Output {
    /// Nobody listens; what comes is thrown away.
    Discard,
    /// Bytes go to `end`, after those of `backlog`.
    Open { end: End, backlog: Backlog },
    /// The direction is over.
    Closed,
}

/// Bytes that the descriptor did not take yet; the stream's credit bounds them.
#[derive(Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    written: usize,
}

impl Output {
    /// Starts with an empty backlog; no end means to throw everything away.
    pub fn new(end: Option<End>) -> Self {
        match end {
            Some(end) => Output::Open { end, backlog: Backlog::default() },
            None => Output::Discard,
        }
    }

    /// Takes all of `slice`; returns how many bytes left the host's memory at once.
    pub fn write(&mut self, slice: &VolatileSlice<'_>) -> io::Result<usize> {
        let (end, backlog) = match self {
            Output::Open { end, backlog } => (end, backlog),
            Output::Discard => return Ok(slice.len()),
            Output::Closed => return Err(io::ErrorKind::BrokenPipe.into()),
        };
        let mut done = 0;
        if backlog.is_empty() {
            while done < slice.len() {
                let rest = slice.offset(done).map_err(io::Error::other)?;
                let Some(bytes) = end.write(&rest)? else { break };
                done += bytes;
            }
        }
        if done < slice.len() {
            backlog.append(&slice.offset(done).map_err(io::Error::other)?)?;
        }
        Ok(done)
    }

    /// Writes the backlog as far as it goes; returns how many bytes went.
    pub fn flush(&mut self) -> io::Result<usize> {
        let Output::Open { end, backlog } = self else { return Ok(0) };
        let mut done = 0;
        while !backlog.is_empty() {
            let rest = backlog.rest();
            let Some(bytes) = end.write(&VolatileSlice::from(rest))? else { break };
            backlog.consume(bytes);
            done += bytes;
        }
        Ok(done)
    }

    /// Notes that the descriptor may take bytes again.
    pub fn wake(&mut self) {
        if let Output::Open { end, .. } = self {
            end.wake();
        }
    }

    /// Whether no byte waits.
    pub fn is_flushed(&self) -> bool {
        !matches!(self, Output::Open { backlog, .. } if !backlog.is_empty())
    }

    /// Whether the direction is over.
    pub fn is_closed(&self) -> bool {
        matches!(self, Output::Closed)
    }

    /// Ends the direction properly, after the last byte.
    pub fn finish(&mut self) {
        if let Output::Open { end, .. } = std::mem::replace(self, Output::Closed) {
            end.finish_writing();
        }
    }
}

impl Backlog {
    fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    fn rest(&mut self) -> &mut [u8] {
        &mut self.bytes[self.written..]
    }

    fn append(&mut self, slice: &VolatileSlice<'_>) -> io::Result<()> {
        // Moving the rest down only when it is the smaller half makes the cost per byte constant.
        if self.written >= self.bytes.len() / 2 {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
        self.bytes.write_all_volatile(slice).map_err(io::Error::other)
    }

    fn consume(&mut self, bytes: usize) {
        self.written += bytes;
        if self.is_empty() {
            // A stream that blocked once must not keep its memory for ever.
            *self = Backlog::default();
        }
    }
}
