//! A place for a virtio device that may come later: a register block that is there from the start, and
//! says that it has no device until it gets one.
//!
//! A driver skips a block whose device has number 0 (virtio 1.2, section 4.2.3.1.1), and looks again
//! only when it is told to.

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_VERSION};

use super::mmio::{MAGIC, MmioTransport, RegisterPage, VERSION};
use crate::bus::BusDevice;

/// A register block with a device, or without.
pub struct Slot {
    transport: Option<MmioTransport>,
    page: RegisterPage,
}

impl Slot {
    /// One without, shown in `page`.
    pub fn new(page: RegisterPage) -> Self {
        let slot = Slot { transport: None, page };
        slot.show_empty();
        slot
    }

    /// What a device has to show itself in that is to come here.
    pub fn page(&self) -> &RegisterPage {
        &self.page
    }

    /// Shows that there is no device.
    fn show_empty(&self) {
        self.page.clear();
        self.page.set(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
        self.page.set(VIRTIO_MMIO_VERSION, VERSION);
    }

    /// Whether it has a device.
    pub fn is_taken(&self) -> bool {
        self.transport.is_some()
    }

    /// Puts a device into an empty slot, whose page it has.
    pub fn insert(&mut self, transport: MmioTransport) {
        debug_assert!(!self.is_taken(), "a slot is asked before it is filled");
        transport.show();
        self.transport = Some(transport);
    }

    /// Takes the device out. It is idle from here on, whatever its driver did; a driver that still
    /// uses it finds a device of number 0 that was reset.
    pub fn remove(&mut self) -> Option<MmioTransport> {
        let mut transport = self.transport.take()?;
        transport.reset();
        self.show_empty();
        Some(transport)
    }
}

impl BusDevice for Slot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(transport) = &mut self.transport {
            transport.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::{Arc, Mutex};

    use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
    use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_STATUS};

    use super::*;
    use crate::interrupt::IrqLine;
    use crate::virtio::rng::Rng;
    use crate::virtio::testing::memory;

    fn transport(slot: &Slot) -> MmioTransport {
        let device = Arc::new(Mutex::new(Rng::new(File::open("/dev/zero").unwrap())));
        let line = Arc::new(IrqLine::new().unwrap());
        MmioTransport::new(memory(), device, line, slot.page().clone()).unwrap()
    }

    fn read(slot: &mut Slot, register: u32) -> u32 {
        let mut data = [0xff; 4];
        slot.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_empty_slot_is_a_virtio_block_without_a_device() {
        let mut slot = Slot::new(RegisterPage::alone().unwrap());

        slot.write(VIRTIO_MMIO_STATUS.into(), &1_u32.to_le_bytes());

        assert_eq!(read(&mut slot, VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_VERSION), VERSION);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), 0);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 0);
        assert_eq!(read(&mut slot, 0x100), 0);
    }

    #[test]
    fn a_slot_shows_its_device_for_as_long_as_it_has_it() {
        let mut slot = Slot::new(RegisterPage::alone().unwrap());

        slot.insert(transport(&slot));
        slot.write(VIRTIO_MMIO_STATUS.into(), &1_u32.to_le_bytes());
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_RNG);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 1);
        let removed = slot.remove();

        assert!(removed.is_some() && slot.remove().is_none());
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), 0);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 0);
    }

    #[test]
    fn a_device_that_is_taken_out_is_reset() {
        let mut slot = Slot::new(RegisterPage::alone().unwrap());
        slot.insert(transport(&slot));
        slot.write(VIRTIO_MMIO_STATUS.into(), &1_u32.to_le_bytes());

        let mut removed = slot.remove().unwrap();

        let mut status = [0xff; 4];
        removed.read(VIRTIO_MMIO_STATUS.into(), &mut status);
        assert_eq!(status, [0; 4]);
    }
}
