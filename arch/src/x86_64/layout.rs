//! The guest-physical map of an x86_64 machine, its fixed addresses, ports and interrupt lines.
//!
//! ```text
//! 0x0000_0500  GDT of the first vCPU
//! 0x0000_6000  PVH start info
//! 0x0000_7000  zero page (boot_params)
//! 0x0000_9000  page tables of the first vCPU: 12 KiB
//! 0x0002_0000  kernel command line: 64 KiB at most
//! 0x0009_fc00  end of low RAM; reserved up to 1 MiB
//! 0x000e_0000  ACPI: RSDP first, then the other tables
//! 0x000f_0000  MP table
//! 0x0010_0000  RAM again: kernel upwards, initrd at the top
//! 0xc000_0000  gap: device windows
//! 0xfec0_0000  IOAPIC, local APICs, pages KVM needs on Intel hosts
//! 0x1_0000_0000  the rest of RAM, then what extends it: mapped files, plugged memory
//! ```

use std::ops::Range;

use vm_memory::GuestAddress;

use crate::machine::{MemoryMap, MmioDevice, PlatformDevice, Space};

/// What every guest kernel is told first.
///
/// - `panic=-1`: a kernel that panics ends the VM at once instead of halting for ever.
/// - `reboot=k`: a reboot is one write to the keyboard controller, which is told apart from a
///   crash, where `reboot=t` would look like one.
/// - `tsc=reliable`: no watchdog timer for a clock that the host already vouches for.
/// - `pci=off`: no probing of configuration ports for buses that do not exist.
/// - `8250.nr_uarts=1`: no probing of the three UARTs that do not exist.
/// - `i8042.*`: a kernel that ignores the ACPI boot flags does not wait for a keyboard.
/// - `cryptomgr.notests`: no self-tests of every cipher during the boot.
/// - `rcupdate.rcu_expedited=1`: who moves processes between cgroups or makes namespaces does not wait
///   for the next ticks, 10 ms each, until all processors have passed a quiet state.
/// - `percpu_alloc=page`: what each processor has of its own takes the pages it needs, and not 2 MiB, all of
///   which are cleared before most are given back.
pub const DEFAULT_CMDLINE: &str = "panic=-1 reboot=k tsc=reliable pci=off 8250.nr_uarts=1 \
     i8042.noaux i8042.nomux i8042.dumbkbd cryptomgr.notests rcupdate.rcu_expedited=1 percpu_alloc=page";

/// Descriptors the first vCPU runs on until the kernel loads its own.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// What a kernel finds that is entered by PVH: one page.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// The kernel's `boot_params` (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Page tables that map the first GiB onto itself: three pages.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line with its NUL, in bytes.
pub const CMDLINE_ROOM: usize = 0x1_0000;
/// End of the RAM below 1 MiB that the guest may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Where a PC kernel looks for the RSDP (ACPI 6.5, section 5.2.5.1); the other tables follow it.
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// Room for all ACPI tables, in bytes.
pub const ACPI_ROOM: u64 = 0x1_0000;
/// Where a PC kernel looks for the MP table (MP specification 1.4, section 4).
pub const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// Room for the MP table, in bytes.
pub const MP_TABLE_ROOM: u64 = 0x1_0000;
/// Where RAM continues above the area of PC firmware, and kernels may be loaded.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);
/// Where the gap for devices begins. A multiple of 1 GiB, so that RAM ends on a huge page.
pub const GAP_START: u64 = 0xc000_0000;
/// Where the device windows end.
pub const DEVICES_END: u64 = 0xfec0_0000;
/// Where RAM continues above the gap.
pub const GAP_END: u64 = 0x1_0000_0000;

/// Where the last guest-physical address is that every supported processor has: 46 bits.
pub const ADDRESSES_END: u64 = 1 << 46;
/// What extends RAM starts at a multiple of this: a huge page of any size ends before it.
const EXTENSION_ALIGNMENT: u64 = 1 << 30;

/// Registers of KVM's IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Input pins of KVM's IOAPIC.
pub const IOAPIC_PINS: u32 = 24;
/// Registers of every local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page KVM needs on Intel hosts without unrestricted guests.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM needs on Intel hosts.
pub const TSS: usize = 0xfffb_d000;

