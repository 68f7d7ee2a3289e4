//! The ACPI tables of a hardware-reduced machine, from which a distribution kernel learns
//! processors, devices and how to power off (ACPI 6.5, chapter 5).

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::super::layout::{self, power};
use super::write_table;
use crate::ArchError;
use crate::machine::{Machine, MmioDevice};

const OEM: [u8; 6] = *b"CORACL";
const OEM_TABLE: [u8; 8] = *b"CORACLE ";
const OEM_REVISION: u32 = 1;

// IA-PC boot architecture flags (ACPI 6.5, section 5.2.9.3). The flag of an 8042 stays clear: a
// kernel waits for a keyboard controller, or for a clock, that it is not told to be missing.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Bytes of a DSDT before its first term (ACPI 6.5, table 5.4).
const HEADER_BYTES: u32 = 36;
const DSDT_REVISION: u8 = 2;

/// Writes all tables: the RSDP at the start of their area, the rest behind it.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine<'_>) -> Result<(), ArchError> {
    let bytes = tables(machine)?;
    write_table(memory, "the ACPI tables", &bytes, layout::ACPI, layout::ACPI_ROOM)
}

fn tables(machine: &Machine<'_>) -> Result<Vec<u8>, ArchError> {
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.append(&dsdt(machine.devices)?);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(area.append(&fadt(dsdt)).0);
    xsdt.add_entry(area.append(&madt(machine.vcpus)).0);
    let xsdt = area.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt.0).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(area.bytes)
}

/// The tables written so far, as they will lie at [`layout::ACPI`].
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends `table` and returns its guest address.
    fn append(&mut self, table: &dyn Aml) -> GuestAddress {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = GuestAddress(layout::ACPI.0 + self.bytes.len() as u64);
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn fadt(dsdt: GuestAddress) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt.0)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup)
        // Without these two, a kernel makes buttons of the fixed hardware that does not exist.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(power::RESET_PORT);
    fadt.reset_value = power::RESET;
    fadt.sleep_control_reg = port(power::CONTROL_PORT);
    fadt.sleep_status_reg = port(power::STATUS_PORT);
    fadt.finalize()
}

/// A register of one byte in the port space.
fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

fn madt(vcpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local);
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, layout::IOAPIC, 0));
    madt
}

fn dsdt(devices: &[MmioDevice]) -> Result<Sdt, ArchError> {
    let mut terms = Vec::new();
    append_serial(&mut terms);
    for (index, device) in devices.iter().enumerate() {
        append_virtio(index, device, &mut terms)?;
    }
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&Scope::raw("\\_SB_".into(), terms));
    let mut soft_off = Vec::new();
    Name::new("\\_S5_".into(), &Package::new(vec![&power::S5, &aml::ZERO]))
        .to_aml_bytes(&mut soft_off);
    dsdt.append_slice(&soft_off);
    Ok(dsdt)
}

/// COM1, whether or not this machine has one: without it a kernel reads all ones and drops it.
fn append_serial(terms: &mut Vec<u8>) {
    let ports = IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, 8);
    let interrupt = edge_interrupt(layout::COM1_GSI);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(terms);
}

