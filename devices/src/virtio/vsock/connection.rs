//! One stream between the host and the guest: its state, its credit, and its two directions.

use std::os::fd::OwnedFd;

use vm_memory::VolatileSlice;

use super::credit::{Budget, Credit};
use super::host::End;
use super::output::Output;
use super::packet::{Buffers, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Most data in one packet to the guest, which is also what Linux sends. A guest may offer a buffer
/// of 4 GiB, and one stream must not occupy the event loop.
const MAX_PACKET_BYTES: u32 = 64 << 10;

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The guest has not been asked yet.
    Requesting,
    /// The guest has been asked and did not answer yet.
    Requested,
    /// Data may flow.
    Open,
    /// The guest has forgotten the stream; its last bytes still have to be written.
    Draining,
    /// The stream is over, which the guest has yet to hear.
    Resetting,
    /// Nothing is left to be done.
    Over,
}

/// Packets that have to be sent when there is room.
#[derive(Debug, Default)]
struct Owed {
    response: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One stream. The muxer calls [`Connection::receive`] for each packet of the guest, the `wake_*`
/// functions for events on the host, and [`Connection::next_packet`] while the guest has room.
pub(super) struct Connection {
    state: State,
    /// Sent before anything from the input; short, and empty once it is sent.
    greeting: Vec<u8>,
    /// The host's port, if the output is to hear of it as soon as the guest accepts.
    announced_port: Option<u32>,
    input: Option<End>,
    output: Output,
    on_close: Option<OwnedFd>,
    credit: Credit,
    owed: Owed,
    /// The guest did not half-close its sending direction yet.
    guest_sends: bool,
    /// The guest did not half-close its receiving direction yet.
    guest_receives: bool,
    /// The guest was asked for credit since it last had some.
    asked_for_credit: bool,
}

/// What an attempt to read the input came to.
enum Moved {
    Bytes(u32),
    Nothing,
}

impl Connection {
    /// A stream the host opens, which promises out of `budget`.
    pub fn outgoing(
        input: Option<End>,
        output: Option<End>,
        on_close: Option<OwnedFd>,
        budget: &Budget,
    ) -> Self {
        Connection {
            state: State::Requesting,
            greeting: Vec::new(),
            announced_port: None,
            owed: Owed { shutdown: input.is_none(), ..Owed::default() },
            input,
            output: Output::new(output),
            on_close,
            credit: Credit::new(budget),
            guest_sends: true,
            guest_receives: true,
            asked_for_credit: false,
        }
    }

    /// The same stream with something to say before its input.
    pub fn with_greeting(self, greeting: Vec<u8>) -> Self {
        Connection { greeting, ..self }
    }

    /// The same stream, whose output hears `OK <host_port>\n` before anything of the guest's.
    pub fn announced(self, host_port: u32) -> Self {
        Connection { announced_port: Some(host_port), ..self }
    }

    /// A stream the guest opened with `request`, and the host accepts.
    pub fn incoming(
        input: Option<End>,
        output: Option<End>,
        on_close: Option<OwnedFd>,
        budget: &Budget,
        request: &Header,
    ) -> Self {
        let mut connection = Connection::outgoing(input, output, on_close, budget);
        connection.state = State::Open;
        connection.owed.response = true;
        connection.credit.learn(request);
        connection
    }

    /// Whether the guest has not heard of this stream yet.
    pub fn is_unheard(&self) -> bool {
        self.state == State::Requesting
    }

    /// Whether the guest has forgotten this stream, so that its packets are not meant for it.
    pub fn is_forgotten(&self) -> bool {
        matches!(self.state, State::Draining | State::Over)
    }

    /// Whether the stream can be dropped.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Takes a packet of the guest.
    pub fn receive(&mut self, op: Op, header: &Header, payload: &mut Buffers<'_>) {
        self.credit.learn(header);
        match (self.state, op) {
            (_, Op::Reset) => self.forget(),
            // The RST that this stream owes answers everything.
            (State::Resetting, _) => {}
            (State::Requested, Op::Response) => self.open(),
            (State::Open, Op::Data) => self.take(header.length, payload),
            (State::Open, Op::Shutdown) => self.half_close(header.flags),
            (State::Open, Op::CreditUpdate) => {}
            (State::Open, Op::CreditRequest) => self.owed.credit_update = true,
            _ => self.reset(),
        }
        if self.credit.available() > 0 {
            self.asked_for_credit = false;
        }
        self.settle();
    }

    fn open(&mut self) {
        self.state = State::Open;
        let Some(port) = self.announced_port.take() else { return };
        let mut line = format!("OK {port}\n").into_bytes();
        // An output that nothing was written to takes so little at once, unless nobody is there. What
        // it would not take must not count as the guest's.
        let written = self.output.write(&VolatileSlice::from(&mut line[..]));
        if !matches!(written, Ok(bytes) if bytes == line.len()) {
            self.reset();
        }
    }

    /// Ends the stream from the guest's side; what it sent is still written.
    pub fn forget(&mut self) {
        if self.state == State::Open {
            self.state = State::Draining;
            self.guest_sends = false;
            self.input = None;
            self.credit.forget_guest();
            self.settle();
        } else if self.state != State::Draining {
            self.end(State::Over);
        }
    }

    /// Notes that the input may have something.
    pub fn wake_input(&mut self) {
        if let Some(input) = &mut self.input {
            input.wake();
        }
    }

    /// Notes that the output may take something, and writes what waited for it.
    pub fn wake_output(&mut self) {
        self.output.wake();
        match self.output.flush() {
            Ok(bytes) => self.forwarded(bytes),
            Err(_) => self.reset(),
        }
        self.settle();
    }

