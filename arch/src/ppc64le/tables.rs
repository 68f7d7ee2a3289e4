//! How the guest learns the machine: a PAPR device tree with processors, RTAS and the hypercall
//! console. The nodes of interrupt controller and PCI host bridge come with those devices.

use vm_fdt::FdtWriter;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;
use crate::machine::Machine;
use crate::{ArchError, fdt};

/// Frequency of the time base on every POWER processor since POWER6, in Hz.
const TIMEBASE_HZ: u32 = 512_000_000;
/// Version of POWER9 in the processor version register: what KVM runs a compatible guest as.
const POWER9: u32 = 0x004e_1202;
/// Size of a cache block, in bytes.
const CACHE_BLOCK_BYTES: u32 = 128;
/// The console's number in hypercalls, and the unit address of its node.
const CONSOLE: u32 = 0;

/// RTAS functions and their tokens. The RTAS call below hands the token to the VMM, which gives
/// these numbers their meaning (PAPR, chapter 7.3).
const RTAS_FUNCTIONS: [(&str, u32); 5] = [
    ("display-character", 0x2000),
    ("power-off", 0x2001),
    ("system-reboot", 0x2002),
    ("start-cpu", 0x2003),
    ("query-cpu-stopped-state", 0x2004),
];

/// The whole of RTAS, in big-endian instructions: pass the arguments on to the hypervisor.
const RTAS_CODE: [u32; 5] = [
    0x7c64_1b78, // mr r4, r3: the argument block
    0x3c60_0000, // lis r3, 0
    0x6063_f000, // ori r3, r3, H_RTAS
    0x4400_0022, // sc 1
    0x4e80_0020, // blr
];

/// Writes RTAS and the device tree of `machine`.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine<'_>) -> Result<(), ArchError> {
    let ram = memory.iter().map(GuestMemoryRegion::len).sum();
    let rtas = layout::rtas(ram);
    for (address, instruction) in (rtas.0..).step_by(4).map(GuestAddress).zip(RTAS_CODE) {
        let bytes = instruction.to_be_bytes();
        memory.write_obj(bytes, address).map_err(ArchError::memory("RTAS", address))?;
    }
    let tree = tree(memory, ram, machine)?;
    fdt::write(memory, &tree, layout::tree(ram), layout::TREE_ROOM)
}

fn tree(memory: &GuestMemoryMmap, ram: u64, machine: &Machine<'_>) -> Result<Vec<u8>, ArchError> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("device_type", "chrp")?;
    fdt.property_string("compatible", "linux,kvm")?;
    fdt.property_string("model", "IBM pSeries (Coracle)")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt::chosen(&mut fdt, machine)?;
    fdt::memory(&mut fdt, memory)?;
    processors(&mut fdt, machine.vcpus)?;
    rtas(&mut fdt, ram)?;
    console(&mut fdt)?;
    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

fn processors(fdt: &mut FdtWriter, vcpus: u8) -> Result<(), ArchError> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..u32::from(vcpus) {
        let cpu = fdt.begin_node(&format!("PowerPC,POWER9@{index:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_u32("reg", index)?;
        fdt.property_u32("cpu-version", POWER9)?;
        fdt.property_u32("timebase-frequency", TIMEBASE_HZ)?;
        fdt.property_u32("clock-frequency", TIMEBASE_HZ)?;
        fdt.property_u32("d-cache-block-size", CACHE_BLOCK_BYTES)?;
        fdt.property_u32("i-cache-block-size", CACHE_BLOCK_BYTES)?;
        fdt.property_array_u32("ibm,ppc-interrupt-server#s", &[index])?;
        fdt.end_node(cpu)?;
    }
    Ok(fdt.end_node(cpus)?)
}

fn rtas(fdt: &mut FdtWriter, ram: u64) -> Result<(), ArchError> {
    let base = u32::try_from(layout::rtas(ram).0).expect("the real mode area ends at 256 MiB");
    let node = fdt.begin_node("rtas")?;
    for (name, token) in RTAS_FUNCTIONS {
        fdt.property_u32(name, token)?;
    }
    fdt.property_u32("linux,rtas-base", base)?;
    fdt.property_u32("linux,rtas-entry", base)?;
    fdt.property_u32("rtas-size", layout::RTAS_BYTES)?;
    Ok(fdt.end_node(node)?)
}

/// The console by hypercall: H_PUT_TERM_CHAR and H_GET_TERM_CHAR (PAPR, chapter 16.6).
fn console(fdt: &mut FdtWriter) -> Result<(), ArchError> {
    let bus = fdt.begin_node("vdevice")?;
    fdt.property_string("device_type", "vdevice")?;
    fdt.property_string("compatible", "IBM,vdevice")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    let terminal = fdt.begin_node(&format!("vty@{CONSOLE:x}"))?;
    fdt.property_string("device_type", "serial")?;
    fdt.property_string("compatible", "hvterm1")?;
    fdt.property_u32("reg", CONSOLE)?;
    fdt.end_node(terminal)?;
    Ok(fdt.end_node(bus)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fdt::testing::Tree;
    use crate::machine::{Entry, Protocol};

    const RAM: u64 = 64 << 20;

    fn memory() -> GuestMemoryMmap {
        let size = usize::try_from(RAM).unwrap();
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
    }

    fn machine(vcpus: u8) -> Machine<'static> {
        let entry = Entry { address: GuestAddress(0), initrd: None, protocol: Protocol::Linux };
        Machine { vcpus, cmdline: "quiet", entry, devices: &[] }
    }

    fn tree_of(vcpus: u8) -> Tree {
        Tree::parse(&tree(&memory(), RAM, &machine(vcpus)).unwrap())
    }

    #[test]
    fn the_machine_is_a_pseries_guest_of_kvm() {
        let tree = tree_of(1);

        assert_eq!(tree.text("/device_type"), "chrp");
        assert_eq!(tree.text("/compatible"), "linux,kvm");
    }

    #[test]
    fn the_command_line_is_chosen_and_a_missing_initrd_is_not_named() {
        let tree = tree_of(1);

        assert_eq!(tree.text("/chosen/bootargs"), "quiet");
        assert!(!tree.has("/chosen/linux,initrd-start"));
    }

    #[test]
    fn every_processor_is_an_interrupt_server() {
        let tree = tree_of(4);

        assert_eq!(tree.count("PowerPC,POWER9@", "ibm,ppc-interrupt-server#s"), 4);
        assert_eq!(tree.cells("/cpus/PowerPC,POWER9@3/reg"), [3]);
    }

    #[test]
    fn rtas_lies_where_the_tree_says() {
        let memory = memory();

        write(&memory, &machine(1)).unwrap();

        let base = tree_of(1).cells("/rtas/linux,rtas-base")[0];
        let first: [u8; 4] = memory.read_obj(GuestAddress(base.into())).unwrap();
        assert_eq!(first, RTAS_CODE[0].to_be_bytes());
    }

    #[test]
    fn the_tree_lies_at_the_end_of_the_real_mode_area() {
        let memory = memory();

        write(&memory, &machine(1)).unwrap();

        let magic: [u8; 4] = memory.read_obj(layout::tree(RAM)).unwrap();
        assert_eq!(magic, 0xd00d_feed_u32.to_be_bytes());
    }

    #[test]
    fn the_largest_machine_fits() {
        let tree = tree(&memory(), RAM, &machine(u8::MAX)).unwrap();

        assert!((tree.len() as u64) < layout::TREE_ROOM);
    }
}
