//! The guest-physical map of an aarch64 machine, its fixed addresses and interrupt lines.
//!
//! ```text
//! 0x0800_0000  GIC distributor
//! 0x0801_0000  GICv2 interface to the vCPUs
//! 0x080a_0000  GICv3 redistributors: 128 KiB per vCPU
//! 0x0b00_0000  16550 UART
//! 0x0b00_1000  PL031 real-time clock
//! 0x1000_0000  device windows
//! 0x4000_0000  RAM: device tree, stolen time of the vCPUs, then the kernel 2 MiB on, initrd at the top
//!              from the next GiB on what extends it: mapped files, plugged memory
//! ```

use std::ops::Range;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::machine::{MemoryMap, MmioDevice, PlatformDevice, Space};

/// What every guest kernel is told first: a kernel that panics ends the VM at once.
pub const DEFAULT_CMDLINE: &str = "panic=-1 cryptomgr.notests";

/// Registers of the interrupt distributor.
pub const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// Their size in a GICv3, in bytes.
pub const GIC_DISTRIBUTOR_BYTES: u64 = 0x1_0000;
/// Their size in a GICv2, in bytes.
pub const GIC_V2_DISTRIBUTOR_BYTES: u64 = 0x1000;
/// Registers by which a vCPU takes interrupts from a GICv2.
pub const GIC_CPU_INTERFACE: u64 = 0x0801_0000;
/// Their size, in bytes.
pub const GIC_CPU_INTERFACE_BYTES: u64 = 0x2000;
/// Registers of the first vCPU's redistributor; the others follow without gaps.
pub const GIC_REDISTRIBUTORS: u64 = 0x080a_0000;
/// Size of one redistributor's registers: two frames of 64 KiB.
pub const GIC_REDISTRIBUTOR_BYTES: u64 = 0x2_0000;
/// Interrupts that every vCPU has of its own: those that software generates, and those of its timers.
pub const PRIVATE_INTERRUPTS: u32 = 32;
/// Shared peripheral interrupts of the machine; the GIC's number of one is 32 higher.
pub const SPIS: u32 = 96;

/// Registers of the UART.
pub const UART: u64 = 0x0b00_0000;
/// Their size, in bytes.
pub const UART_BYTES: u64 = 0x1000;
/// Its shared peripheral interrupt.
pub const UART_SPI: u32 = 0;
/// Registers of the real-time clock.
pub const CLOCK: u64 = UART + UART_BYTES;
/// Their size, in bytes.
pub const CLOCK_BYTES: u64 = 0x1000;
/// Shared peripheral interrupts for virtio devices; KVM's GSI is the same number.
pub const DEVICE_GSIS: Range<u32> = 1..SPIS;

/// Where device windows may go.
pub const DEVICES: Range<u64> = 0x1000_0000..0x4000_0000;

/// Start of RAM, and of the device tree in it.
pub const RAM: GuestAddress = GuestAddress(0x4000_0000);
/// What lies before the kernel, in bytes.
const BEFORE_KERNEL: u64 = 2 << 20;
/// Room for the device tree, for which Linux allows no more than 2 MiB
/// (Documentation/arch/arm64/booting.rst).
pub const TREE_ROOM: u64 = BEFORE_KERNEL - STOLEN_TIME_BYTES;
/// Where KVM tells how long each vCPU did not run that wanted to (Arm DEN0057A).
pub const STOLEN_TIME: GuestAddress = GuestAddress(RAM.0 + TREE_ROOM);
/// Size of all of that, in whole pages of the largest kind.
pub const STOLEN_TIME_BYTES: u64 = 0x1_0000;
/// Where the kernel's image goes: 2 MiB aligned, as that text wants it.
pub const KERNEL: GuestAddress = GuestAddress(RAM.0 + BEFORE_KERNEL);

/// Where the last guest-physical address is that nearly every host has: 40 bits.
pub const ADDRESSES_END: u64 = 1 << 40;
/// An initrd must lie within that many bytes from a multiple of 1 GiB below the kernel on
/// (Documentation/arch/arm64/booting.rst).
pub const INITRD_END: u64 = RAM.0 + (32 << 30);

/// What extends RAM starts at a multiple of this: a huge page of any size ends before it.
const EXTENSION_ALIGNMENT: u64 = 1 << 30;

/// Devices that are found in the device tree.
pub const PLATFORM_DEVICES: &[PlatformDevice] = &[
    PlatformDevice::Serial { space: Space::Memory, base: UART, gsi: UART_SPI },
    PlatformDevice::Clock { base: CLOCK, size: CLOCK_BYTES },
];

/// Where `ram_bytes` of RAM lie: in one piece.
pub fn memory_map(ram_bytes: u64) -> MemoryMap {
    let extensions = (RAM.0 + ram_bytes).next_multiple_of(EXTENSION_ALIGNMENT);
    MemoryMap {
        regions: vec![(RAM, ram_bytes)],
        device_window: DEVICES,
        extension_window: extensions..ADDRESSES_END.max(extensions),
    }
}

/// Which interrupt controller a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GicVersion {
    /// For at most eight vCPUs; of hosts that have nothing newer.
    V2,
    /// For any number.
    V3,
}

/// What Linux calls `device` on its platform bus: by address and node of the device tree
/// (drivers/of/platform.c).
pub fn device_name(device: &MmioDevice) -> String {
    format!("{:x}.virtio_mmio", device.base.0)
}

/// Affinity of vCPU `index` as KVM sets it in MPIDR_EL1: sixteen vCPUs per cluster, as many as
/// one software-generated interrupt reaches.
pub const fn affinity(index: u8) -> u32 {
    let (cluster, core) = (index >> 4, index & 0xf);
    (cluster as u32) << 8 | core as u32
}

/// Where KVM tells how long the vCPU with this affinity did not run.
pub const fn stolen_time(affinity: u32) -> u64 {
    let index = affinity >> 8 << 4 | affinity & 0xf;
    STOLEN_TIME.0 + index as u64 * 64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_one_region_behind_the_device_windows() {
        let map = memory_map(8 << 30);

        assert_eq!(map.regions, [(RAM, 8 << 30)]);
        assert_eq!(map.device_window.end, RAM.0);
    }

    #[test]
    fn extensions_start_at_the_gib_behind_ram() {
        assert_eq!(memory_map(256 << 20).extension_window, 2 << 30..ADDRESSES_END);
        assert!(memory_map(1 << 40).extension_window.is_empty());
    }

    #[test]
    fn the_redistributors_of_the_largest_machine_end_below_the_uart() {
        let end = GIC_REDISTRIBUTORS + u64::from(u8::MAX) * GIC_REDISTRIBUTOR_BYTES;

        assert!(end <= UART);
    }

    #[test]
    fn the_stolen_time_of_the_largest_machine_has_room() {
        let places: Vec<_> = (0..=u8::MAX).map(|index| stolen_time(affinity(index))).collect();

        assert!(places.is_sorted_by(|one, next| one + 64 == *next));
        assert!(places[255] + 64 <= STOLEN_TIME.0 + STOLEN_TIME_BYTES);
    }

    #[test]
    fn the_kernel_is_aligned_to_2_mib() {
        assert_eq!(KERNEL.0 % (2 << 20), 0);
    }

    #[test]
    fn a_device_is_called_by_its_address() {
        let device = MmioDevice { base: GuestAddress(0x1000_2000), size: 0x1000, gsi: 3 };

        assert_eq!(device_name(&device), "10002000.virtio_mmio");
    }

    #[test]
    fn the_seventeenth_vcpu_is_the_first_of_the_second_cluster() {
        assert_eq!(affinity(16), 0x100);
    }
}
