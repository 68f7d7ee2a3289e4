//! The zero page (`boot_params`): command line, initrd, memory map and the way to the ACPI tables
//! (Documentation/arch/x86/zero-page.rst and boot.rst).

use std::ops::Range;

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::super::layout;
use crate::ArchError;
use crate::machine::Machine;

// Offsets into the zero page.
const ACPI_RSDP_ADDR: u64 = 0x070;
const EXT_RAMDISK_IMAGE: u64 = 0x0c0;
const E820_ENTRIES: u64 = 0x1e8;
const SETUP_HEADER: u64 = 0x1f1;
const TYPE_OF_LOADER: u64 = 0x210;
const RAMDISK_IMAGE: u64 = 0x218;
const CMD_LINE_PTR: u64 = 0x228;
const CMDLINE_SIZE: u64 = 0x238;
const E820_TABLE: u64 = 0x2d0;
const E820_ENTRY_BYTES: u64 = 20;

/// A loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// What a kernel does with a range of memory (ACPI 6.5, table 15.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// It may use it.
    Ram = 1,
    /// It leaves it alone.
    Reserved = 2,
    /// It may use it once it has read the ACPI tables there.
    AcpiTables = 3,
}

/// Writes the kernel's setup header, before [`write`] completes the page.
pub fn write_header(memory: &GuestMemoryMmap, header: &[u8]) -> Result<(), ArchError> {
    let address = GuestAddress(layout::ZERO_PAGE.0 + SETUP_HEADER);
    memory.write_slice(header, address).map_err(ArchError::memory("the setup header", address))
}

/// Writes the command line, and everything but the setup header.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine<'_>) -> Result<(), ArchError> {
    write_cmdline(memory, machine.cmdline)?;
    put(memory, ACPI_RSDP_ADDR, layout::ACPI.0)?;
    put(memory, TYPE_OF_LOADER, LOADER_UNDEFINED)?;
    if let Some((base, size)) = machine.entry.initrd {
        let [base_low, base_high] = halves(base.0);
        let [size_low, size_high] = halves(size);
        put(memory, RAMDISK_IMAGE, base_low)?;
        put(memory, RAMDISK_IMAGE + 4, size_low)?;
        put(memory, EXT_RAMDISK_IMAGE, base_high)?;
        put(memory, EXT_RAMDISK_IMAGE + 4, size_high)?;
    }
    write_memory_map(memory)
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), ArchError> {
    let kernel_limit: u32 = get(memory, CMDLINE_SIZE)?;
    let limit = (kernel_limit as usize).min(layout::CMDLINE_ROOM - 1);
    if cmdline.len() > limit {
        return Err(ArchError::CmdlineTooLong { length: cmdline.len(), limit });
    }
    if cmdline.contains('\0') {
        return Err(ArchError::CmdlineNul);
    }
    let bytes = [cmdline.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&bytes, layout::CMDLINE)
        .map_err(ArchError::memory("the command line", layout::CMDLINE))?;
    let [low, _] = halves(layout::CMDLINE.0);
    put(memory, CMD_LINE_PTR, low)
}

fn write_memory_map(memory: &GuestMemoryMmap) -> Result<(), ArchError> {
    let ranges = memory_map(memory);
    for (index, (range, kind)) in (0..).zip(&ranges) {
        let entry = E820_TABLE + index * E820_ENTRY_BYTES;
        put(memory, entry, range.start)?;
        put(memory, entry + 8, range.end - range.start)?;
        put(memory, entry + 16, *kind as u32)?;
    }
    let count = u8::try_from(ranges.len()).expect("a machine has a handful of memory ranges");
    put(memory, E820_ENTRIES, count)
}

/// `(range, kind)` of all memory, ascending, without overlap.
pub fn memory_map(memory: &GuestMemoryMmap) -> Vec<(Range<u64>, Kind)> {
    let acpi_end = layout::ACPI.0 + layout::ACPI_ROOM;
    let mut ranges = vec![
        (0..layout::LOW_RAM_END, Kind::Ram),
        (layout::LOW_RAM_END..layout::ACPI.0, Kind::Reserved),
        (layout::ACPI.0..acpi_end, Kind::AcpiTables),
        (acpi_end..layout::HIGH_RAM.0, Kind::Reserved),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0;
        let ram = start.max(layout::HIGH_RAM.0)..start + region.len();
        if !ram.is_empty() {
            ranges.push((ram, Kind::Ram));
        }
    }
    ranges
}

