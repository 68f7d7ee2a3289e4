//! Length-prefixed frames: a little-endian `u32` byte count, then that many bytes of postcard.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest frame either side accepts, in bytes; a container description with a seccomp filter and
/// hundreds of mounts stays far below it.
pub const MAX_FRAME_BYTES: u32 = 4 << 20;

/// Why a frame could not be moved.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed or ended inside a frame.
    #[error("frame cut short")]
    Io(#[from] io::Error),
    /// The peer announced more than [`MAX_FRAME_BYTES`], or the message to send is larger.
    #[error("frame of {0} bytes is larger than the limit of {MAX_FRAME_BYTES}")]
    TooLarge(u64),
    /// The bytes are no message of the expected type.
    #[error("frame does not decode")]
    Decode(#[from] postcard::Error),
}

/// The bytes of `message` as one frame.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0; 4])?;
    let length = bytes.len() - 4;
    let prefix = u32::try_from(length)
        .ok()
        .filter(|length| *length <= MAX_FRAME_BYTES)
        .ok_or(FrameError::TooLarge(length as u64))?;
    bytes[..4].copy_from_slice(&prefix.to_le_bytes());
    Ok(bytes)
}

/// Sends `message` as one frame.
pub fn write<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), FrameError> {
    stream.write_all(&encode(message)?)?;
    Ok(())
}

/// Blocks for one frame; `None` when the stream ends before its first byte.
pub fn read<T: DeserializeOwned>(stream: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut prefix = [0; 4];
    let mut filled = 0;
    while filled < prefix.len() {
        match stream.read(&mut prefix[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_le_bytes(prefix);
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge(length.into()));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body)?;
    Ok(Some(postcard::from_bytes(&body)?))
}

/// Collects frames from a stream that is read without blocking.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Adds bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if one is there.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some((prefix, rest)) = self.bytes.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*prefix);
        if length > MAX_FRAME_BYTES {
            return Err(FrameError::TooLarge(length.into()));
        }
        let Some(body) = rest.get(..length as usize) else { return Ok(None) };
        let message = postcard::from_bytes(body)?;
        self.bytes.drain(..4 + length as usize);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, Message};

    fn ready() -> Message {
        Message::Event(Event::Ready {
            version: 1,
            kernel: "6.12".into(),
            started_us: 5,
            uptime_us: 7,
        })
    }

    #[test]
    fn a_frame_comes_back_as_it_was() {
        let bytes = encode(&ready()).unwrap();

        assert_eq!(read::<Message>(&mut bytes.as_slice()).unwrap(), Some(ready()));
    }

    #[test]
    fn end_of_stream_before_a_frame_is_no_error() {
        assert_eq!(read::<Message>(&mut io::empty()).unwrap(), None);
    }

    #[test]
    fn end_of_stream_inside_a_frame_is_an_error() {
        let bytes = encode(&ready()).unwrap();

        assert!(read::<Message>(&mut &bytes[..3]).is_err());
        assert!(read::<Message>(&mut &bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn an_announced_length_beyond_the_limit_is_refused_before_allocation() {
        let bytes = u32::MAX.to_le_bytes();

        assert!(matches!(read::<Message>(&mut bytes.as_slice()), Err(FrameError::TooLarge(_))));
    }

    #[test]
    fn the_decoder_waits_for_the_last_byte() {
        let bytes = encode(&ready()).unwrap();
        let mut decoder = Decoder::default();

        decoder.push(&bytes[..bytes.len() - 1]);
        assert_eq!(decoder.take::<Message>().unwrap(), None);
        decoder.push(&bytes[bytes.len() - 1..]);

        assert_eq!(decoder.take().unwrap(), Some(ready()));
        assert_eq!(decoder.take::<Message>().unwrap(), None);
    }
}
