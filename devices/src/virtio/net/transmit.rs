//! Frames on their way out of the guest.

use std::io;
use std::os::fd::BorrowedFd;

use super::{HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES};
use crate::virtio::buffers::Buffers;
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{QueueError, Verdict, VirtQueue};
use crate::virtio::rate_limit::RateLimiter;
use crate::virtio::state::Position;

/// The transmit queue of a pair.
pub struct Transmit {
    queue: VirtQueue,
    buffers: Buffers,
    blocked: bool,
}

impl Transmit {
    /// Takes frames from `queue`.
    pub fn new(queue: VirtQueue) -> Self {
        let buffers = Buffers::new(queue.memory().clone());
        Transmit { queue, buffers, blocked: false }
    }

    /// Whether a frame waits for the link to take it.
    pub fn blocked(&self) -> bool {
        self.blocked
    }

    /// Has the event loop look at the queue once more.
    pub fn kick(&self) {
        self.queue.kick();
    }

    /// Where the device stands.
    pub fn position(&self) -> Position {
        self.queue.position(0)
    }

    /// Moves the guest's frames to `link`, until one of them or `limiter` has no more of it.
    pub fn run(
        &mut self,
        link: BorrowedFd<'_>,
        limiter: &mut RateLimiter,
        complaints: &mut Complaints,
    ) -> Result<(), QueueError> {
        let Transmit { queue, buffers, blocked } = self;
        *blocked = false;
        queue.drain(|chain, _| {
            if !limiter.admits() {
                return Verdict::Keep;
            }
            buffers.clear();
            if let Err(error) = buffers.add(chain.readable()) {
                complaints.add(&error);
                return Verdict::Used(0);
            }
            if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&buffers.bytes()) {
                complaints.add(&format_args!("a frame of {} bytes dropped", buffers.bytes()));
                return Verdict::Used(0);
            }
            match buffers.write_to(link) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *blocked = true;
                    return Verdict::Keep;
                }
                Err(error) => complaints.add(&format_args!("frame dropped: {error}")),
                Ok(bytes) => limiter.charge(bytes.saturating_sub(HEADER_BYTES) as u64),
            }
            Verdict::Used(0)
        })
    }
}
