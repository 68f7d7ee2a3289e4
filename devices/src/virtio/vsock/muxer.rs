//! Carries all streams over one pair of queues: who a packet is for, and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use log::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::connection::Connection;
use super::credit::Budget;
use super::door::{CallerNumber, Door};
use super::host::{Command, End, Host, HostStream};
use super::packet::{Buffers, HEADER_LENGTH, HOST_CID, Header, HeaderRoom, Op, TYPE_STREAM};
use crate::listener::Listener;
use crate::virtio::complaints::Complaints;

/// Most streams at one time, whoever opened them.
const MAX_CONNECTIONS: usize = 4096;

/// Refusals kept until the guest has room for them; while there are so many, no packet is taken.
const MAX_REFUSALS: usize = 64;

/// Ports from which the host connects, above those that anyone listens on.
const FIRST_SOURCE_PORT: u32 = 1 << 30;

/// The host port of no stream (VMADDR_PORT_ANY): epoll tokens that have it are not streams.
const NO_PORT: u32 = u32::MAX;

/// The epoll token of the handle's eventfd.
const COMMANDS: u64 = u64::MAX;

/// The epoll token of the door's listener.
const DOOR: u64 = COMMANDS - 1;

/// Events taken from the epoll in one call.
const EVENTS_AT_ONCE: usize = 64;

/// The two ports of a stream, which tell it from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

impl Ports {
    fn token(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    #[expect(clippy::cast_possible_truncation, reason = "takes the two halves apart")]
    fn from_token(token: u64) -> Self {
        Ports { host: (token >> 32) as u32, guest: token as u32 }
    }
}

struct Entry {
    connection: Connection,
    is_runnable: bool,
}

/// The epoll token of a client at the door; numbers are far below those of the tokens above.
fn caller_token(number: CallerNumber) -> u64 {
    Ports { host: NO_PORT, guest: number }.token()
}

/// Every stream of one guest. Its epoll holds the descriptors of all of them, so that the event loop
/// sees a single one however many come and go.
pub(super) struct Muxer {
    guest_cid: u64,
    epoll: Arc<Epoll>,
    wake: Arc<EventFd>,
    commands: Receiver<Command>,
    connections: HashMap<Ports, Entry>,
    /// What the guest may have in flight on all of them.
    budget: Budget,
    listeners: HashMap<u32, HostStream>,
    door: Option<Door>,
    /// Clients may wait at the door whom no event will report again.
    is_door_due: bool,
    /// Streams that may have a packet for the guest, in the order of their turns.
    runnable: VecDeque<Ports>,
    refusals: VecDeque<Header>,
    complaints: Complaints,
    next_source_port: u32,
}

impl Muxer {
    /// A muxer without streams, the handle to give it some, and the socket at which clients come for
    /// theirs.
    pub fn new(guest_cid: u32, socket: Option<Listener>) -> io::Result<(Self, Host)> {
        let epoll = Arc::new(Epoll::new()?);
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, COMMANDS);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        let door = socket.map(|socket| Door::open(socket, &epoll, DOOR)).transpose()?;
        let (sender, commands) = channel();
        let host = Host::new(sender, wake.clone());
        let muxer = Muxer {
            guest_cid: guest_cid.into(),
            epoll,
            wake,
            commands,
            connections: HashMap::new(),
            budget: Budget::default(),
            listeners: HashMap::new(),
            door,
            is_door_due: false,
            runnable: VecDeque::new(),
            refusals: VecDeque::new(),
            complaints: Complaints::of("vsock"),
            next_source_port: FIRST_SOURCE_PORT,
        };
        Ok((muxer, host))
    }

    /// The descriptor to wait on, edge-triggered, before [`Muxer::poll`].
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes every event and every command there is.
    pub fn poll(&mut self) {
        loop {
            let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
            let count = match self.epoll.wait(0, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return warn!("vsock: wait for streams: {error}"),
            };
            for event in &events[..count] {
                self.take_event(*event);
            }
            // Each event is taken once, as all are edge-triggered; so fewer than fit are all.
            if count < EVENTS_AT_ONCE {
                break;
            }
        }
        if self.is_door_due {
            self.let_clients_in();
        }
    }

