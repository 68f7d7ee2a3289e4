//! File system device (virtio 1.2, section 5.11): a directory of the host, mounted by the guest.

mod book;
mod credentials;
mod ledger;
mod saved;
mod server;
#[cfg(test)]
mod tests;
mod tree;

use std::os::fd::AsRawFd;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::complaints::Complaints;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::state::{DeviceState, Position, RestoreError};
use super::{ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config};

pub use self::saved::State;
pub use self::server::{Error, Server};

/// Size of the tag in the configuration space, in bytes (virtio 1.2, section 5.11.4).
pub const TAG_BYTES: usize = 36;

/// Queues for ordinary requests, beside the one for urgent ones. A single thread serves them all.
const REQUEST_QUEUES: u32 = 1;

// A request of 1 MiB takes 256 descriptors for its pages and a few more; Linux makes its requests
// smaller if the queue is.
const TRAITS: DeviceTraits =
    DeviceTraits { device_type: VIRTIO_ID_FS, features: 0, queue_sizes: &[64, 512] };

/// A file system device.
pub struct Fs {
    /// `struct virtio_fs_config` (virtio 1.2, section 5.11.4).
    config: [u8; TAG_BYTES + 4],
    server: Server,
    /// The queue for urgent requests, then those for ordinary ones.
    queues: Option<[VirtQueue; 2]>,
    /// Whether the server still knows a driver that is gone.
    stale: bool,
    complaints: Complaints,
}

impl Fs {
    /// Creates an idle device that shows `server`'s directory to the guest under the name `tag`, of
    /// which the first [`TAG_BYTES`] bytes count.
    pub fn new(tag: &str, server: Server) -> Self {
        let mut config = [0; TAG_BYTES + 4];
        let length = tag.len().min(TAG_BYTES);
        config[..length].copy_from_slice(&tag.as_bytes()[..length]);
        config[TAG_BYTES..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let complaints = Complaints::of(format!("fs {tag}"));
        Fs { config, server, queues: None, stale: false, complaints }
    }

    /// Closes what a driver that is gone had open.
    fn forget(&mut self) {
        if std::mem::take(&mut self.stale) {
            self.server.reset();
        }
    }
}

impl VirtioDevice for Fs {
    fn traits(&self) -> DeviceTraits {
        TRAITS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.queues = Some(activation.into_queues()?);
        Ok(())
    }

    fn reset(&mut self) {
        if self.queues.take().is_some() {
            // The processor that resets the device may not touch files: the device's thread may.
            self.stale = true;
            self.server.wake();
        }
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        self.forget();
        let Some(queue) = self.queues.as_mut().and_then(|queues| queues.get_mut(index)) else {
            return Ok(());
        };
        let (server, complaints) = (&self.server, &mut self.complaints);
        queue.drain(|chain, memory| match server.serve(&chain, memory) {
            Ok(bytes) => Verdict::Used(bytes),
            Err(error) => {
                complaints.add(&error);
                Verdict::Used(0)
            }
        })
    }

    fn backends(&self) -> Vec<Backend> {
        vec![Backend { fd: self.server.woken().as_raw_fd(), events: EventSet::IN }]
    }

    fn backend_ready(&mut self, _index: usize, _events: EventSet) -> Result<(), QueueError> {
        self.forget();
        Ok(())
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        let queues = self.queues.iter().flatten();
        Ok(queues.map(|queue| queue.position(0)).collect())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(self.server.save())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Fs(state) = state else { return Err(RestoreError::Kind) };
        self.server.restore(state).map_err(RestoreError::Backend)
    }
}
