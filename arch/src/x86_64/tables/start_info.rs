//! What a kernel that is entered by PVH finds: command line, initrd, memory map and the way to the
//! ACPI tables (Xen, `xen/include/public/arch-x86/hvm/start_info.h`).

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::layout;
use super::zero_page;
use crate::ArchError;
use crate::machine::Machine;

/// "xEn3", with the highest bit of the E set.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// From the structure to its one module, the initrd.
const MODULES: u64 = 0x40;
/// From the structure to the memory map.
const MEMORY_MAP: u64 = 0x80;

/// Writes it all at [`layout::START_INFO`]. The command line is the zero page's, which also knows
/// how long it may be.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine<'_>) -> Result<(), ArchError> {
    let ranges = zero_page::memory_map(memory);
    let info = layout::START_INFO.0;
    let module = machine.entry.initrd.map(|(base, size)| [base.0, size, 0, 0]);
    let entries = u64::try_from(ranges.len()).expect("a machine has a handful of memory ranges");
    let words = [
        u64::from(VERSION) << 32 | u64::from(MAGIC),
        u64::from(module.is_some()) << 32, // no flags; number of modules
        info + MODULES,
        layout::CMDLINE.0,
        layout::ACPI.0,
        info + MEMORY_MAP,
        entries,
    ];
    put(memory, 0, &words)?;
    put(memory, MODULES, &module.unwrap_or_default())?;
    let map: Vec<_> = ranges
        .into_iter()
        .flat_map(|(range, kind)| [range.start, range.end - range.start, kind as u64])
        .collect();
    put(memory, MEMORY_MAP, &map)
}

fn put(memory: &GuestMemoryMmap, offset: u64, words: &[u64]) -> Result<(), ArchError> {
    let address = GuestAddress(layout::START_INFO.0 + offset);
    let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, address).map_err(ArchError::memory("the PVH start info", address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Entry, Protocol};

    const RAM: usize = 64 << 20;

    fn written(initrd: Option<(GuestAddress, u64)>) -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let entry = Entry { address: layout::HIGH_RAM, initrd, protocol: Protocol::Pvh };
        write(&memory, &Machine { vcpus: 1, cmdline: "", entry, devices: &[] }).unwrap();
        memory
    }

    fn word(memory: &GuestMemoryMmap, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn it_begins_with_the_magic_number_and_the_version() {
        let memory = written(None);

        assert_eq!(word(&memory, layout::START_INFO.0), 0x0000_0001_336e_c578);
    }

    #[test]
    fn the_initrd_is_the_only_module() {
        let memory = written(Some((GuestAddress(0x200_0000), 0x1234)));

        assert_eq!(word(&memory, layout::START_INFO.0 + 8) >> 32, 1);
        let module = word(&memory, layout::START_INFO.0 + 16);
        assert_eq!([0, 8, 16].map(|at| word(&memory, module + at)), [0x200_0000, 0x1234, 0]);
    }

    #[test]
    fn without_an_initrd_there_is_no_module() {
        assert_eq!(word(&written(None), layout::START_INFO.0 + 8), 0);
    }

    #[test]
    fn the_memory_map_ends_with_the_end_of_ram() {
        let memory = written(None);

        let [map, entries] = [40, 48].map(|at| word(&memory, layout::START_INFO.0 + at));
        let last = map + (entries - 1) * 24;

        let ram = [layout::HIGH_RAM.0, RAM as u64 - layout::HIGH_RAM.0, 1];
        assert_eq!([0, 8, 16].map(|at| word(&memory, last + at)), ram);
    }

    #[test]
    fn command_line_and_rsdp_are_where_the_zero_page_has_them() {
        let memory = written(None);

        let found = [24, 32].map(|at| word(&memory, layout::START_INFO.0 + at));

        assert_eq!(found, [layout::CMDLINE.0, layout::ACPI.0]);
    }
}