    fn take_event(&mut self, event: EpollEvent) {
        match event.data() {
            COMMANDS => {
                // It only fails when there is nothing to read, because the event is an old one.
                let _ = self.wake.read();
                return self.obey_commands();
            }
            DOOR => return self.is_door_due = true,
            token if Ports::from_token(token).host == NO_PORT => {
                return self.hear(Ports::from_token(token).guest);
            }
            _ => {}
        }
        let broken = EventSet::HANG_UP | EventSet::ERROR;
        let readable = event.event_set().intersects(EventSet::IN | broken);
        let writable = event.event_set().intersects(EventSet::OUT | broken);
        self.with(Ports::from_token(event.data()), |connection| {
            if readable {
                connection.wake_input();
            }
            if writable {
                connection.wake_output();
            }
        });
    }

    fn let_clients_in(&mut self) {
        let Some(door) = &mut self.door else { return };
        match door.let_in(&self.epoll, caller_token) {
            // The only failure is a counter at its maximum, and then the event is pending anyway.
            Ok(true) => _ = self.wake.write(1),
            Ok(false) => self.is_door_due = false,
            // Out of descriptors, most likely: whoever waits is let in after some other event.
            Err(error) => self.complain(&format_args!("let a client in: {error}")),
        }
    }

    /// Listens to a client at the door, and connects it once it has said to which port.
    fn hear(&mut self, number: CallerNumber) {
        let Some(call) = self.door.as_mut().and_then(|door| door.hear(number)) else { return };
        let ports = Ports { host: self.free_source_port(call.port), guest: call.port };
        if let Some((input, output)) = self.watch(ports, call.stream.input, call.stream.output) {
            let connection = Connection::outgoing(input, output, None, &self.budget);
            self.insert(ports, connection.with_greeting(call.rest).announced(ports.host));
        }
    }

