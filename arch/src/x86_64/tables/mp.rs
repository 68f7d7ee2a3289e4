//! The MP table, from which a kernel without ACPI learns processors and interrupt lines
//! (MultiProcessor Specification 1.4, section 4).

use vm_memory::GuestMemoryMmap;

use super::super::layout;
use super::{checksum, write_table};
use crate::ArchError;

const POINTER_BYTES: u32 = 16;
const HEADER_BYTES: usize = 44;

const SPEC_1_4: u8 = 4;
const ISA_BUS: u8 = 0;
const ALL_APICS: u8 = 0xff;
/// Version of an integrated local APIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
/// Version of KVM's IOAPIC.
const IOAPIC_VERSION: u8 = 0x11;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;

// Kinds of entries.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

// Kinds of interrupts.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;

/// Writes pointer and table for `vcpus` processors.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), ArchError> {
    let bytes = table(vcpus);
    write_table(memory, "the MP table", &bytes, layout::MP_TABLE, layout::MP_TABLE_ROOM)
}

fn table(vcpus: u8) -> Vec<u8> {
    let entries = entries(vcpus);
    let mut header = header(&entries);
    header[7] = checksum(&[header.as_slice(), &entries.concat()].concat());
    [floating_pointer(), header, entries.concat()].concat()
}

fn floating_pointer() -> Vec<u8> {
    let place = u32::try_from(layout::MP_TABLE.0).expect("the table lies below 1 MiB");
    let mut pointer = b"_MP_".to_vec();
    pointer.extend((place + POINTER_BYTES).to_le_bytes());
    pointer.extend([1, SPEC_1_4, 0, 0, 0, 0, 0, 0]); // length in 16 bytes, checksum at 10
    pointer[10] = checksum(&pointer);
    pointer
}

fn header(entries: &[Vec<u8>]) -> Vec<u8> {
    let length = HEADER_BYTES + entries.iter().map(Vec::len).sum::<usize>();
    let length = u16::try_from(length).expect("256 processors need 5 KiB");
    let count = u16::try_from(entries.len()).expect("256 processors and 24 pins");
    let mut header = b"PCMP".to_vec();
    header.extend(length.to_le_bytes());
    header.extend([SPEC_1_4, 0]);
    header.extend(b"CORACLE CORACLE     ");
    header.extend([0; 6]); // no OEM table
    header.extend(count.to_le_bytes());
    header.extend(layout::LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]); // no extended table
    header
}

fn entries(vcpus: u8) -> Vec<Vec<u8>> {
    let ioapic_id = vcpus; // the first number that is no processor's
    let mut entries: Vec<_> = (0..vcpus).map(processor).collect();
    entries.push([&[BUS, ISA_BUS], b"ISA   ".as_slice()].concat());
    let mut ioapic = vec![IOAPIC, ioapic_id, IOAPIC_VERSION, ENABLED];
    ioapic.extend(layout::IOAPIC.to_le_bytes());
    entries.push(ioapic);
    for pin in (0_u8..).take(layout::IOAPIC_PINS as usize) {
        // Flags of zero: as the bus has it, which is edge-triggered and active high for ISA.
        entries.push(vec![IO_INTERRUPT, VECTORED, 0, 0, ISA_BUS, pin, ioapic_id, pin]);
    }
    entries.push(vec![LOCAL_INTERRUPT, EXTERNAL, 0, 0, ISA_BUS, 0, ALL_APICS, 0]);
    entries.push(vec![LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);
    entries
}

fn processor(index: u8) -> Vec<u8> {
    let flags = ENABLED | if index == 0 { BOOT_PROCESSOR } else { 0 };
    let mut entry = vec![PROCESSOR, index, LOCAL_APIC_VERSION, flags];
    entry.resize(20, 0); // signature and features: kernels read CPUID
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINTER: usize = POINTER_BYTES as usize;

    #[test]
    fn pointer_and_table_sum_to_zero() {
        let bytes = table(3);

        assert_eq!(checksum(&bytes[..POINTER]), 0);
        assert_eq!(checksum(&bytes[POINTER..]), 0);
    }

    #[test]
    fn the_pointer_leads_to_the_table() {
        let bytes = table(1);

        let place = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        assert_eq!(u64::from(place), layout::MP_TABLE.0 + 16);
        assert_eq!(&bytes[POINTER..POINTER + 4], b"PCMP");
    }

    #[test]
    fn the_header_states_the_length_of_the_table() {
        let bytes = table(4);

        let length = u16::from_le_bytes(bytes[POINTER + 4..POINTER + 6].try_into().unwrap());
        assert_eq!(usize::from(length), bytes.len() - POINTER);
    }

    #[test]
    fn only_the_first_processor_boots() {
        let flags: Vec<u8> = entries(3)[..3].iter().map(|entry| entry[3]).collect();

        assert_eq!(flags, [ENABLED | BOOT_PROCESSOR, ENABLED, ENABLED]);
    }

    #[test]
    fn every_device_line_has_an_entry() {
        let entries = entries(1);

        for gsi in layout::DEVICE_GSIS {
            let line = u8::try_from(gsi).unwrap();
            assert!(entries.iter().any(|entry| entry[0] == IO_INTERRUPT && entry[7] == line));
        }
    }

    #[test]
    fn the_largest_machine_fits() {
        assert!((table(u8::MAX).len() as u64) < layout::MP_TABLE_ROOM);
    }
}
