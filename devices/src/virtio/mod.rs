//! What a virtio device is, independent of the transport that shows it to the guest.

pub mod activity;
pub mod balloon;
pub mod block;
pub mod buffers;
pub mod complaints;
pub mod config_space;
pub mod console;
mod eagerness;
pub mod fs;
#[cfg(test)]
mod hostile_tests;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod posted;
pub mod queue;
pub mod rate_limit;
pub mod rng;
pub mod slot;
pub mod state;
pub mod subscriber;
#[cfg(test)]
pub mod testing;
pub mod vsock;

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::EventSet;

use self::config_space::ConfigSpace;
use self::queue::{QueueError, VirtQueue};
use self::state::{DeviceState, Position, RestoreError};
use crate::interrupt::Interrupt;

/// The fixed facts a driver reads before it may use the device (virtio 1.2, section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceTraits {
    /// Device type number (virtio 1.2, section 5).
    pub device_type: u32,
    /// Feature bits of the device type; the transport adds those of the ring and of virtio itself.
    pub features: u64,
    /// Largest size of each queue, in descriptors; each a power of two (virtio 1.2, section 2.7).
    pub queue_sizes: &'static [u16],
}

/// Everything a device owns from `activate` to `reset`.
pub struct Activation {
    /// One queue per entry of [`DeviceTraits::queue_sizes`], in the same order. A queue the driver
    /// did not set up is there, too; it is always empty.
    pub queues: Vec<VirtQueue>,
    /// The feature bits both sides agreed on.
    pub features: u64,
    /// For changes of the configuration space; the queues have their own.
    pub interrupt: Arc<dyn Interrupt>,
}

impl Activation {
    /// The queues of a device that has `N` of them.
    pub fn into_queues<const N: usize>(self) -> Result<[VirtQueue; N], ActivateError> {
        let actual = self.queues.len();
        self.queues.try_into().map_err(|_| ActivateError::QueueCount { expected: N, actual })
    }
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The transport and the device disagree.
    #[error("expected {expected} queues, got {actual}")]
    QueueCount {
        /// What the device works with.
        expected: usize,
        /// What the transport handed over.
        actual: usize,
    },
    /// The host side of the device refused what was negotiated.
    #[error("configure the host side of the device")]
    Backend(#[source] std::io::Error),
}

/// A host file descriptor a device waits on beside its queues.
#[derive(Debug, Clone, Copy)]
pub struct Backend {
    /// Open as long as the device lives.
    pub fd: RawFd,
    /// What to wait for; the watch is always edge-triggered.
    pub events: EventSet,
}

/// A virtio device, as its transport and its event loop see it.
///
/// The event loop asks for the backends once, before the guest runs. The transport then calls
/// `activate` and `reset` in turn, as the driver comes and goes; in between the event loop calls
/// `queue_ready` and `backend_ready`. An idle device, one before `activate` or after `reset`, is
/// called as well - a kick may arrive late - and does nothing.
pub trait VirtioDevice: Send {
    /// The facts that never change.
    fn traits(&self) -> DeviceTraits;

    /// Fills `data` from the configuration space at `offset`. Bytes past its end read as zero.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Takes a driver write to the configuration space. Most devices have nothing writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Called once, before the guest can see the device: from then on it shows in `space` every change of
    /// what `read_config` says, at once. Most configuration spaces never change.
    fn show_config_in(&mut self, _space: ConfigSpace) {}

    /// Where in guest-physical memory the device's shared memory region `id` is, if it has it
    /// (virtio 1.2, section 2.10). It never moves.
    fn shared_memory(&self, _id: u32) -> Option<Range<u64>> {
        None
    }

    /// Starts the device with the queues the driver set up.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Drops everything `activate` handed over. Calling it on an idle device does nothing.
    fn reset(&mut self);

    /// Whether the event loop is to call `queue_ready` for queue `index`; read once, before the guest
    /// starts. Not if the host's kernel watches the kicks of that queue and serves it.
    fn serves(&self, _index: usize) -> bool {
        true
    }

    /// Serves queue `index`, because the driver kicked it.
    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError>;

    /// Whether the processor that kicks queue `index` waits until the kick is served: then the
    /// transport calls `queue_ready` before the guest's instruction ends, and no eventfd stands in
    /// between. For the rare queue whose driver relies on it; such a kick is slow.
    fn serves_at_once(&self, _index: usize) -> bool {
        false
    }

    /// The descriptors to wait on; read once, before the guest starts, and watched edge-triggered:
    /// data that cannot move yet must be looked for again in `queue_ready`. The transport kicks
    /// every queue once after `activate`, so data that came early is found then.
    fn backends(&self) -> Vec<Backend> {
        Vec::new()
    }

    /// Serves backend `index`, because its descriptor is ready.
    fn backend_ready(&mut self, _index: usize, _events: EventSet) -> Result<(), QueueError> {
        Ok(())
    }

    /// Waits for all that goes on in guest memory without a call, gives back the chains of what is
    /// finished, and says where the device stands in each queue; nothing if it is idle. A chain that
    /// the device keeps for later counts as not taken yet. Nobody else calls the device from here to
    /// `resume`, and nothing of it touches guest memory.
    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError>;

    /// Waits until nothing is in flight that the host has to finish, at most until `deadline`, and gives back
    /// what is finished. Returns whether it came so far; if not, all goes on.
    fn settle(&mut self, _deadline: Instant) -> Result<bool, QueueError> {
        Ok(true)
    }

    /// What takes the place of the device if the host takes it away from a driver that has not let go of
    /// it: it answers for as long as that driver does not reset it. None if no driver waits for answers.
    fn stand_in(&self) -> Option<Arc<Mutex<dyn VirtioDevice>>> {
        None
    }

    /// Goes on after `quiesce`. Most devices only work when they are called.
    fn resume(&mut self) {}

    /// What the device knows beside its queues and what it was made with; called after `quiesce`.
    /// Some know nothing.
    fn save(&self) -> DeviceState {
        DeviceState::None
    }

    /// Takes over what `save` said. A device whose driver was there is active by then.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if *state == DeviceState::None { Ok(()) } else { Err(RestoreError::Kind) }
    }
}

/// Copies the bytes at `offset` of a configuration space; bytes past its end read as zero.
pub fn copy_config(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or(&[]);
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

#[cfg(test)]
mod tests {
    use super::copy_config;

    #[test]
    fn config_past_the_end_reads_as_zero() {
        let mut data = [0xff; 4];
        copy_config(&[1, 2, 3], 2, &mut data);
        assert_eq!(data, [3, 0, 0, 0]);
    }

    #[test]
    fn config_far_past_the_end_reads_as_zero() {
        let mut data = [0xff; 4];
        copy_config(&[1, 2, 3], u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
