//! Plain data that travels between an architecture and the VMM.

use std::fs::File;
use std::ops::Range;

use vm_memory::GuestAddress;

/// A guest exit, in terms every architecture shares.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest read device registers; fill `data` before it runs again.
    Read {
        /// Which of the two address spaces.
        space: Space,
        /// First byte read.
        address: u64,
        /// Where the answer goes; its length is the access width.
        data: &'a mut [u8],
    },
    /// The guest wrote device registers.
    Write {
        /// Which of the two address spaces.
        space: Space,
        /// First byte written.
        address: u64,
        /// What was written; its length is the access width.
        data: &'a [u8],
    },
    /// The architecture dealt with it; run again.
    Handled,
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reboot.
    Reset,
    /// The guest faulted while it handled a double fault: a crash before the kernel could report
    /// it, or a kernel that was told to reboot this way.
    TripleFault,
}

/// An address space of device registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Guest-physical memory.
    Memory,
    /// x86 I/O ports.
    Port,
}

/// A virtio-mmio device, as the guest's description of the machine lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical base address.
    pub base: GuestAddress,
    /// Size of the register window, in bytes.
    pub size: u64,
    /// KVM GSI of the interrupt line.
    pub gsi: u32,
}

/// RAM as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap {
    /// `(base, size in bytes)` of every region, ascending, without overlap.
    pub regions: Vec<(GuestAddress, u64)>,
    /// Where device windows may go.
    pub device_window: Range<u64>,
    /// Where memory may go that is not there as RAM when the guest starts: mapped files and memory
    /// that is plugged in later. Above all RAM, so that the guest can map it as memory; starts and
    /// ends at a multiple of 1 GiB.
    pub extension_window: Range<u64>,
}

/// A device that is part of the platform rather than found by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlatformDevice {
    /// 16550 UART.
    Serial {
        /// Address space of its eight registers.
        space: Space,
        /// First register.
        base: u64,
        /// KVM GSI of its interrupt line.
        gsi: u32,
    },
    /// PL031 real-time clock, without an interrupt; there is one in every machine that may have it.
    Clock {
        /// First of its registers in guest-physical memory.
        base: u64,
        /// Their size, in bytes.
        size: u64,
    },
}

/// How a kernel is entered, where there is a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// The kernel's own: on x86_64 the 64-bit protocol of Linux.
    Linux,
    /// The 32-bit entry of an x86 kernel that names it in a note, as Xen defined it.
    Pvh,
}

/// What the guest boots from.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel image.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// How the kernel is to be entered; `None` leaves that to what the kernel offers.
    pub protocol: Option<Protocol>,
}

/// Where the first vCPU starts, and what it finds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Guest-physical address of the first instruction.
    pub address: GuestAddress,
    /// `(base, size in bytes)` of the initial RAM disk.
    pub initrd: Option<(GuestAddress, u64)>,
    /// What the kernel there expects of registers and tables.
    pub protocol: Protocol,
}

/// Everything the guest must be told about the machine.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Number of processors that there can be, at least 1. Some of them may not answer yet.
    pub vcpus: u8,
    /// The kernel's whole command line.
    pub cmdline: &'a str,
    /// What [`Arch::load`](crate::Arch::load) returned.
    pub entry: Entry,
    /// The virtio-mmio devices.
    pub devices: &'a [MmioDevice],
}
