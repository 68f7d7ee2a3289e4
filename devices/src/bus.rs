//! Routes a guest access to the device that owns the address.

use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A device the guest reaches by reading and writing addresses.
///
/// Offsets are relative to the start of the device's range; the device never learns where it sits.
pub trait BusDevice: Send {
    /// Fills `data` with the registers at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Stores `data` into the registers at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be placed on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// A device without an address.
    #[error("address range {0:#x?} is empty")]
    Empty(Range<u64>),
    /// Two devices, of which the first is the new one, with an address in common.
    #[error("address range {0:#x?} overlaps {1:#x?}")]
    Overlap(Range<u64>, Range<u64>),
}

struct Slot {
    range: Range<u64>,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Collects devices before the guest starts; [`BusBuilder::build`] freezes the result.
#[derive(Default)]
pub struct BusBuilder {
    slots: Vec<Slot>,
}

impl BusBuilder {
    /// Places `device` at `range`.
    pub fn place(
        &mut self,
        range: Range<u64>,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        if range.is_empty() {
            return Err(BusError::Empty(range));
        }
        if let Some(other) =
            self.slots.iter().find(|s| s.range.start < range.end && range.start < s.range.end)
        {
            return Err(BusError::Overlap(range, other.range.clone()));
        }
        self.slots.push(Slot { range, device });
        Ok(())
    }

    /// Freezes the address map. A frozen bus needs no lock to look an address up.
    pub fn build(mut self) -> Bus {
        self.slots.sort_by_key(|s| s.range.start);
        Bus { slots: self.slots }
    }
}

/// An address map that no longer changes; shared by every vCPU thread.
pub struct Bus {
    slots: Vec<Slot>,
}

impl Bus {
    /// Reads `data.len()` bytes at `address`. An address nobody owns reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some(slot) => lock(slot).read(address - slot.range.start, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` at `address`. A write nobody owns is dropped.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some(slot) = self.find(address) {
            lock(slot).write(address - slot.range.start, data);
        }
    }

    fn find(&self, address: u64) -> Option<&Slot> {
        let after = self.slots.partition_point(|s| s.range.start <= address);
        self.slots[..after].last().filter(|s| s.range.contains(&address))
    }
}

fn lock(slot: &Slot) -> std::sync::MutexGuard<'_, dyn BusDevice + 'static> {
    slot.device.lock().expect("a device panicked while handling a guest access")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(self.0 + offset).unwrap());
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0].into();
        }
    }

    fn bus() -> Bus {
        let mut builder = BusBuilder::default();
        builder.place(0x1000..0x1010, Arc::new(Mutex::new(Echo(1)))).unwrap();
        builder.place(0x2000..0x2010, Arc::new(Mutex::new(Echo(2)))).unwrap();
        builder.build()
    }

    #[test]
    fn device_sees_offset_from_its_own_start() {
        let mut data = [0; 1];
        bus().read(0x1004, &mut data);
        assert_eq!(data, [1 + 4]);
    }

    #[test]
    fn hole_reads_as_ones() {
        let mut data = [0; 2];
        bus().read(0x1010, &mut data);
        assert_eq!(data, [0xff, 0xff]);
    }

    #[test]
    fn overlap_is_refused() {
        let mut builder = BusBuilder::default();
        builder.place(0..0x10, Arc::new(Mutex::new(Echo(0)))).unwrap();
        let error = builder.place(0xf..0x20, Arc::new(Mutex::new(Echo(0)))).unwrap_err();
        assert_eq!(error, BusError::Overlap(0xf..0x20, 0..0x10));
    }
}
