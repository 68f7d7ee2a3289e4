//! The guest-physical map of a pseries machine (PAPR), which has RAM at 0 and no fixed devices: all
//! platform functions are hypercalls.
//!
//! ```text
//! 0x0000_0000  RAM: kernel upwards
//!              initrd, RTAS, device tree: up to the end of the real mode area
//!              from the next GiB on what extends it: mapped files, plugged memory
//! 0x0100_8000_0000  device windows of the PCI host bridge
//! ```

use std::ops::Range;

use vm_memory::GuestAddress;

use crate::machine::{MemoryMap, PlatformDevice};

/// What every guest kernel is told first: a kernel that panics ends the VM at once.
pub const DEFAULT_CMDLINE: &str = "panic=-1 cryptomgr.notests";

/// Largest memory that the first instructions and RTAS may use, in bytes: what the hash page
/// tables of every supported processor can map before the kernel runs.
pub const REAL_MODE_AREA: u64 = 256 << 20;
/// Room for the device tree, in bytes, at the end of the real mode area.
pub const TREE_ROOM: u64 = 64 << 10;
/// Size of RTAS, in bytes, right below the device tree.
pub const RTAS_BYTES: u32 = 4096;

/// Where device windows may go: above the RAM of any machine, as 64-bit PCI memory.
pub const DEVICES: Range<u64> = 0x100_8000_0000..0x100_c000_0000;
/// Interrupt sources free for devices; lower numbers are inter-processor interrupts (XICS).
pub const DEVICE_GSIS: Range<u32> = 0x1000..0x1100;

/// What extends RAM starts and ends at a multiple of this: a huge page of any size ends before it.
const EXTENSION_ALIGNMENT: u64 = 1 << 30;

/// Consoles and power are hypercalls.
pub const PLATFORM_DEVICES: &[PlatformDevice] = &[];

/// Where `ram_bytes` of RAM lie: in one piece from 0.
pub fn memory_map(ram_bytes: u64) -> MemoryMap {
    MemoryMap {
        regions: vec![(GuestAddress(0), ram_bytes)],
        device_window: DEVICES,
        extension_window: ram_bytes.next_multiple_of(EXTENSION_ALIGNMENT)..DEVICES.start,
    }
}

/// Size of the real mode area of a machine with `ram_bytes` of RAM, in bytes.
pub fn real_mode_area(ram_bytes: u64) -> u64 {
    ram_bytes.min(REAL_MODE_AREA)
}

/// Where the device tree goes in a machine with `ram_bytes` of RAM.
pub fn tree(ram_bytes: u64) -> GuestAddress {
    GuestAddress(real_mode_area(ram_bytes).saturating_sub(TREE_ROOM))
}

/// Where RTAS goes in a machine with `ram_bytes` of RAM.
pub fn rtas(ram_bytes: u64) -> GuestAddress {
    GuestAddress(tree(ram_bytes).0.saturating_sub(RTAS_BYTES.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_one_region_from_zero() {
        assert_eq!(memory_map(8 << 30).regions, [(GuestAddress(0), 8 << 30)]);
    }

    #[test]
    fn extensions_lie_between_ram_and_the_devices() {
        assert_eq!(memory_map(8 << 30).extension_window, 8 << 30..DEVICES.start);
        assert!(memory_map(1 << 40).extension_window.start < DEVICES.start);
    }

    #[test]
    fn the_device_tree_of_a_small_machine_ends_with_its_ram() {
        assert_eq!(tree(128 << 20).0 + TREE_ROOM, 128 << 20);
    }

    #[test]
    fn the_device_tree_of_a_large_machine_ends_with_the_real_mode_area() {
        assert_eq!(tree(8 << 30).0 + TREE_ROOM, REAL_MODE_AREA);
    }

    #[test]
    fn rtas_ends_where_the_device_tree_begins() {
        assert_eq!(rtas(1 << 30).0 + u64::from(RTAS_BYTES), tree(1 << 30).0);
    }
}
