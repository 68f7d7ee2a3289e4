//! A stdio stream that was accepted and has not yet said whose it is.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use agent_protocol::{StreamHello, frame};
use nix::errno::Errno;
use nix::unistd::read;

/// Largest hello taken; it holds two short names.
const MAX_HELLO_BYTES: usize = 4096;

const PREFIX_BYTES: usize = 4;

/// A stream and what has come of its hello.
#[derive(Debug)]
pub struct Greeting {
    stream: OwnedFd,
    bytes: Vec<u8>,
}

/// How far a greeting has come.
#[derive(Debug)]
pub enum Progress {
    /// More has to arrive.
    Waiting(Greeting),
    /// Whose stream it is; the next byte in it is the first of the process.
    Done(StreamHello, OwnedFd),
    /// It ended early or makes no sense, and is closed.
    Refused,
}

impl Greeting {
    /// Waits for the hello of `stream`, which is in non-blocking mode.
    pub fn new(stream: OwnedFd) -> Self {
        Self { stream, bytes: Vec::new() }
    }

    /// Reads on, but never beyond the hello.
    pub fn advance(mut self) -> Progress {
        loop {
            let Some(missing) = self.missing() else { return Progress::Refused };
            if missing == 0 {
                return match frame::read(&mut self.bytes.as_slice()) {
                    Ok(Some(hello)) => Progress::Done(hello, self.stream),
                    _ => Progress::Refused,
                };
            }
            let filled = self.bytes.len();
            self.bytes.resize(filled + missing, 0);
            let result = read(&self.stream, &mut self.bytes[filled..]);
            self.bytes.truncate(filled + result.unwrap_or(0));
            match result {
                Ok(1..) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Progress::Waiting(self),
                _ => return Progress::Refused,
            }
        }
    }

    /// Bytes still to read before more is known; nothing if the hello is too long.
    fn missing(&self) -> Option<usize> {
        let Some(prefix) = self.bytes.first_chunk::<PREFIX_BYTES>() else {
            return Some(PREFIX_BYTES - self.bytes.len());
        };
        let length = usize::try_from(u32::from_le_bytes(*prefix)).ok()?;
        (length <= MAX_HELLO_BYTES).then(|| PREFIX_BYTES + length - self.bytes.len())
    }
}

impl AsFd for Greeting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use agent_protocol::StdioStream;

    use super::*;

    fn pair() -> (UnixStream, Greeting) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        (host, Greeting::new(guest.into()))
    }

    fn hello() -> StreamHello {
        StreamHello { container: "c".into(), process: String::new(), stream: StdioStream::Stdin }
    }

    #[test]
    fn bytes_after_the_hello_stay_in_the_stream() {
        let (mut host, greeting) = pair();
        host.write_all(&frame::encode(&hello()).unwrap()).unwrap();
        host.write_all(b"data").unwrap();

        let Progress::Done(found, stream) = greeting.advance() else { panic!("it is complete") };

        assert_eq!(found, hello());
        let mut bytes = [0; 4];
        UnixStream::from(stream).read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"data");
    }

    #[test]
    fn a_hello_may_come_in_pieces() {
        let (mut host, greeting) = pair();
        let bytes = frame::encode(&hello()).unwrap();

        host.write_all(&bytes[..5]).unwrap();
        let Progress::Waiting(greeting) = greeting.advance() else { panic!("it is incomplete") };
        host.write_all(&bytes[5..]).unwrap();

        assert!(matches!(greeting.advance(), Progress::Done(..)));
    }

    #[test]
    fn a_hello_that_is_too_long_is_refused() {
        let (mut host, greeting) = pair();
        host.write_all(&u32::MAX.to_le_bytes()).unwrap();

        assert!(matches!(greeting.advance(), Progress::Refused));
    }
}
