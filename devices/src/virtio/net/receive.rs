//! Frames on their way into the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::{HEADER_BYTES, MAX_FRAME_BYTES};
use crate::virtio::buffers::Buffers;
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{QueueError, Verdict, VirtQueue};
use crate::virtio::rate_limit::RateLimiter;
use crate::virtio::state::Position;

/// Frames moved in one go; what gives the other devices of the same event loop their turn.
const BUDGET: u32 = 128;

/// Where the header says over how many chains a frame is spread (virtio 1.2, section 5.1.6).
const NUM_BUFFERS: usize = 10;

/// The receive queue, and the chains taken from it that wait for a frame.
///
/// A frame goes from the tap right into guest memory. Its length is known only afterwards, so there
/// must be room for the largest one; the chains it did not need stay here for the next one.
pub struct Receive {
    queue: VirtQueue,
    buffers: Buffers,
    /// First descriptor and length, in bytes, of each chain that `buffers` consists of.
    waiting: VecDeque<(u16, usize)>,
    /// What one frame used, as it is given back; kept to be allocated once.
    used: Vec<(u16, u32)>,
    room: Room,
}

/// What there must be before a frame is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// One chain: the driver makes each long enough.
    Chain,
    /// Chains of this length together, in bytes, with the header (VIRTIO_NET_F_MRG_RXBUF).
    Bytes(usize),
}

impl Receive {
    /// Receives into the chains of `queue`.
    pub fn new(queue: VirtQueue, room: Room) -> Self {
        let buffers = Buffers::new(queue.memory().clone());
        Receive { queue, buffers, waiting: VecDeque::new(), used: Vec::new(), room }
    }

    /// Has the event loop look at the queue once more.
    pub fn kick(&self) {
        self.queue.kick();
    }

    /// Where the device stands; the chains that wait for a frame are as good as never taken.
    pub fn position(&self) -> Position {
        self.queue.position(self.waiting.len())
    }

    /// Moves frames from `link` to the guest until one of them or `limiter` has no more of it.
    pub fn run(
        &mut self,
        link: BorrowedFd<'_>,
        limiter: &mut RateLimiter,
        complaints: &mut Complaints,
    ) -> Result<(), QueueError> {
        for _ in 0..BUDGET {
            if !limiter.admits() {
                return self.queue.notify();
            }
            if !self.has_room() {
                self.refill(complaints)?;
            }
            if !self.has_room() {
                return self.queue.notify();
            }
            match self.buffers.read_from(link) {
                Ok(bytes) => {
                    limiter.charge(bytes.saturating_sub(HEADER_BYTES) as u64);
                    self.deliver(bytes)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.queue.notify();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    complaints.add(&format_args!("receive: {error}"));
                    return self.queue.notify();
                }
            }
        }
        // The watch on the link is edge-triggered: nobody will say that there is more.
        self.queue.kick();
        self.queue.notify()
    }

    fn has_room(&self) -> bool {
        match self.room {
            Room::Chain => !self.waiting.is_empty(),
            Room::Bytes(bytes) => self.buffers.bytes() >= bytes,
        }
    }

    /// Takes chains until there is room for a frame.
    fn refill(&mut self, complaints: &mut Complaints) -> Result<(), QueueError> {
        let Receive { queue, buffers, waiting, room, .. } = self;
        queue.drain(|chain, _| {
            let full = match room {
                Room::Chain => !waiting.is_empty(),
                Room::Bytes(bytes) => buffers.bytes() >= *bytes,
            };
            if full {
                return Verdict::Keep;
            }
            let head = chain.head_index();
            let before = buffers.bytes();
            match buffers.add(chain.writable()) {
                Ok(bytes) if bytes >= HEADER_BYTES => {
                    waiting.push_back((head, bytes));
                    Verdict::Hold
                }
                Ok(_) => {
                    buffers.truncate(before);
                    complaints.add(&"a receive buffer is shorter than a header");
                    Verdict::Used(0)
                }
                Err(error) => {
                    complaints.add(&error);
                    Verdict::Used(0)
                }
            }
        })
    }

    /// Gives the guest the frame of `bytes`, header included, that the first chains now hold.
    fn deliver(&mut self, bytes: usize) -> Result<(), QueueError> {
        let (mut left, mut covered) = (bytes.min(MAX_FRAME_BYTES), 0);
        self.used.clear();
        while left > 0 {
            let Some((head, length)) = self.waiting.pop_front() else { break };
            let written = left.min(length);
            self.used.push((head, u32::try_from(written).expect("a frame is short")));
            covered += length;
            left -= written;
        }
        let count = u16::try_from(self.used.len()).expect("a queue has at most 32768 chains");
        // The tap leaves this field alone.
        self.buffers.copy_in(NUM_BUFFERS, &count.to_le_bytes());
        self.buffers.skip(covered);
        self.queue.complete(&self.used)
    }
}