    /// Makes the next packet for the guest, with its data in `room`; addresses are left to the caller.
    /// `None` if there is nothing to say until something else happens.
    pub fn next_packet(&mut self, room: &mut Buffers<'_>) -> Option<Header> {
        let packet = match self.state {
            State::Requesting => {
                self.state = State::Requested;
                Some(self.packet(Op::Request, 0, 0))
            }
            State::Open => self.next_open_packet(room),
            State::Resetting => {
                self.end(State::Over);
                Some(self.packet(Op::Reset, 0, 0))
            }
            State::Requested | State::Draining | State::Over => None,
        };
        self.settle();
        packet
    }

    fn next_open_packet(&mut self, room: &mut Buffers<'_>) -> Option<Header> {
        if std::mem::take(&mut self.owed.response) {
            return Some(self.packet(Op::Response, 0, 0));
        }
        if let Moved::Bytes(bytes) = self.send_greeting(room) {
            return Some(self.packet(Op::Data, bytes, 0));
        }
        if let Moved::Bytes(bytes) = self.read_input(room) {
            return Some(self.packet(Op::Data, bytes, 0));
        }
        if self.greeting.is_empty() && std::mem::take(&mut self.owed.shutdown) {
            return Some(self.packet(Op::Shutdown, 0, SHUTDOWN_SEND));
        }
        if std::mem::take(&mut self.owed.credit_request) {
            return Some(self.packet(Op::CreditRequest, 0, 0));
        }
        // Last, because every other packet says the same on its way.
        if std::mem::take(&mut self.owed.credit_update) {
            return Some(self.packet(Op::CreditUpdate, 0, 0));
        }
        None
    }

    fn packet(&mut self, op: Op, length: u32, flags: u32) -> Header {
        self.owed.credit_update = false;
        let mut header = Header { op: op as u16, length, flags, ..Header::default() };
        self.credit.announce(&mut header);
        header
    }

    /// Moves what is left of the greeting into the guest's buffers, as far as its credit goes.
    fn send_greeting(&mut self, room: &mut Buffers<'_>) -> Moved {
        let limit = self.greeting.len().min(self.credit.available() as usize);
        let Some(slice) = (limit > 0).then(|| room.next_slice(limit)).flatten() else {
            return Moved::Nothing;
        };
        slice.copy_from(&self.greeting[..slice.len()]);
        self.greeting.drain(..slice.len());
        let bytes = u32::try_from(slice.len()).expect("a slice is no longer than the limit");
        self.credit.spend(bytes);
        Moved::Bytes(bytes)
    }

    /// Moves bytes from the input straight into the guest's buffers, as far as its credit goes.
    fn read_input(&mut self, room: &mut Buffers<'_>) -> Moved {
        let Some(input) = self.input.as_mut().filter(|input| input.is_ready()) else {
            return Moved::Nothing;
        };
        if !self.greeting.is_empty() {
            return Moved::Nothing;
        }
        let limit = self.credit.available().min(MAX_PACKET_BYTES);
        if limit == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.owed.credit_request = true;
        }
        let mut total = 0;
        let mut is_at_end = false;
        while total < limit {
            let Some(mut slice) = room.next_slice((limit - total) as usize) else { break };
            match input.read(&mut slice) {
                // A hung-up terminal or a reset socket has nothing more to say either.
                Ok(Some(0)) | Err(_) => is_at_end = true,
                Ok(Some(bytes)) => {
                    total += u32::try_from(bytes).expect("a slice is no longer than the limit");
                    if bytes == slice.len() {
                        continue;
                    }
                }
                Ok(None) => {}
            }
            break;
        }
        if is_at_end {
            self.input = None;
            self.owed.shutdown = true;
        }
        if total == 0 {
            return Moved::Nothing;
        }
        self.credit.spend(total);
        Moved::Bytes(total)
    }

    /// Takes `length` bytes of `payload`. A guest that sends more than it may, or less than it says,
    /// loses the stream.
    fn take(&mut self, length: u32, payload: &mut Buffers<'_>) {
        if !self.guest_sends || !self.credit.receive(length) {
            return self.reset();
        }
        let mut left = length as usize;
        while left > 0 {
            let Some(slice) = payload.next_slice(left) else { return self.reset() };
            let Ok(bytes) = self.output.write(&slice) else { return self.reset() };
            self.forwarded(bytes);
            left -= slice.len();
        }
    }

    fn forwarded(&mut self, bytes: usize) {
        self.credit.forward(u32::try_from(bytes).expect("no more than the window is in flight"));
        if self.state == State::Open && self.credit.is_update_due() {
            self.owed.credit_update = true;
        }
    }

    fn half_close(&mut self, flags: u32) {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
        }
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest_receives = false;
            self.greeting.clear();
            self.input = None;
            self.owed.shutdown = false;
        }
    }

    /// Ends what can be ended: the output after its last byte, the stream after both directions.
    fn settle(&mut self) {
        if self.guest_sends || !self.output.is_flushed() {
            return;
        }
        if !self.output.is_closed() {
            self.output.finish();
        }
        let host_is_done = self.input.is_none() && !self.owed.shutdown;
        match self.state {
            State::Open if host_is_done || !self.guest_receives => self.end(State::Resetting),
            State::Draining => self.end(State::Over),
            _ => {}
        }
    }

    fn reset(&mut self) {
        if self.state == State::Draining {
            // The guest is not there to hear it.
            return self.end(State::Over);
        }
        self.end(State::Resetting);
    }

    fn end(&mut self, state: State) {
        self.input = None;
        self.output = Output::Closed;
        self.on_close = None;
        self.state = state;
    }
}
