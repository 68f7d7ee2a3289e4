//! File system device (virtio 1.2, section 5.11): a directory of the host, mounted by the guest.

mod access;
mod book;
#[cfg(test)]
mod change_tests;
mod changes;
mod credentials;
mod extension;
mod forgetting;
mod ledger;
mod listing;
mod mapped;
mod observer;
mod opening;
mod saved;
mod server;
#[cfg(test)]
mod tests;
mod tree;
mod unnamed;
mod watch;
mod window;

use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::GuestMemoryMmap;

use super::complaints::Complaints;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::state::{DeviceState, Position, RestoreError};
use super::{ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config};

pub use self::changes::{Change, ChangeKind, Changes, Telling};
use self::forgetting::Forgetting;
use self::observer::Observer;
pub use self::saved::State;
pub use self::server::{Cache, Error, Options, Server, most_open_files, raise_file_limit};
use self::watch::Watch;
pub use self::window::{SLOT_BYTES, Window};

/// Size of the tag in the configuration space, in bytes (virtio 1.2, section 5.11.4).
pub const TAG_BYTES: usize = 36;

/// Queues for ordinary requests, beside the one for urgent ones. A single thread serves them all.
const REQUEST_QUEUES: u32 = 1;

/// Number of the shared memory region for mapped files (virtio 1.2, section 5.11.6.4, where the
/// device's only region has it).
const WINDOW_ID: u32 = 0;

/// Index of the queue for urgent requests. Linux forgets files through it, and nothing else.
const URGENT: usize = 0;

/// What the device waits for, in this order; each is there or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The event that wakes the thread up.
    Woken,
    /// It is time to look at what the guest forgot.
    Forgetting,
    /// It is time to look after the window.
    Watch,
    /// Somebody else changed a file.
    Changes,
}

// A request of 1 MiB takes 256 descriptors for its pages and a few more; Linux makes its requests
// smaller if the queue is.
const TRAITS: DeviceTraits =
    DeviceTraits { device_type: VIRTIO_ID_FS, features: 0, queue_sizes: &[64, 512] };

/// A file system device.
pub struct Fs {
    /// `struct virtio_fs_config` (virtio 1.2, section 5.11.4).
    config: [u8; TAG_BYTES + 4],
    server: Server,
    /// Where the guest finds the server's window.
    region: Option<Range<u64>>,
    /// Tells when to look after the window, while files are mapped.
    watch: Option<Watch>,
    /// Tells when to look at what the guest forgot without a kick.
    forgetting: Option<Forgetting>,
    /// Guest memory and the window, where data may be, too; while the device is active.
    buffers: Option<GuestMemoryMmap>,
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
        Fs {
            config,
            server,
            region: None,
            watch: None,
            forgetting: None,
            buffers: None,
            queues: None,
            stale: false,
            complaints: Complaints::of(format!("fs {tag}")),
        }
    }

    /// Shows the server's window to the guest, in whose memory it starts at the address `start`.
    /// The error is that the host has no timer left.
    pub fn with_window_at(mut self, start: u64) -> io::Result<Self> {
        self.region = self.server.window().map(|window| start..start + window.bytes());
        self.watch = self.region.is_some().then(Watch::new).transpose()?;
        Ok(self)
    }

    /// Spares the guest that forgets one file after the other most of its kicks. The error is that the host
    /// has no timer left.
    pub fn with_deferred_forgetting(mut self) -> io::Result<Self> {
        self.forgetting = Some(Forgetting::new()?);
        Ok(self)
    }

    /// Everything that the device waits for.
    fn sources(&self) -> impl Iterator<Item = (Source, Backend)> {
        let woken = Backend { fd: self.server.woken().as_raw_fd(), events: EventSet::IN };
        let forgetting = self.forgetting.as_ref().map(Forgetting::backend);
        let watch = self.watch.as_ref().map(Watch::backend);
        let changes = self.server.observer().map(Observer::backend);
        iter::once((Source::Woken, woken))
            .chain(forgetting.map(|backend| (Source::Forgetting, backend)))
            .chain(watch.map(|backend| (Source::Watch, backend)))
            .chain(changes.map(|backend| (Source::Changes, backend)))
    }

    /// Serves what is in queue `index`. Returns whether there was anything.
    fn drain(&mut self, index: usize) -> Result<bool, QueueError> {
        let Fs { server, buffers, queues, complaints, .. } = self;
        let Some(queue) = queues.as_mut().and_then(|queues| queues.get_mut(index)) else {
            return Ok(false);
        };
        let mut any = false;
        queue.drain(|chain, memory| {
            any = true;
            match server.serve(&chain, memory, buffers.as_ref()) {
                Ok(bytes) => Verdict::Used(bytes),
                Err(error) => {
                    complaints.add(&error);
                    Verdict::Used(0)
                }
            }
        })?;
        Ok(any)
    }

    /// Expects the guest to go on forgetting, and looks at it soon.
    fn defer_forgetting(&mut self) -> Result<(), QueueError> {
        let (Some(forgetting), Some(queues)) = (&mut self.forgetting, &mut self.queues) else {
            return Ok(());
        };
        if queues[URGENT].defer_kicks(forgetting::KICK_AT)? && !forgetting.look_soon() {
            // Without a timer each kick is wanted.
            self.drain(URGENT)?;
        }
        Ok(())
    }

    /// `memory` and the window, if there is one.
    fn with_window(&self, memory: &GuestMemoryMmap) -> Option<GuestMemoryMmap> {
        let region = self.server.window()?.region(self.region.as_ref()?.start)?;
        memory.insert_region(Arc::new(region)).ok()
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

    fn shared_memory(&self, id: u32) -> Option<Range<u64>> {
        (id == WINDOW_ID).then(|| self.region.clone()).flatten()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues: [VirtQueue; 2] = activation.into_queues()?;
        self.buffers = self.with_window(queues[0].memory());
        self.queues = Some(queues);
        Ok(())
    }

    fn reset(&mut self) {
        if self.queues.take().is_some() {
            self.buffers = None;
            // The processor that resets the device may not touch files: the device's thread may.
            self.stale = true;
            self.server.wake();
        }
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        self.forget();
        if self.drain(index)? && index == URGENT {
            self.defer_forgetting()?;
        }
        if let (Some(watch), Some(window)) = (&mut self.watch, self.server.window()) {
            watch.begin(window);
        }
        Ok(())
    }

    fn backends(&self) -> Vec<Backend> {
        self.sources().map(|(_, backend)| backend).collect()
    }

    fn backend_ready(&mut self, index: usize, _events: EventSet) -> Result<(), QueueError> {
        let source = self.sources().nth(index).map(|(source, _)| source);
        match source {
            Some(Source::Woken) => {
                self.forget();
                self.server.look();
            }
            Some(Source::Forgetting) => return self.queue_ready(URGENT),
            Some(Source::Watch) => {
                if let (Some(watch), Some(window)) = (&mut self.watch, self.server.window()) {
                    watch.look_after(window);
                }
            }
            Some(Source::Changes) => self.server.look(),
            None => {}
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        let queues = self.queues.iter().flatten();
        Ok(queues.map(|queue| queue.position(0)).collect())
    }

    fn save(&self) -> DeviceState {
        // What a driver that is gone knew and had open is nobody's, though it is still to be closed; one that
        // came after it has not been served yet.
        DeviceState::Fs(if self.stale { State::default() } else { self.server.save() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Fs(state) = state else { return Err(RestoreError::Kind) };
        self.server.restore(state).map_err(RestoreError::Backend)
    }
}