/// The low and the high 32 bits of `value`.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

fn put<T: ByteValued>(memory: &GuestMemoryMmap, offset: u64, value: T) -> Result<(), ArchError> {
    let address = GuestAddress(layout::ZERO_PAGE.0 + offset);
    memory.write_obj(value, address).map_err(ArchError::memory("the zero page", address))
}

fn get<T: ByteValued>(memory: &GuestMemoryMmap, offset: u64) -> Result<T, ArchError> {
    let address = GuestAddress(layout::ZERO_PAGE.0 + offset);
    memory.read_obj(address).map_err(ArchError::memory("the zero page", address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Entry, Protocol};

    const CMDLINE_LIMIT: u32 = 2047;

    fn memory(ram: u64) -> GuestMemoryMmap {
        let ranges: Vec<_> = layout::memory_map(ram)
            .regions
            .iter()
            .map(|(base, size)| (*base, usize::try_from(*size).unwrap()))
            .collect();
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        put(&memory, CMDLINE_SIZE, CMDLINE_LIMIT).unwrap();
        memory
    }

    fn machine(cmdline: &str) -> Machine<'_> {
        let initrd = Some((GuestAddress(0x200_0000), 0x1234));
        let entry = Entry { address: layout::HIGH_RAM, initrd, protocol: Protocol::Linux };
        Machine { vcpus: 1, cmdline, entry, devices: &[] }
    }

    #[test]
    fn the_command_line_is_where_the_page_says() {
        let memory = memory(64 << 20);

        write(&memory, &machine("quiet")).unwrap();

        let place: u32 = get(&memory, CMD_LINE_PTR).unwrap();
        let mut text = [0xff; 6];
        memory.read_slice(&mut text, GuestAddress(place.into())).unwrap();
        assert_eq!(&text, b"quiet\0");
    }

    #[test]
    fn the_initrd_is_named() {
        let memory = memory(64 << 20);

        write(&memory, &machine("")).unwrap();

        assert_eq!(get::<u32>(&memory, RAMDISK_IMAGE).unwrap(), 0x200_0000);
        assert_eq!(get::<u32>(&memory, RAMDISK_IMAGE + 4).unwrap(), 0x1234);
    }

    #[test]
    fn a_command_line_longer_than_the_kernel_takes_is_refused() {
        let text = "x".repeat(CMDLINE_LIMIT as usize + 1);

        let error = write(&memory(64 << 20), &machine(&text)).unwrap_err();

        assert!(matches!(error, ArchError::CmdlineTooLong { length: 2048, limit: 2047 }));
    }

    #[test]
    fn a_command_line_as_long_as_the_kernel_takes_is_written() {
        let text = "x".repeat(CMDLINE_LIMIT as usize);

        assert!(write(&memory(64 << 20), &machine(&text)).is_ok());
    }

    #[test]
    fn a_command_line_with_a_nul_is_refused() {
        let error = write(&memory(64 << 20), &machine("a\0b")).unwrap_err();

        assert!(matches!(error, ArchError::CmdlineNul));
    }

    #[test]
    fn the_memory_map_is_ascending_and_without_gaps_up_to_the_end_of_low_ram() {
        let ranges = memory_map(&memory(64 << 20));

        assert!(ranges.windows(2).all(|pair| pair[0].0.end == pair[1].0.start));
        assert_eq!(ranges.last(), Some(&(layout::HIGH_RAM.0..64 << 20, Kind::Ram)));
    }

    #[test]
    fn ram_above_the_gap_is_listed() {
        let ranges = memory_map(&memory(4 << 30));

        assert_eq!(ranges.last(), Some(&(layout::GAP_END..5 << 30, Kind::Ram)));
    }

    #[test]
    fn no_table_lies_in_usable_ram() {
        let ranges = memory_map(&memory(64 << 20));

        for table in [layout::ACPI.0, layout::MP_TABLE.0] {
            let (_, kind) = ranges.iter().find(|(range, _)| range.contains(&table)).unwrap();
            assert_ne!(*kind, Kind::Ram);
        }
    }
}
