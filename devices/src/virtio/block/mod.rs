//! Block device (virtio 1.2, section 5.2): the guest reads and writes a file or disk of the host.
//!
//! `queue_ready` takes requests as the rate limiter admits them. A request is done at once, or, with
//! a [`Ring`], handed to the host's kernel; `reap` then gives the chain back when it has completed.

mod config;
mod disk;
mod gone;
mod host;
pub mod request;
mod ring;
#[cfg(test)]
mod ring_tests;
mod server;
#[cfg(test)]
mod tests;
mod transfer;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::EventSet;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::config::{CONFIG_BYTES, Facts, QUEUE_SIZE};
pub use self::disk::{Access, Disk, DiskError, DiskFiles};
use self::gone::Gone;
use self::request::{ID_BYTES, Limits};
pub use self::ring::Ring;
use self::server::{Completed, Server, Started};
use super::queue::{QueueError, Verdict, VirtQueue};
use super::rate_limit::RateLimiter;
use super::state::Position;
use super::{
    ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config, eagerness,
};

/// Most queues of one device: more than a disk of one thread has a use for.
pub const MAX_QUEUES: u16 = 16;

const QUEUE_SIZES: [u16; MAX_QUEUES as usize] = [QUEUE_SIZE; MAX_QUEUES as usize];

/// A block device backed by a [`Disk`].
pub struct Block {
    server: Server,
    facts: Facts,
    config: [u8; CONFIG_BYTES],
    /// Of the device and not of its driver, which would lift it with a reset.
    limiter: RateLimiter,
    active: Option<Active>,
}

struct Active {
    queues: Vec<VirtQueue>,
    /// Whether a request waits until another one is over.
    is_full: bool,
    /// The queue that goes on first after all of them had to wait.
    first: usize,
}

impl Block {
    /// Creates an idle device with `queues` queues, 1 to [`MAX_QUEUES`], which all share `limiter`.
    /// The driver sees at most the first 20 bytes of `id` as its serial number. Without a `ring` one
    /// request is done after the other.
    pub fn new(
        disk: Disk,
        id: &str,
        queues: u16,
        limiter: RateLimiter,
        ring: Option<Ring>,
    ) -> Self {
        assert!((1..=MAX_QUEUES).contains(&queues), "the number of queues was checked");
        let mut padded = [0; ID_BYTES];
        let length = id.len().min(ID_BYTES);
        padded[..length].copy_from_slice(&id.as_bytes()[..length]);

        let limits = Limits { sectors: disk.sectors(), read_only: disk.is_read_only() };
        let facts = Facts {
            limits,
            queues,
            block_bytes: disk.block_bytes(),
            zeroes_may_unmap: disk.zeroes_may_unmap(),
        };
        let server =
            Server::new(disk, limits, padded, ring, format!("block {}", id.escape_debug()));
        Block { server, config: facts.space(), facts, limiter, active: None }
    }

    /// Gives up the ring, for another disk; nothing may be in flight.
    pub fn take_ring(&mut self) -> Option<Ring> {
        self.server.take_ring()
    }

    /// Gives back what the ring has completed.
    fn reap(&mut self) -> Result<(), QueueError> {
        let Block { server, active, .. } = self;
        let Some(Active { queues, .. }) = active else { return Ok(()) };
        let mut any = false;
        while let Some(Completed { queue, head, written }) = server.completed() {
            queues[queue].complete(&[(head, written)])?;
            any = true;
        }
        if !any {
            return Ok(());
        }
        queues.iter_mut().try_for_each(VirtQueue::notify)?;
        if self.active.as_mut().is_some_and(|active| std::mem::take(&mut active.is_full)) {
            self.go_on();
        }
        Ok(())
    }

    /// Waits for what is in flight, if there is a `deadline` at most until then, and gives it back.
    fn finish(&mut self, deadline: Option<Instant>) -> Result<(), QueueError> {
        while self.active.is_some() && self.server.wait(deadline) {
            self.reap()?;
        }
        Ok(())
    }

    /// Makes the event loop look at every queue, another one first each time, so that none gets all
    /// there is to get.
    fn go_on(&mut self) {
        let Some(Active { queues, first, .. }) = &mut self.active else { return };
        let (later, sooner) = queues.split_at(*first);
        sooner.iter().chain(later).for_each(VirtQueue::kick);
        *first = (*first + 1) % queues.len();
    }
}

impl VirtioDevice for Block {
    fn traits(&self) -> DeviceTraits {
        DeviceTraits {
            device_type: VIRTIO_ID_BLOCK,
            features: self.facts.features(),
            queue_sizes: &QUEUE_SIZES[..usize::from(self.facts.queues)],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = activation.queues;
        let (expected, actual) = (usize::from(self.facts.queues), queues.len());
        if expected != actual {
            return Err(ActivateError::QueueCount { expected, actual });
        }
        // Such a driver may rely on what was written (virtio 1.2, section 5.2.6.2).
        self.server.set_write_through(activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0);
        self.active = Some(Active { queues, is_full: false, first: 0 });
        Ok(())
    }

    /// Returns when nothing is in flight any more: no data may reach the memory of a driver that
    /// knows that its requests are gone.
    fn reset(&mut self) {
        self.server.reset();
        self.active = None;
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        let Block { server, active, limiter, .. } = self;
        let Some(Active { queues, is_full, .. }) = active else { return Ok(()) };
        let Some(queue) = queues.get_mut(index) else { return Ok(()) };
        let mut depth = server.in_flight();
        let (mut turn_is_over, mut is_more) = (false, false);
        let outcome = queue.drain(|chain, memory| {
            depth += 1;
            if turn_is_over {
                is_more = true;
                return Verdict::Keep;
            }
            if !limiter.admits() {
                return Verdict::Keep;
            }
            match server.start(index, chain, memory) {
                Started::Full => {
                    *is_full = true;
                    Verdict::Keep
                }
                Started::InFlight { bytes } => {
                    limiter.charge(bytes);
                    Verdict::Hold
                }
                Started::Done { bytes, written, was_long } => {
                    turn_is_over = was_long;
                    limiter.charge(bytes);
                    Verdict::Used(written)
                }
            }
        });
        server.submit();
        eagerness::found(depth);
        outcome?;
        // The other devices of the thread come first.
        if is_more {
            queue.kick();
        }
        // Much is in the page cache, and then there is nothing to wait for.
        self.reap()
    }

    fn backends(&self) -> Vec<Backend> {
        self.limiter.backend().into_iter().chain(self.server.backend()).collect()
    }

    fn backend_ready(&mut self, index: usize, _events: EventSet) -> Result<(), QueueError> {
        if index == 0 && self.limiter.backend().is_some() {
            self.go_on();
            return Ok(());
        }
        self.reap()
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        self.finish(None)?;
        let Some(Active { queues, .. }) = &self.active else { return Ok(Vec::new()) };
        Ok(queues.iter().map(|queue| queue.position(0)).collect())
    }

    fn settle(&mut self, deadline: Instant) -> Result<bool, QueueError> {
        self.finish(Some(deadline))?;
        Ok(self.server.in_flight() == 0)
    }

    /// Drivers wait for each request for as long as it takes, even those that are about to let go of the
    /// device.
    fn stand_in(&self) -> Option<Arc<Mutex<dyn VirtioDevice>>> {
        Some(Arc::new(Mutex::new(Gone::new(self.traits()))))
    }
}
