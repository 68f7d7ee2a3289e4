//! A device that the host takes away from its driver.
//!
//! virtio-mmio has no way to tell the driver, which goes on until somebody in the guest unbinds it, and waits
//! for the requests it has made before it ends. So its device is exchanged for one that fails them.

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use super::MmioTransport;
use crate::virtio::VirtioDevice;

impl MmioTransport {
    /// Whether a driver uses the device, or is about to.
    pub fn is_in_use(&self) -> bool {
        let used = VIRTIO_CONFIG_S_DRIVER;
        self.shared.status() & (used | VIRTIO_CONFIG_S_FAILED) == used
    }

    /// Waits for what is in flight, makes the device idle for good, and has its stand-in go on where it
    /// stood, once that is served. None without a driver, if it needs none, or if the device waits for its
    /// reset: then the same device is still there.
    pub fn withdraw(&mut self) -> Option<Arc<Mutex<dyn VirtioDevice>>> {
        if !self.is_in_use() {
            return None;
        }
        let old = self.device.clone();
        let mut device = old.lock().expect("no device panics while it holds its lock");
        let stand_in = device.stand_in()?;
        let positions = self.quiesce(&mut *device);
        // Nobody knows any more which requests are to be answered.
        if self.shared.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0 {
            return None;
        }
        device.reset();
        drop(device);
        self.device = stand_in.clone();
        // An idle device has no positions.
        if !positions.is_empty() {
            self.start(&positions);
        }
        Some(stand_in)
    }
}
