//! Block device (virtio 1.2, section 5.2): the guest reads and writes a file or disk of the host.

mod disk;
pub mod request;
#[cfg(test)]
mod tests;

use event_manager::EventSet;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

pub use self::disk::{Disk, DiskError};
use self::request::{HEADER_BYTES, ID_BYTES, Limits, Request, SECTOR_BYTES, Status};
use super::buffers::{BufferError, Buffers};
use super::complaints::Complaints;
use super::queue::{Chain, QueueError, Verdict, VirtQueue};
use super::rate_limit::RateLimiter;
use super::{ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config};

const QUEUE_SIZE: u16 = 128;

/// Buffers of a request beside its header and its status: what a direct chain has room for.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Bytes of the configuration space up to and with `blk_size` (virtio 1.2, section 5.2.4).
const CONFIG_BYTES: usize = 24;

/// A block device backed by a [`Disk`].
pub struct Block {
    engine: Engine,
    config: [u8; CONFIG_BYTES],
    /// Of the device and not of its driver, which would lift it with a reset.
    limiter: RateLimiter,
    active: Option<Active>,
}

/// What serves a request, whichever queue it came from.
struct Engine {
    disk: Disk,
    limits: Limits,
    id: [u8; ID_BYTES],
    complaints: Complaints,
    /// Data of the last request, in bytes.
    moved: u64,
}

struct Active {
    requests: VirtQueue,
    readable: Buffers,
    writable: Buffers,
}

/// Why a request could not even be answered.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("request dropped: {0}")]
    Buffers(#[from] BufferError),
    #[error("request dropped: it has no room for a status")]
    NoStatus,
}

impl Block {
    /// Creates an idle device. The driver sees at most the first 20 bytes of `id` as its serial
    /// number. `read_only` goes with how the disk was opened.
    pub fn new(disk: Disk, read_only: bool, id: &str, limiter: RateLimiter) -> Self {
        let mut padded = [0; ID_BYTES];
        let length = id.len().min(ID_BYTES);
        padded[..length].copy_from_slice(&id.as_bytes()[..length]);

        let limits = Limits { sectors: disk.sectors(), read_only };
        let complaints = Complaints::of(format!("block {}", id.escape_debug()));
        Block {
            config: config(limits.sectors),
            engine: Engine { disk, limits, id: padded, complaints, moved: 0 },
            limiter,
            active: None,
        }
    }
}

/// The configuration space of a disk of `sectors` (virtio 1.2, section 5.2.4).
fn config(sectors: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    config[0..8].copy_from_slice(&sectors.to_le_bytes());
    config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
    config[20..24].copy_from_slice(&SECTOR_BYTES.to_le_bytes()[..4]);
    config
}

impl VirtioDevice for Block {
    fn traits(&self) -> DeviceTraits {
        let read_only = u64::from(self.engine.limits.read_only) << VIRTIO_BLK_F_RO;
        DeviceTraits {
            device_type: VIRTIO_ID_BLOCK,
            features: 1 << VIRTIO_BLK_F_SEG_MAX
                | 1 << VIRTIO_BLK_F_BLK_SIZE
                | 1 << VIRTIO_BLK_F_FLUSH
                | read_only,
            queue_sizes: &[QUEUE_SIZE],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [requests] = activation.into_queues()?;
        let readable = Buffers::new(requests.memory().clone());
        let writable = Buffers::new(requests.memory().clone());
        self.active = Some(Active { requests, readable, writable });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_ready(&mut self, _index: usize) -> Result<(), QueueError> {
        let Block { engine, active, limiter, .. } = self;
        let Some(Active { requests, readable, writable }) = active else { return Ok(()) };
        requests.drain(|chain, memory| {
            if !limiter.admits() {
                return Verdict::Keep;
            }
            let written = engine.serve(chain, memory, readable, writable).unwrap_or_else(|error| {
                engine.complaints.add(&error);
                0
            });
            limiter.charge(engine.moved);
            Verdict::Used(written)
        })
    }

    fn backends(&self) -> Vec<Backend> {
        self.limiter.backend().into_iter().collect()
    }

    fn backend_ready(&mut self, _index: usize, _events: EventSet) -> Result<(), QueueError> {
        self.queue_ready(0)
    }
}

impl Engine {
    /// Serves the request in `chain` and returns the number of bytes that were written into it.
    fn serve(
        &mut self,
        chain: Chain<'_>,
        memory: &GuestMemoryMmap,
        readable: &mut Buffers,
        writable: &mut Buffers,
    ) -> Result<u32, RequestError> {
        self.moved = 0;
        readable.clear();
        writable.clear();
        readable.add(chain.clone().readable())?;
        let room = writable.add(chain.clone().writable())?.checked_sub(1);
        let (Some(room), Some(status_address)) = (room, last_byte(chain)) else {
            return Err(RequestError::NoStatus);
        };
        writable.truncate(room);

        let outcome = self
            .request(readable, room)
            .and_then(|request| self.perform(request, readable, writable));
        let status = outcome.err().unwrap_or(Status::Ok);

        memory.write_obj(status.byte(), status_address).map_err(BufferError::OutOfMemory)?;
        let written = room - writable.bytes() + 1;
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Takes the header off `readable` and checks what it asks for.
    fn request(&self, readable: &mut Buffers, room: usize) -> Result<Request, Status> {
        let mut header = [0; HEADER_BYTES];
        if readable.copy_out(0, &mut header) < HEADER_BYTES {
            return Err(Status::IoError);
        }
        readable.skip(HEADER_BYTES);
        request::parse(&header, readable.bytes(), room, self.limits)
    }

    /// Does what `request` asks for; uses up as much of `writable` as it filled.
    fn perform(
        &mut self,
        request: Request,
        readable: &mut Buffers,
        writable: &mut Buffers,
    ) -> Result<(), Status> {
        self.moved = match request {
            Request::Read { .. } => writable.bytes() as u64,
            Request::Write { .. } => readable.bytes() as u64,
            Request::Flush | Request::Id => 0,
        };
        let outcome = match request {
            Request::Read { offset } => self.disk.read(offset, writable),
            Request::Write { offset } => self.disk.write(offset, readable),
            Request::Flush => self.disk.flush(),
            Request::Id => {
                writable.copy_in(0, &self.id);
                writable.skip(ID_BYTES);
                Ok(())
            }
        };
        outcome.map_err(|error| {
            self.complaints.add(&format_args!("{request:?} failed: {error}"));
            Status::IoError
        })
    }
}

/// Where the status goes: the last byte of the last buffer that has any.
fn last_byte(chain: Chain<'_>) -> Option<GuestAddress> {
    let last = chain.writable().filter(|descriptor| descriptor.len() > 0).last()?;
    last.addr().checked_add(u64::from(last.len()) - 1)
}