/// A virtio-mmio device under the name that Linux' driver looks for.
fn append_virtio(index: usize, device: &MmioDevice, terms: &mut Vec<u8>) -> Result<(), ArchError> {
    let cannot_describe = |_| ArchError::Device { base: device.base.0 };
    let base = u32::try_from(device.base.0).map_err(cannot_describe)?;
    let size = u32::try_from(device.size).map_err(cannot_describe)?;
    let registers = Memory32Fixed::new(true, base, size);
    let interrupt = edge_interrupt(device.gsi);
    Device::new(
        Path::new(&format!("V{index:03X}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            // Coherent, which a kernel otherwise asks the host bridge that does not exist.
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(terms);
    Ok(())
}

/// An interrupt line of the IOAPIC: edge-triggered, active high, not shared.
fn edge_interrupt(gsi: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, gsi)
}

#[cfg(test)]
mod tests {
    use super::super::checksum;
    use super::*;
    use crate::machine::{Entry, Protocol};

    const DEVICE: MmioDevice = MmioDevice { base: GuestAddress(0xc000_1000), size: 0x1000, gsi: 6 };

    fn machine(vcpus: u8, devices: &[MmioDevice]) -> Machine<'_> {
        let entry = Entry { address: layout::HIGH_RAM, initrd: None, protocol: Protocol::Linux };
        Machine { vcpus, cmdline: "", entry, devices }
    }

    /// The table at guest address `address` of `area`, as long as its header says.
    fn table_at(area: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - layout::ACPI.0).unwrap();
        let length = u32::from_le_bytes(area[start + 4..start + 8].try_into().unwrap());
        &area[start..start + length as usize]
    }

    fn address_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table named `signature`, found as a kernel does it.
    fn find<'a>(area: &'a [u8], signature: &[u8; 4]) -> &'a [u8] {
        const RSDP_XSDT: usize = 24;
        const FADT_X_DSDT: usize = 140;
        let xsdt = table_at(area, address_at(area, RSDP_XSDT));
        let tables: Vec<_> =
            xsdt[36..].chunks(8).map(|entry| table_at(area, address_at(entry, 0))).collect();
        if signature == b"DSDT" {
            return table_at(area, address_at(tables[0], FADT_X_DSDT));
        }
        tables.into_iter().find(|table| table.starts_with(signature)).unwrap()
    }

    fn contains(haystack: &[u8], needle: &[u8]) -> bool {
        haystack.windows(needle.len()).any(|window| window == needle)
    }

    #[test]
    fn the_area_starts_with_a_valid_rsdp() {
        let area = tables(&machine(1, &[])).unwrap();

        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!(checksum(&area[..20]), 0);
        assert_eq!(checksum(&area[..Rsdp::len()]), 0);
    }

    #[test]
    fn every_table_can_be_found_and_sums_to_zero() {
        let area = tables(&machine(2, &[DEVICE])).unwrap();

        for signature in [b"FACP", b"APIC", b"DSDT"] {
            let table = find(&area, signature);
            assert!(table.starts_with(signature));
            assert_eq!(checksum(table), 0);
        }
    }

    #[test]
    fn the_fadt_says_how_to_power_off_and_to_reset() {
        const RESET_REG: usize = 116;
        const SLEEP_CONTROL_REG: usize = 244;
        let area = tables(&machine(1, &[])).unwrap();

        let fadt = find(&area, b"FACP");

        assert_eq!(address_at(fadt, RESET_REG + 4), u64::from(power::RESET_PORT));
        assert_eq!(fadt[RESET_REG + 12], power::RESET);
        assert_eq!(address_at(fadt, SLEEP_CONTROL_REG + 4), u64::from(power::CONTROL_PORT));
    }

    #[test]
    fn the_fadt_says_that_clock_screen_and_keyboard_controller_are_missing() {
        const BOOT_ARCHITECTURE: usize = 109;
        let area = tables(&machine(1, &[])).unwrap();

        let fadt = find(&area, b"FACP");

        assert_eq!(fadt[BOOT_ARCHITECTURE..][..2], (NO_VGA | NO_CMOS_RTC).to_le_bytes());
    }

    #[test]
    fn every_processor_has_an_apic() {
        const STRUCTURES: usize = 44;
        const LOCAL_APIC_BYTES: usize = 8;
        const IOAPIC_BYTES: usize = 12;
        let area = tables(&machine(3, &[])).unwrap();

        let madt = find(&area, b"APIC");

        assert_eq!(madt.len(), STRUCTURES + 3 * LOCAL_APIC_BYTES + IOAPIC_BYTES);
        assert_eq!(madt[STRUCTURES + 2 * LOCAL_APIC_BYTES + 3], 2);
    }

    #[test]
    fn a_device_is_named_with_its_registers_and_its_line() {
        let area = tables(&machine(1, &[DEVICE])).unwrap();

        let dsdt = find(&area, b"DSDT");

        assert!(contains(dsdt, b"LNRO0005"));
        assert!(contains(dsdt, &0xc000_1000_u32.to_le_bytes()));
        assert!(contains(dsdt, &[0x89, 6, 0, 0x03, 1, 6, 0, 0, 0]), "edge-triggered line 6");
    }

    #[test]
    fn a_device_above_the_gap_is_refused() {
        let device = MmioDevice { base: GuestAddress(layout::GAP_END), ..DEVICE };

        let error = tables(&machine(1, &[device])).unwrap_err();

        assert!(matches!(error, ArchError::Device { base: layout::GAP_END }));
    }

    #[test]
    fn the_largest_machine_fits() {
        let devices = [DEVICE; 19];

        let area = tables(&machine(u8::MAX, &devices)).unwrap();

        assert!((area.len() as u64) < layout::ACPI_ROOM);
    }
}
