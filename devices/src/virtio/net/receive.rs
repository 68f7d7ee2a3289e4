//! Frames on their way into the guest.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::BorrowedFd;

use nix::sys::uio::readv;

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
/// must be room for the largest one; the chains it did not need stay here for the next one. While the
/// driver offers less than that, which it may always do, each frame takes the way through `aside`.
pub struct Receive {
    queue: VirtQueue,
    buffers: Buffers,
    /// The chains that `buffers` consists of.
    waiting: VecDeque<Waiting>,
    /// Room for one frame, once there was a need for it.
    aside: Vec<u8>,
    /// Length of the frame that waits there, in bytes; 0 if there is none.
    aside_bytes: usize,
    /// What one frame used, as it is given back; kept to be allocated once.
    used: Vec<(u16, u32)>,
    room: Room,
}

/// A chain that waits for a frame.
struct Waiting {
    head: u16,
    bytes: usize,
    /// How many it takes of those of the queue, or more if they are in a table of their own.
    descriptors: u16,
}

/// What there must be before a frame is read right into guest memory.
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
        Receive {
            queue,
            buffers,
            waiting: VecDeque::new(),
            aside: Vec::new(),
            aside_bytes: 0,
            used: Vec::new(),
            room,
        }
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
            if !self.has_room() {
                self.refill(complaints)?;
            }
            // What waits aside was admitted and charged for when it was read.
            if self.waiting.is_empty() || self.aside_bytes == 0 && !limiter.admits() {
                return self.queue.notify();
            }
            if self.aside_bytes != 0 {
                if !self.deliver_aside(complaints)? {
                    return self.queue.notify();
                }
                continue;
            }
            let is_direct = self.has_room();
            match if is_direct { self.buffers.read_from(link) } else { self.read_aside(link) } {
                Ok(bytes) => {
                    limiter.charge(bytes.saturating_sub(HEADER_BYTES) as u64);
                    if is_direct {
                        self.deliver(bytes)?;
                    }
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
            let mut descriptors = 0_u16;
            let counted = chain.writable().inspect(|_| descriptors = descriptors.saturating_add(1));
            match buffers.add(counted) {
                Ok(bytes) if bytes >= HEADER_BYTES => {
                    waiting.push_back(Waiting { head, bytes, descriptors });
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

    /// Reads a frame that there may be no room for.
    fn read_aside(&mut self, link: BorrowedFd<'_>) -> io::Result<usize> {
        self.aside.resize(MAX_FRAME_BYTES, 0);
        let bytes = readv(link, &mut [IoSliceMut::new(&mut self.aside)])?;
        self.aside_bytes = bytes;
        Ok(bytes)
    }

    /// Gives the guest the frame that waits aside, or drops it if there is no room for it with the whole
    /// queue, or enough for the largest frame there should be; `false` if the driver has to offer more.
    fn deliver_aside(&mut self, complaints: &mut Complaints) -> Result<bool, QueueError> {
        if self.aside_bytes > self.buffers.bytes() {
            let held = self.waiting.iter().map(|chain| u32::from(chain.descriptors)).sum::<u32>();
            let size = self.queue.rings().map_or(0, |rings| rings.size.into());
            if held < size && !self.has_room() {
                return Ok(false);
            }
            complaints.add(&"a frame dropped: it is longer than all receive buffers together");
            self.aside_bytes = 0;
            return Ok(true);
        }
        let bytes = std::mem::take(&mut self.aside_bytes);
        self.buffers.copy_in(0, &self.aside[..bytes]);
        self.deliver(bytes)?;
        Ok(true)
    }

    /// Gives the guest the frame of `bytes`, header included, that the first chains now hold.
    fn deliver(&mut self, bytes: usize) -> Result<(), QueueError> {
        let (mut left, mut covered) = (bytes.min(MAX_FRAME_BYTES), 0);
        self.used.clear();
        while left > 0 {
            let Some(chain) = self.waiting.pop_front() else { break };
            let written = left.min(chain.bytes);
            self.used.push((chain.head, u32::try_from(written).expect("a frame is short")));
            covered += chain.bytes;
            left -= written;
        }
        let count = u16::try_from(self.used.len()).expect("a queue has at most 32768 chains");
        // The tap leaves this field alone.
        self.buffers.copy_in(NUM_BUFFERS, &count.to_le_bytes());
        self.buffers.skip(covered);
        self.queue.complete(&self.used)
    }
}
