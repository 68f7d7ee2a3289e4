//! Segments and paging before the kernel's own tables: flat segments, and for 64-bit mode the first
//! GiB mapped onto itself.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::kvm_segment;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::layout;
use crate::machine::Protocol;
use crate::{ArchError, VcpuFd};

/// Selectors that the boot protocol fixes (Documentation/arch/x86/boot.rst).
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Selectors of our own choice, as PVH asks only for what they select.
const PVH_CS: u16 = 0x20;
const PVH_TASK: u16 = 0x28;

// Descriptors, by selector: two empty, then flat code (execute, read; 64-bit) and data; flat code
// of 32 bits, and a busy task state.
const GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x0000_8b00_0000_0067,
];

const CR0_PROTECTED: u64 = 1;
/// Always set on every processor since the 486.
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const PAGE_BYTES: u64 = 0x1000;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Writes descriptors and page tables.
pub fn write(memory: &GuestMemoryMmap) -> Result<(), ArchError> {
    let [top, middle, bottom] =
        [0, 1, 2].map(|page| GuestAddress(layout::PAGE_TABLES.0 + page * PAGE_BYTES));
    put(memory, layout::GDT, GDT)?;
    put(memory, top, [middle.0 | PRESENT_WRITABLE])?;
    put(memory, middle, [bottom.0 | PRESENT_WRITABLE])?;
    let page = |index| (index * LARGE_PAGE_BYTES) | LARGE | PRESENT_WRITABLE;
    put(memory, bottom, (0..ENTRIES).map(page))
}

fn put(
    memory: &GuestMemoryMmap,
    table: GuestAddress,
    entries: impl IntoIterator<Item = u64>,
) -> Result<(), ArchError> {
    let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write_slice(&bytes, table).map_err(ArchError::memory("the first tables", table))
}

/// Puts the vCPU into the mode of `protocol`, on what [`write`] wrote.
pub fn set(vcpu: &VcpuFd, protocol: Protocol) -> Result<(), ArchError> {
    let mut registers = vcpu.get_sregs().map_err(ArchError::kvm("read the segments"))?;
    registers.gdt.base = layout::GDT.0;
    registers.gdt.limit = 8 * 6 - 1;
    registers.idt.base = 0;
    registers.idt.limit = 0;
    let data = data();
    registers.ds = data;
    registers.es = data;
    registers.fs = data;
    registers.gs = data;
    registers.ss = data;
    match protocol {
        Protocol::Linux => {
            registers.cs = code();
            registers.cr3 = layout::PAGE_TABLES.0;
            registers.cr4 |= CR4_PAE;
            registers.cr0 |= CR0_PROTECTED | CR0_PAGING;
            registers.efer |= EFER_LONG_MODE;
        }
        // Protected mode without paging (Xen, docs/misc/pvh.pandoc).
        Protocol::Pvh => {
            registers.cs = code_of_32_bits();
            registers.tr = task();
            registers.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
            registers.cr4 = 0;
        }
    }
    vcpu.set_sregs(&registers).map_err(ArchError::kvm("set the segments"))
}

fn code() -> kvm_segment {
    kvm_segment { selector: BOOT_CS, type_: 0b1011, l: 1, ..flat() }
}

fn code_of_32_bits() -> kvm_segment {
    kvm_segment { selector: PVH_CS, type_: 0b1011, db: 1, ..flat() }
}

fn task() -> kvm_segment {
    kvm_segment { selector: PVH_TASK, type_: 0b1011, limit: 0x67, present: 1, ..Default::default() }
}

fn data() -> kvm_segment {
    kvm_segment { selector: BOOT_DS, type_: 0b0011, db: 1, ..flat() }
}

fn flat() -> kvm_segment {
    kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptors_are_those_the_segments_claim() {
        for segment in [code(), data(), code_of_32_bits(), task()] {
            let descriptor = GDT[usize::from(segment.selector / 8)];

            let [.., access, flags, _] = descriptor.to_le_bytes();

            assert_eq!(access, segment.present << 7 | segment.s << 4 | segment.type_);
            assert_eq!(flags >> 4, segment.g << 3 | segment.db << 2 | segment.l << 1);
        }
    }

    #[test]
    fn the_last_page_below_one_gib_is_mapped_onto_itself() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();

        write(&memory).unwrap();

        let last = GuestAddress(layout::PAGE_TABLES.0 + 3 * PAGE_BYTES - 8);
        assert_eq!(memory.read_obj::<u64>(last).unwrap(), 0x3fe0_0000 | LARGE | PRESENT_WRITABLE);
    }
}
