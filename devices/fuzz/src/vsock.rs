//! The socket device: packets that lie, and streams whose ends come and go.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use devices::virtio::vsock::{Host, HostStream, Vsock};

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, Step, broken_rings, chain, input, request, words};

/// The guest's context identifier.
pub(crate) const CID: u32 = 3;

/// Queues (virtio 1.2, section 5.10.2).
pub(crate) const RECEIVE: u8 = 0;
pub(crate) const TRANSMIT: u8 = 1;
const EVENT: u8 = 2;

/// Ports of the host from which streams are connected, one for each.
const FIRST_SOURCE_PORT: u32 = 1 << 30;

/// Streams that wait for the guest on host ports 0 and so on, and as many that go to its ports.
const STREAMS: u32 = 3;

/// Operations (virtio 1.2, section 5.10.6).
pub(crate) const REQUEST: u32 = 1;
pub(crate) const RESPONSE: u32 = 2;
const RESET: u32 = 3;
const SHUTDOWN: u32 = 4;
pub(crate) const DATA: u32 = 5;
const CREDIT_UPDATE: u32 = 6;
const CREDIT_REQUEST: u32 = 7;

/// A packet of the guest to `port` of the host, which says that it has `length` bytes of data.
pub(crate) fn packet(op: u32, own_port: u32, port: u32, length: u32) -> Vec<u8> {
    let (socket_type, flags, window) = (1, if op == SHUTDOWN { 3 } else { 0 }, 0x4_0000);
    let kind = socket_type | op << 16;
    words(&[CID, 0, 2, 0, own_port, port, length, kind, flags, window, 0])
}

/// A stream whose other end is returned.
fn stream() -> (UnixStream, HostStream) {
    let (ours, theirs) = UnixStream::pair().expect("two descriptors");
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).expect("a socket has this mode");
    }
    let input = theirs.try_clone().expect("a descriptor").into();
    (ours, HostStream { input: Some(input), output: Some(theirs.into()), on_close: None })
}

/// Streams that wait for the guest, and some that go to it.
fn open_streams(host: &Host) -> Vec<UnixStream> {
    let mut ends = Vec::new();
    for port in 0..STREAMS {
        let (ours, theirs) = stream();
        host.listen(port, theirs).expect("the device is there");
        ends.push(ours);
        let (ours, theirs) = stream();
        host.greet(port, b"greeting".to_vec(), theirs).expect("the device is there");
        ends.push(ours);
    }
    ends
}

/// A guest with a socket device and streams at its other end, which the script's host chooses by
/// `what`: it sends bytes into one, or ends it with none, or takes what there is from all above.
pub(crate) fn guest() -> Guest {
    let (device, host) = Vsock::new(CID).expect("an epoll");
    let mut ends = open_streams(&host);
    let mut taken = vec![0; 64 << 10];
    let host = move |what: u8, bytes: &[u8]| {
        let what = usize::from(what);
        let count = ends.len();
        let end = &mut ends[what % count];
        // A stream that is over takes nothing, and has nothing.
        match (what / count % 2, bytes.is_empty()) {
            (0, false) => _ = end.write(bytes),
            (0, true) => _ = end.shutdown(Shutdown::Write),
            _ => _ = end.read(&mut taken),
        }
    };
    Guest::new(device, Box::new(host))
}

/// Whether a guest that has just started is refused a connection that nobody waits for, or hears
/// something else first.
pub(crate) fn assert_answers(guest: &mut Guest) {
    guest.ask(TRANSMIT, &packet(REQUEST, 77, 0x7777, 0), 0);
    let answer = guest.ask(RECEIVE, b"", 4096).expect("an answer");
    assert!(answer.len() >= 44, "a whole header");
}

/// Plays `data`, and then connects to nobody.
pub fn run(data: &[u8]) {
    let mut guest = guest();
    guest.play(data);
    assert_answers(&mut guest);
}

/// Streams from either side, and packets that lie about their length, their credit and their state.
pub fn seeds() -> Vec<Seed> {
    vec![
        ("guest_opens", guest_opens()),
        ("host_opens", host_opens()),
        ("lies", lies()),
        ("broken_receive_rings", input(&broken_rings(RECEIVE))),
        ("broken_transmit_rings", input(&broken_rings(TRANSMIT))),
        ("broken_event_rings", input(&broken_rings(EVENT))),
    ]
}

/// A packet of the guest's stream to port 1, with as much data as it says.
fn send(op: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("data of seeds is short");
    [&packet(op, 50, 1, length), data].concat()
}

/// The guest connects, data goes both ways, and both half-close.
fn guest_opens() -> Vec<u8> {
    let (open, hello) = (send(REQUEST, b""), send(DATA, b"hello"));
    let (update, ask) = (send(CREDIT_UPDATE, b""), send(CREDIT_REQUEST, b""));
    let (shut, end) = (send(SHUTDOWN, b""), send(RESET, b""));
    let room = chain(RECEIVE, b"", 4096);
    input(&[
        START,
        room,
        room,
        room,
        chain(EVENT, b"", 8),
        chain(TRANSMIT, &open, 0),
        request(TRANSMIT, 44, &hello, [0, 0]),
        Step::Host { what: 2, bytes: b"to the guest" },
        chain(TRANSMIT, &ask, 0),
        chain(TRANSMIT, &update, 0),
        Step::Host { what: 2, bytes: b"" },
        chain(TRANSMIT, &shut, 0),
        chain(TRANSMIT, &end, 0),
        START,
        chain(EVENT, b"", 8),
    ])
}

/// The guest accepts a stream of the host and answers.
fn host_opens() -> Vec<u8> {
    let accept = packet(RESPONSE, 0, FIRST_SOURCE_PORT, 0);
    let answer = [packet(DATA, 0, FIRST_SOURCE_PORT, 4), b"back".to_vec()].concat();
    let room = chain(RECEIVE, b"", 4096);
    input(&[
        START,
        room,
        room,
        room,
        room,
        chain(TRANSMIT, &accept, 0),
        Step::Host { what: 1, bytes: b"typed" },
        request(TRANSMIT, 44, &answer, [0, 0]),
        room,
        Step::Host { what: 7, bytes: b"" },
    ])
}

fn lies() -> Vec<u8> {
    let open = send(REQUEST, b"");
    let too_short = [packet(DATA, 50, 1, 5000), b"hello".to_vec()].concat();
    let no_credit = words(&[CID, 0, 2, 0, 50, 1, 0, 1 | CREDIT_UPDATE << 16, 0, 0, u32::MAX]);
    let stranger = words(&[9, 0, 2, 0, 50, 1, 0, 1 | REQUEST << 16, 0, 0, 0]);
    input(&[
        START,
        chain(RECEIVE, b"", 4096),
        chain(TRANSMIT, &open, 0),
        chain(TRANSMIT, &open, 0),
        chain(TRANSMIT, &no_credit, 0),
        chain(TRANSMIT, &too_short, 0),
        chain(TRANSMIT, &stranger, 0),
        chain(TRANSMIT, &open[..20], 0),
        chain(TRANSMIT, b"", 44),
        chain(RECEIVE, b"", 44),
        chain(RECEIVE, b"", u32::MAX),
    ])
}