/// First register of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_GSI: u32 = 4;
/// Interrupt lines of the IOAPIC that no PC device claims.
pub const DEVICE_GSIS: Range<u32> = 5..IOAPIC_PINS;

/// Devices with registers of their own. The keyboard controller is not among them: all that is
/// left of it is stateless and answered by `exits.rs`.
pub const PLATFORM_DEVICES: &[PlatformDevice] =
    &[PlatformDevice::Serial { space: Space::Port, base: COM1_PORT as u64, gsi: COM1_GSI }];

/// The power ports, outside of every range a PC uses: what ACPI calls sleep control, sleep status
/// and reset register (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7), one byte each.
pub mod power {
    /// Sleep control: [`POWER_OFF`] ends the VM as powered off.
    pub const CONTROL_PORT: u16 = 0x600;
    /// Sleep status: always reads 0.
    pub const STATUS_PORT: u16 = 0x601;
    /// Reset: [`RESET`] ends the VM as reset.
    pub const RESET_PORT: u16 = 0x602;
    /// Sleep type of the soft-off state S5, as `\_S5` in the DSDT says.
    pub const S5: u8 = 5;
    /// What a guest writes to the control port to power off: SLP_EN (bit 5) and S5 in SLP_TYP
    /// (bits 2 to 4).
    pub const POWER_OFF: u8 = 1 << 5 | S5 << 2;
    /// What a guest writes to the reset port.
    pub const RESET: u8 = 1;
}

/// Where `ram_bytes` of RAM lie: up to the gap, and what is left above it.
pub fn memory_map(ram_bytes: u64) -> MemoryMap {
    let low = ram_bytes.min(GAP_START);
    let mut regions = vec![(GuestAddress(0), low)];
    if ram_bytes > low {
        regions.push((GuestAddress(GAP_END), ram_bytes - low));
    }
    let ram_end = GAP_END + (ram_bytes - low);
    MemoryMap {
        regions,
        device_window: GAP_START..DEVICES_END,
        extension_window: ram_end.next_multiple_of(EXTENSION_ALIGNMENT)..ADDRESSES_END,
    }
}

/// The kernel parameter that names `device`
/// (Documentation/admin-guide/kernel-parameters.txt, `virtio_mmio.device`).
pub fn cmdline_device(device: &MmioDevice) -> String {
    format!("virtio_mmio.device={:#x}@{:#x}:{}", device.size, device.base.0, device.gsi)
}

/// What Linux calls virtio device number `number` on its platform bus: one that finds it on its command
/// line, and one that finds it by ACPI (drivers/virtio/virtio_mmio.c, drivers/acpi/acpi_platform.c).
pub fn device_names(number: usize) -> [String; 2] {
    [format!("virtio-mmio.{number}"), format!("LNRO0005:{number:02x}")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_is_one_region() {
        let map = memory_map(256 << 20);

        assert_eq!(map.regions, [(GuestAddress(0), 256 << 20)]);
    }

    #[test]
    fn ram_that_just_fits_below_the_gap_is_one_region() {
        let map = memory_map(GAP_START);

        assert_eq!(map.regions, [(GuestAddress(0), GAP_START)]);
    }

    #[test]
    fn large_ram_continues_above_the_gap() {
        let map = memory_map(8 << 30);

        assert_eq!(
            map.regions,
            [(GuestAddress(0), GAP_START), (GuestAddress(GAP_END), (8 << 30) - GAP_START)]
        );
    }

    #[test]
    fn extensions_start_above_ram_and_above_the_gap() {
        let starts = [256 << 20, GAP_START, GAP_START + 1, 8 << 30]
            .map(|ram_bytes| memory_map(ram_bytes).extension_window.start);

        assert_eq!(starts, [4 << 30, 4 << 30, 5 << 30, 9 << 30]);
    }

    #[test]
    fn device_windows_touch_neither_ram_nor_the_interrupt_controllers() {
        let map = memory_map(8 << 30);

        assert_eq!(map.device_window.start, map.regions[0].1);
        assert!(map.device_window.end <= u64::from(IOAPIC));
    }

    #[test]
    fn a_device_is_named_as_the_kernel_parses_it() {
        let device = MmioDevice { base: GuestAddress(0xc000_1000), size: 0x1000, gsi: 6 };

        assert_eq!(cmdline_device(&device), "virtio_mmio.device=0x1000@0xc0001000:6");
    }
}
