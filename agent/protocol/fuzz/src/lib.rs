//! Frames of the agent protocol from a peer that lies: what `make fuzz` mutates.

use std::alloc::System;

use agent_protocol::frame::{self, Decoder, MAX_FRAME_BYTES};
use agent_protocol::{Event, Message, Request, StreamHello};
use cap::Cap;

/// Room for some of the longest frames; an allocation beyond that aborts.
#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, 16 * MAX_FRAME_BYTES as usize);

/// A stream, read as each kind of message the two sides wait for, in one piece and in small ones.
pub fn frame(data: &[u8]) {
    // What the host reads.
    let mut blocking = data;
    while let Ok(Some(message)) = frame::read::<Message>(&mut blocking) {
        if let Message::Event(Event::Exited { status, .. }) = &message {
            status.shell_code();
        }
        let bytes = frame::encode(&message).expect("what was read can be sent");
        assert_eq!(frame::read(&mut &bytes[..]).ok().flatten(), Some(message), "it reads the same");
    }
    let mut decoder = Decoder::default();
    for piece in data.chunks(7) {
        decoder.push(piece);
        while let Ok(Some(_)) = decoder.take::<Message>() {}
    }
    // What the guest reads.
    let _ = frame::read::<Request>(&mut &data[..]);
    let _ = frame::read::<StreamHello>(&mut &data[..]);
}
