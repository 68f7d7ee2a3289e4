//! Memory that can be plugged in while a machine runs: a KVM memory slot for each part of it that the guest
//! has used. For every page of a slot a host's kernel may keep two bytes that nobody gets back, which for
//! a guest that may grow as large as its host is more than the guest.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use arch::VmFd;
use devices::virtio::mem::Backing;

use super::patchwork::Patchwork;
use super::set_slot;

/// First of the KVM memory slots for it: behind those for RAM and files, and before those for DAX windows.
const FIRST_SLOT: u32 = 128;

/// Most parts.
const MAX_PARTS: u64 = 64;

/// Least size of a part, in bytes: that of a block of memory for Linux.
const MIN_PART_BYTES: u64 = 128 << 20;

/// Memory that can be plugged in, as KVM has it.
pub struct Pluggable {
    vm: Arc<VmFd>,
    /// Where the guest has it, and where this process has its beginning.
    addresses: Range<u64>,
    host_address: u64,
    part_bytes: u64,
    /// Whether KVM has a slot for each part.
    shown: Vec<bool>,
    memory: Patchwork,
}

impl Pluggable {
    /// Memory of which KVM knows nothing yet, at `addresses` of the guest: `memory`, which starts at
    /// `host_address`, and has to be mapped for the rest of the process.
    pub(super) fn new(
        vm: Arc<VmFd>,
        addresses: Range<u64>,
        host_address: u64,
        memory: Patchwork,
    ) -> Self {
        let bytes = addresses.end - addresses.start;
        let part_bytes = part_bytes(bytes);
        let parts = usize::try_from(bytes.div_ceil(part_bytes)).expect("no more than 64");
        let shown = vec![false; parts];
        Pluggable { vm, addresses, host_address, part_bytes, shown, memory }
    }

    /// Where the guest has it.
    pub fn addresses(&self) -> &Range<u64> {
        &self.addresses
    }

    /// Lets the guest reach `range`, which lies in there.
    fn show(&mut self, range: &Range<u64>) -> io::Result<()> {
        for part in parts(&self.addresses, self.part_bytes, range) {
            let shown = usize::try_from(part).ok().and_then(|part| self.shown.get_mut(part));
            let shown = shown.ok_or(io::ErrorKind::InvalidInput)?;
            if !*shown {
                let offset = part * self.part_bytes;
                let base = self.addresses.start + offset;
                let bytes = self.part_bytes.min(self.addresses.end - base);
                let slot = FIRST_SLOT + u32::try_from(part).expect("a part has a small number");
                // SAFETY: the memory is mapped for the rest of the process, as whoever made this promised.
                unsafe { set_slot(&self.vm, slot, 0, base, bytes, self.host_address + offset) }
                    .map_err(io::Error::other)?;
                *shown = true;
            }
        }
        Ok(())
    }

    /// Where `range` of the guest's addresses is, in bytes from the start.
    fn offsets(&self, range: &Range<u64>) -> io::Result<Range<u64>> {
        let offset = |address: u64| address.checked_sub(self.addresses.start);
        let offsets = offset(range.start).zip(offset(range.end));
        offsets.map(|(start, end)| start..end).ok_or(io::ErrorKind::InvalidInput.into())
    }
}

impl Backing for Pluggable {
    fn plug(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.show(range)?;
        self.memory.fill(&self.offsets(range)?)
    }

    /// The guest may go on writing there, as it has the part; that costs the host no more than a sink.
    fn unplug(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.memory.empty(&self.offsets(range)?)
    }
}

/// How large the parts of `bytes` bytes are: huge pages fit into them.
fn part_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(MAX_PARTS).next_power_of_two().max(MIN_PART_BYTES)
}

/// The numbers of the parts that have something of `range`.
fn parts(addresses: &Range<u64>, part_bytes: u64, range: &Range<u64>) -> Range<u64> {
    let offset = |address: u64| address.saturating_sub(addresses.start);
    offset(range.start) / part_bytes..offset(range.end).div_ceil(part_bytes)
}

#[cfg(test)]
mod tests {
    use arch::Kvm;
    use arch::machine::MemoryMap;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::{GuestRam, Store};

    const GIB: u64 = 1 << 30;

    /// Whether KVM has a slot at this address, which it would not let another one overlap.
    fn is_shown(vm: &VmFd, memory: &Pluggable, address: u64) -> bool {
        // SAFETY: memory of the guest in another place; it is mapped for the rest of the process.
        match unsafe { set_slot(vm, 99, 0, address, 4096, memory.host_address) } {
            // SAFETY: without a size, it takes the slot away.
            Ok(()) => unsafe { set_slot(vm, 99, 0, address, 0, 0) }.is_err(),
            Err(_) => true,
        }
    }

    #[test]
    #[ignore = "needs KVM"]
    fn devices_keep_what_they_write_to_plugged_memory_and_a_guest_has_whole_parts_of_it() {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        let regions = vec![(GuestAddress(0), 2 << 20)];
        let map = MemoryMap { regions, device_window: 0..0, extension_window: 0..0 };
        let config = MemoryConfig { pluggable_mib: 512, ..MemoryConfig::default() };
        let mut ram = GuestRam::allocate(&map, &config, Store::anonymous()).unwrap();
        let mut memory = ram.add_pluggable(&vm, &mut (4 * GIB..8 * GIB), &config).unwrap().unwrap();
        let block = |number: u64| 4 * GIB + number * (2 << 20)..4 * GIB + (number + 1) * (2 << 20);
        let write_all = || {
            for number in 0..256 {
                let address = GuestAddress(block(number).start);
                ram.device_memory().write_obj(number, address).unwrap();
            }
        };
        let read = |number| -> u64 {
            ram.device_memory().read_obj(GuestAddress(block(number).start)).unwrap()
        };

        memory.plug(&block(1)).unwrap();
        memory.plug(&block(130)).unwrap();
        write_all();

        assert_eq!([read(1), read(130)], [1, 130]);
        assert_ne!([read(0), read(2)], [0, 2]);
        let shown = [0, 64, 128, 192].map(|first| is_shown(&vm, &memory, block(first).start));
        assert_eq!(shown, [true, false, true, false]);

        memory.unplug(&block(130)).unwrap();
        write_all();

        assert_eq!(read(1), 1);
        assert_ne!(read(130), 130);
        assert!(memory.plug(&(block(255).start..block(256).end)).is_err());
    }

    #[test]
    fn there_are_no_more_parts_than_slots() {
        assert_eq!(part_bytes(2 << 20), 128 << 20);
        assert_eq!(part_bytes(8 * GIB), 128 << 20);
        assert_eq!(part_bytes(8 * GIB + 1), 256 << 20);
        assert_eq!(part_bytes(1024 * GIB), 16 * GIB);
        assert!((1000 * GIB).div_ceil(part_bytes(1000 * GIB)) <= MAX_PARTS);
    }

    #[test]
    fn a_range_has_something_of_each_part_that_it_touches() {
        let of = |range| parts(&(4 * GIB..8 * GIB), GIB, &range);

        assert_eq!(of(4 * GIB..4 * GIB + 1), 0..1);
        assert_eq!(of(5 * GIB - 1..5 * GIB + 1), 0..2);
        assert_eq!(of(7 * GIB..8 * GIB), 3..4);
    }
}
