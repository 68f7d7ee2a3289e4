//! What a driver finds in the place of a disk that was taken away from it: each request fails, until the
//! driver resets the device.

use vm_memory::{Bytes, GuestMemoryMmap};

use super::request::Status;
use super::transfer::last_byte;
use crate::virtio::queue::{Chain, QueueError, Verdict, VirtQueue};
use crate::virtio::state::Position;
use crate::virtio::{ActivateError, Activation, DeviceTraits, VirtioDevice};

/// A block device without a disk.
pub struct Gone {
    traits: DeviceTraits,
    queues: Vec<VirtQueue>,
}

impl Gone {
    /// One in the place of a device with these `traits`.
    pub fn new(traits: DeviceTraits) -> Self {
        Gone { traits, queues: Vec::new() }
    }
}

impl VirtioDevice for Gone {
    fn traits(&self) -> DeviceTraits {
        self.traits
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.queues = activation.queues;
        Ok(())
    }

    fn reset(&mut self) {
        self.queues.clear();
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(index) else { return Ok(()) };
        queue.drain(|chain, memory| Verdict::Used(refuse(chain, memory)))
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        Ok(self.queues.iter().map(|queue| queue.position(0)).collect())
    }
}

/// Tells the driver that the request in `chain` failed, if there is room for it. Returns how many bytes
/// were written into the chain.
fn refuse(chain: Chain<'_>, memory: &GuestMemoryMmap) -> u32 {
    let told = last_byte(chain).map(|at| memory.write_obj(Status::IoError.byte(), at));
    told.is_some_and(|told| told.is_ok()).into()
}
