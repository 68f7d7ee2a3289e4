//! The network device: frames both ways, the control queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use devices::virtio::net::{Link, Net};

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, Step, broken_rings, chain, request, variant};

/// Queues of a device with two pairs.
const RECEIVE: u8 = 0;
const TRANSMIT: u8 = 1;
const CONTROL: u8 = 4;

/// What the script's host does: sends a frame, or takes what came.
const SEND: u8 = 0;
const TAKE: u8 = 1;

/// One end of a cable.
struct Cable(UnixDatagram);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&self, _: libc::c_uint) -> io::Result<()> {
        Ok(())
    }

    fn mtu(&self) -> Option<u16> {
        Some(1500)
    }

    fn set_attached(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// A guest with 1 to 3 queue pairs, and the other end of the first cable.
pub(crate) fn guest(variant: u8) -> (Guest, UnixDatagram) {
    let mut cables = Vec::new();
    let mut ends = Vec::new();
    for _ in 0..=variant % 3 {
        let (ours, theirs) = UnixDatagram::pair().expect("two descriptors");
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).expect("a socket has this mode");
        }
        cables.push(Cable(ours));
        ends.push(theirs);
    }
    let first = ends[0].try_clone().expect("a descriptor");
    let host = move |what: u8, bytes: &[u8]| {
        let end = &ends[usize::from(what / 2) % ends.len()];
        // A cable that is full loses frames.
        let _ = if what % 2 == SEND { end.send(bytes) } else { end.recv(&mut []) };
    };
    (Guest::new(Net::new(cables, [2, 0, 0, 0, 0, 1]), Box::new(host)), first)
}

/// Plays `data`, whose first byte says how many queue pairs there are, and then transmits a frame.
pub fn run(data: &[u8]) {
    let Some((&variant, data)) = data.split_first() else { return };
    let (mut guest, cable) = guest(variant);
    guest.play(data);
    while cable.recv(&mut []).is_ok() {}
    guest.ask(TRANSMIT, &[7; 72], 0);
    let mut frame = [0; 128];
    assert_eq!(cable.recv(&mut frame).ok(), Some(72), "a frame on the cable");
}

/// Frames of all sizes, and commands.
pub fn seeds() -> Vec<Seed> {
    let frame = [7; 1514 + 12];
    let send = |length: usize| Step::Host { what: SEND, bytes: &frame[..length] };
    let good = [
        START,
        chain(RECEIVE, b"", 4096),
        chain(RECEIVE, b"", 0x1_0100),
        send(1526),
        send(72),
        request(TRANSMIT, 12, &frame[..112], [0, 0]),
        request(TRANSMIT, 0, &frame, [0, 0]),
        Step::Host { what: TAKE, bytes: b"" },
        request(CONTROL, 2, &[4, 0, 2, 0], [1, 0]),
        request(CONTROL, 2, &[4, 0, 1, 0], [1, 0]),
    ];
    // Without mergeable buffers (bit 15) and without anything.
    let plain = [
        Step::Start { features: !(1 << 15), halved: 5 },
        chain(RECEIVE, b"", 0x1_0100),
        send(300),
        Step::Start { features: 0, halved: 0 },
        chain(RECEIVE, b"", 1526),
        send(1526),
    ];
    let bad = [
        START,
        chain(RECEIVE, b"", 11),
        chain(RECEIVE, b"x", 0),
        chain(RECEIVE, b"", u32::MAX),
        send(13),
        send(0),
        chain(TRANSMIT, &frame[..20], 0),
        chain(TRANSMIT, b"", 64),
        request(CONTROL, 2, &[4, 0, 0, 0], [1, 0]),
        request(CONTROL, 2, &[4, 0, 0xff, 0xff], [1, 0]),
        request(CONTROL, 1, &[9, 9, 9], [1, 0]),
        request(CONTROL, 2, &[4, 0, 1, 0], [0, 0]),
    ];
    vec![
        ("good", variant(1, &good)),
        ("plain", variant(0, &plain)),
        ("bad", variant(1, &bad)),
        ("broken_receive_rings", variant(0, &broken_rings(RECEIVE))),
        ("broken_transmit_rings", variant(0, &broken_rings(TRANSMIT))),
        ("broken_control_rings", variant(1, &broken_rings(CONTROL))),
    ]
}