    fn obey_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Connect { port, greeting, stream } => self.connect(port, greeting, stream),
                Command::Listen { port, stream } => {
                    self.listeners.insert(port, stream);
                }
            }
        }
    }

    fn connect(&mut self, guest: u32, greeting: Vec<u8>, stream: HostStream) {
        let ports = Ports { host: self.free_source_port(guest), guest };
        if let Some((input, output)) = self.watch(ports, stream.input, stream.output) {
            let connection = Connection::outgoing(input, output, stream.on_close, &self.budget);
            self.insert(ports, connection.with_greeting(greeting));
        }
    }

    fn free_source_port(&mut self, guest: u32) -> u32 {
        // There are far more ports than streams, so one is free.
        loop {
            let host = self.next_source_port;
            self.next_source_port = host + 1;
            if self.next_source_port == NO_PORT {
                self.next_source_port = FIRST_SOURCE_PORT;
            }
            if !self.connections.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn watch(
        &mut self,
        ports: Ports,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Option<(Option<End>, Option<End>)> {
        if self.connections.len() >= MAX_CONNECTIONS {
            self.complain(&format_args!("a stream is dropped: there are {MAX_CONNECTIONS}"));
            return None;
        }
        let watch = |fd, events| End::new(fd, &self.epoll, events, ports.token());
        let input = input.map(|fd| watch(fd, EventSet::IN)).transpose();
        let output = output.map(|fd| watch(fd, EventSet::OUT)).transpose();
        match (input, output) {
            (Ok(input), Ok(output)) => Some((input, output)),
            (Err(error), _) | (_, Err(error)) => {
                self.complain(&format_args!("stream with port {} dropped: {error}", ports.guest));
                None
            }
        }
    }

    fn insert(&mut self, ports: Ports, connection: Connection) {
        self.connections.insert(ports, Entry { connection, is_runnable: true });
        self.runnable.push_back(ports);
    }

    /// Lets `act` change a stream, gives it a turn, and drops it if that was its end.
    fn with(&mut self, ports: Ports, act: impl FnOnce(&mut Connection)) {
        let Some(entry) = self.connections.get_mut(&ports) else { return };
        act(&mut entry.connection);
        if entry.connection.is_over() {
            // With its turn: a guest that takes no packets may begin and end streams for ever.
            if entry.is_runnable {
                self.runnable.retain(|waiting| *waiting != ports);
            }
            self.connections.remove(&ports);
        } else if !std::mem::replace(&mut entry.is_runnable, true) {
            self.runnable.push_back(ports);
        }
    }

    /// How many turns are waited for.
    #[cfg(test)]
    pub fn turns(&self) -> usize {
        self.runnable.len()
    }

    /// What the guest was promised on all streams together, in bytes.
    #[cfg(test)]
    pub fn promised(&self) -> u32 {
        self.budget.promised()
    }

    /// Whether one more packet of the guest can be answered.
    pub fn can_receive(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Takes one packet of the guest. Call only after [`Muxer::can_receive`].
    pub fn receive(&mut self, mut packet: Buffers<'_>) {
        let Some(header) = packet.read_header() else {
            return self.complain(&"a packet is shorter than its header");
        };
        if header.source_cid != self.guest_cid {
            return self.complain(&"a packet does not come from the guest");
        }
        let ports = Ports { host: header.destination_port, guest: header.source_port };
        let is_ours = header.destination_cid == HOST_CID && header.socket_type == TYPE_STREAM;
        let Some(op) = Op::from_number(header.op).filter(|_| is_ours) else {
            return self.refuse(&header);
        };
        match self.connections.get(&ports) {
            Some(entry) if !entry.connection.is_forgotten() => {
                self.with(ports, |connection| connection.receive(op, &header, &mut packet));
            }
            None if op == Op::Request => self.accept(ports, &header),
            _ => self.refuse(&header),
        }
    }

    fn accept(&mut self, ports: Ports, request: &Header) {
        if ports.host == NO_PORT {
            return self.refuse(request);
        }
        // The host may have told the guest to connect right after it started to listen, and then
        // the guest can be quicker than the event.
        self.obey_commands();
        let waiting = self.listeners.remove(&ports.host);
        let dial = || self.door.as_ref()?.dial(ports.host).ok();
        let Some(stream) = waiting.or_else(dial) else { return self.refuse(request) };
        match self.watch(ports, stream.input, stream.output) {
            Some((input, output)) => {
                let connection =
                    Connection::incoming(input, output, stream.on_close, &self.budget, request);
                self.insert(ports, connection);
            }
            None => self.refuse(request),
        }
    }

    /// Logs, a few times at most, `what` the guest did.
    pub fn complain(&mut self, what: &dyn Display) {
        self.complaints.add(what);
    }

    fn refuse(&mut self, header: &Header) {
        // An RST that answers an RST would be answered by an RST.
        if header.op != Op::Reset as u16 {
            self.refusals.push_back(header.refusal());
        }
    }

    /// Puts the next packet for the guest into `room` and `data`, and returns its size in bytes;
    /// `None` if there is none.
    pub fn send(&mut self, room: HeaderRoom<'_>, data: &Buffers<'_>) -> Option<u32> {
        let header = match self.refusals.pop_front() {
            Some(refusal) => refusal,
            None => self.next_packet(data)?,
        };
        room.write(&header);
        Some(HEADER_LENGTH + header.length)
    }

    /// Gives every runnable stream its turn until one has a packet.
    fn next_packet(&mut self, data: &Buffers<'_>) -> Option<Header> {
        while let Some(ports) = self.runnable.pop_front() {
            let Some(entry) = self.connections.get_mut(&ports) else { continue };
            let packet = entry.connection.next_packet(&mut data.clone());
            entry.is_runnable = packet.is_some() && !entry.connection.is_over();
            if entry.is_runnable {
                self.runnable.push_back(ports);
            } else if entry.connection.is_over() {
                self.connections.remove(&ports);
            }
            if let Some(packet) = packet {
                return Some(self.addressed(packet, ports));
            }
        }
        None
    }

    fn addressed(&self, packet: Header, ports: Ports) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: ports.host,
            destination_port: ports.guest,
            socket_type: TYPE_STREAM,
            ..packet
        }
    }

    /// Whether the guest knows of a stream.
    pub fn is_known_to_guest(&self) -> bool {
        self.connections.values().any(|entry| !entry.connection.is_unheard())
    }

    /// The port from which the host connects next.
    pub fn next_source_port(&self) -> u32 {
        self.next_source_port
    }

    /// Makes the host connect from `port` on, so that no stream looks like one of the past.
    pub fn connect_from(&mut self, port: u32) {
        self.next_source_port = port.clamp(FIRST_SOURCE_PORT, NO_PORT - 1);
    }

    /// Ends all streams the guest knew of, because it was reset; returns whether there were any.
    /// What it sent is still written, and what it has not heard of still waits for it.
    pub fn forget_guest(&mut self) -> bool {
        let mut was_known = false;
        self.connections.retain(|_, entry| {
            if !entry.connection.is_unheard() {
                was_known = true;
                entry.connection.forget();
            }
            !entry.connection.is_over()
        });
        self.runnable.retain(|ports| self.connections.contains_key(ports));
        self.refusals.clear();
        was_known
    }
}
