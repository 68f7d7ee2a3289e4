//! A device that the host takes away from its driver.
//!
//! virtio-mmio has no way to tell the driver, which goes on until somebody in the guest unbinds it, and waits
//! for the requests it has made before it ends. So its device is exchanged for one that fails them.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use super::MmioTransport;
use crate::virtio::VirtioDevice;

/// How long a device that is busy is left alone.
const PAUSE: Duration = Duration::from_millis(1);

/// The host has not finished what the guest asked the device for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("requests are in flight that the host does not finish")]
pub struct Unsettled;

impl MmioTransport {
    /// Whether a driver uses the device, or is about to.
    pub fn is_in_use(&self) -> bool {
        let used = VIRTIO_CONFIG_S_DRIVER;
        self.shared.status() & (used | VIRTIO_CONFIG_S_FAILED) == used
    }

    /// Waits for what is in flight, at most until `deadline`, makes the device idle for good, and has its
    /// stand-in go on where it stood, once that is served. None without a driver, if it needs none, or if the
    /// device waits for its reset: then the same device is still there, as it is after an error.
    pub fn withdraw(
        &mut self,
        deadline: Instant,
    ) -> Result<Option<Arc<Mutex<dyn VirtioDevice>>>, Unsettled> {
        let old = self.device.clone();
        // Its thread keeps it for as long as the host takes for a request.
        let mut device = lock_until(&old, deadline).ok_or(Unsettled)?;
        if !self.is_in_use() {
            return Ok(None);
        }
        let Some(stand_in) = device.stand_in() else { return Ok(None) };
        // A device with broken rings cannot say, and waits for its reset from here on.
        if !device.settle(deadline).unwrap_or(true) {
            return Err(Unsettled);
        }
        let positions = self.quiesce(&mut *device);
        // Nobody knows any more which requests are to be answered.
        if self.shared.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0 {
            return Ok(None);
        }
        device.reset();
        drop(device);
        self.device = stand_in.clone();
        // An idle device has no positions.
        if !positions.is_empty() {
            self.start(&positions);
        }
        Ok(Some(stand_in))
    }
}

/// What `mutex` guards, if whoever has it gives it up until `deadline`.
pub fn lock_until<T: ?Sized>(mutex: &Mutex<T>, deadline: Instant) -> Option<MutexGuard<'_, T>> {
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {}
            Err(TryLockError::WouldBlock) => return None,
            Err(TryLockError::Poisoned(_)) => panic!("no device panics while it holds its lock"),
        }
        // By a system call that all threads may make.
        thread::park_timeout(PAUSE);
    }
}
