//! The host's end of a memory device: how much of it shall be plugged.

use std::sync::{Arc, Mutex, MutexGuard};

use super::{BLOCK_BYTES, Mem};

const MIB: u64 = 1 << 20;
/// Size of a block, in MiB.
const BLOCK_MIB: u64 = BLOCK_BYTES / MIB;

/// An amount that cannot be plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{requested_mib} MiB is not a multiple of {BLOCK_MIB} up to {most_mib}")]
pub struct RequestError {
    requested_mib: u32,
    most_mib: u64,
}

/// A memory device as the host's threads see it. Its methods may be called from any thread, also
/// when no driver uses the device.
#[derive(Clone)]
pub struct Host {
    device: Arc<Mutex<Mem>>,
}

impl Host {
    /// The host's end of `device`.
    pub fn of(device: Arc<Mutex<Mem>>) -> Self {
        Host { device }
    }

    /// Asks the guest to have `requested_mib` MiB plugged, a multiple of 2. It grows or shrinks in its
    /// own time; what it uses it may be unable to give up.
    pub fn request_mib(&self, requested_mib: u32) -> Result<(), RequestError> {
        let mut device = self.lock();
        let bytes = u64::from(requested_mib) * MIB;
        let most_mib = device.blocks.bytes() / MIB;
        if bytes % BLOCK_BYTES != 0 || u64::from(requested_mib) > most_mib {
            return Err(RequestError { requested_mib, most_mib });
        }
        device.request(bytes);
        Ok(())
    }

    /// How much is plugged, in MiB.
    pub fn plugged_mib(&self) -> u64 {
        self.lock().blocks.plugged_bytes() / MIB
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Mem> {
        self.device.lock().expect("no device panics while it holds its lock")
    }
}
