//! How the guest learns the machine: a device tree with processors, interrupt controller, timer,
//! UART and virtio devices.

use vm_fdt::{FdtReserveEntry, FdtWriter};
use vm_memory::GuestMemoryMmap;

use super::layout::{self, GicVersion};
use crate::machine::{Machine, MmioDevice};
use crate::{ArchError, fdt};

const GIC_PHANDLE: u32 = 1;
const BUS_CLOCK_PHANDLE: u32 = 2;

// Cells of an interrupt (Documentation/devicetree/bindings/interrupt-controller/arm,gic-v3.yaml).
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
const EDGE_RISING: u32 = 1;
const LEVEL_LOW: u32 = 8;

/// Private interrupts of the timer: secure, non-secure, virtual, hypervisor.
const TIMER_PPIS: [u32; 4] = [13, 14, 11, 10];

/// Clock that a PC's UART divides by 16 for its baud rate, in Hz.
const UART_CLOCK_HZ: u32 = 1_843_200;

/// Pace of the bus that the real-time clock is on, in Hz; it means nothing here.
const BUS_CLOCK_HZ: u32 = 24_000_000;

/// Writes the device tree of `machine`, which has such an interrupt controller, to the start of RAM.
pub fn write(
    gic: GicVersion,
    memory: &GuestMemoryMmap,
    machine: &Machine<'_>,
) -> Result<(), ArchError> {
    fdt::write(memory, &tree(gic, memory, machine)?, layout::RAM, layout::TREE_ROOM)
}

fn tree(
    gic: GicVersion,
    memory: &GuestMemoryMmap,
    machine: &Machine<'_>,
) -> Result<Vec<u8>, ArchError> {
    // What KVM writes there must not become anybody else's memory.
    let stolen = FdtReserveEntry::new(layout::STOLEN_TIME.0, layout::STOLEN_TIME_BYTES)?;
    let mut fdt = FdtWriter::new_with_mem_reserv(&[stolen])?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC_PHANDLE)?;
    fdt::chosen(&mut fdt, machine)?;
    fdt::memory(&mut fdt, memory)?;
    processors(&mut fdt, machine.vcpus)?;
    power(&mut fdt)?;
    interrupt_controller(&mut fdt, gic, machine.vcpus)?;
    timer(&mut fdt)?;
    uart(&mut fdt)?;
    clock(&mut fdt)?;
    for device in machine.devices {
        virtio(&mut fdt, device)?;
    }
    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

fn processors(fdt: &mut FdtWriter, vcpus: u8) -> Result<(), ArchError> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..vcpus {
        let affinity = layout::affinity(index);
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,arm-v8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", affinity)?;
        fdt.end_node(cpu)?;
    }
    Ok(fdt.end_node(cpus)?)
}

/// How the guest starts processors, powers off and resets: calls that KVM answers.
fn power(fdt: &mut FdtWriter) -> Result<(), ArchError> {
    let node = fdt.begin_node("psci")?;
    let compatible = ["arm,psci-1.0", "arm,psci-0.2"].map(str::to_owned).to_vec();
    fdt.property_string_list("compatible", compatible)?;
    fdt.property_string("method", "hvc")?;
    Ok(fdt.end_node(node)?)
}

fn interrupt_controller(
    fdt: &mut FdtWriter,
    version: GicVersion,
    vcpus: u8,
) -> Result<(), ArchError> {
    let redistributors = u64::from(vcpus) * layout::GIC_REDISTRIBUTOR_BYTES;
    // The name of the first GICv2 there was is what Linux knows all of them by.
    let (compatible, distributor, other) = match version {
        GicVersion::V3 => (
            "arm,gic-v3",
            layout::GIC_DISTRIBUTOR_BYTES,
            [layout::GIC_REDISTRIBUTORS, redistributors],
        ),
        GicVersion::V2 => (
            "arm,cortex-a15-gic",
            layout::GIC_V2_DISTRIBUTOR_BYTES,
            [layout::GIC_CPU_INTERFACE, layout::GIC_CPU_INTERFACE_BYTES],
        ),
    };
    let node = fdt.begin_node(&format!("intc@{:x}", layout::GIC_DISTRIBUTOR))?;
    fdt.property_string("compatible", compatible)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_array_u64("reg", &[layout::GIC_DISTRIBUTOR, distributor, other[0], other[1]])?;
    fdt.property_phandle(GIC_PHANDLE)?;
    Ok(fdt.end_node(node)?)
}

fn timer(fdt: &mut FdtWriter) -> Result<(), ArchError> {
    let interrupts: Vec<u32> =
        TIMER_PPIS.iter().flat_map(|ppi| [PRIVATE, *ppi, LEVEL_LOW]).collect();
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.property_null("always-on")?;
    Ok(fdt.end_node(node)?)
}

/// The UART, whether or not this machine has one: a kernel uses it only as a console.
fn uart(fdt: &mut FdtWriter) -> Result<(), ArchError> {
    let node = fdt.begin_node(&format!("serial@{:x}", layout::UART))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &[layout::UART, layout::UART_BYTES])?;
    // An edge, as an eventfd raises it: the level would be gone before the guest looks.
    fdt.property_array_u32("interrupts", &[SHARED, layout::UART_SPI, EDGE_RISING])?;
    fdt.property_u32("clock-frequency", UART_CLOCK_HZ)?;
    Ok(fdt.end_node(node)?)
}

/// The real-time clock, and the one of the bus it is on, which it cannot be described without
/// (Documentation/devicetree/bindings/arm/primecell.yaml).
fn clock(fdt: &mut FdtWriter) -> Result<(), ArchError> {
    let node = fdt.begin_node("bus-clock")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", BUS_CLOCK_HZ)?;
    fdt.property_phandle(BUS_CLOCK_PHANDLE)?;
    fdt.end_node(node)?;
    let node = fdt.begin_node(&format!("rtc@{:x}", layout::CLOCK))?;
    let compatible = ["arm,pl031", "arm,primecell"].map(str::to_owned).to_vec();
    fdt.property_string_list("compatible", compatible)?;
    fdt.property_array_u64("reg", &[layout::CLOCK, layout::CLOCK_BYTES])?;
    fdt.property_u32("clocks", BUS_CLOCK_PHANDLE)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    Ok(fdt.end_node(node)?)
}

fn virtio(fdt: &mut FdtWriter, device: &MmioDevice) -> Result<(), ArchError> {
    fdt::virtio(fdt, device, &[SHARED, device.gsi, EDGE_RISING])
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::fdt::testing::Tree;
    use crate::machine::{Entry, Protocol};

    const DEVICE: MmioDevice = MmioDevice { base: GuestAddress(0x1000_0000), size: 0x1000, gsi: 5 };

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(layout::RAM, 64 << 20)]).unwrap()
    }

    fn tree_of(vcpus: u8, cmdline: &str) -> Result<Tree, ArchError> {
        tree_with(GicVersion::V3, vcpus, cmdline)
    }

    fn tree_with(gic: GicVersion, vcpus: u8, cmdline: &str) -> Result<Tree, ArchError> {
        let initrd = Some((GuestAddress(0x4300_0000), 0x1000));
        let entry = Entry { address: layout::KERNEL, initrd, protocol: Protocol::Linux };
        let machine = Machine { vcpus, cmdline, entry, devices: &[DEVICE] };
        tree(gic, &memory(), &machine).map(|blob| Tree::parse(&blob))
    }

    #[test]
    fn command_line_and_initrd_are_chosen() {
        let tree = tree_of(1, "quiet").unwrap();

        assert_eq!(tree.text("/chosen/bootargs"), "quiet");
        assert_eq!(tree.cells("/chosen/linux,initrd-start"), [0, 0x4300_0000]);
        assert_eq!(tree.cells("/chosen/linux,initrd-end"), [0, 0x4300_1000]);
    }

    #[test]
    fn ram_is_described() {
        let tree = tree_of(1, "").unwrap();

        assert_eq!(tree.cells("/memory@40000000/reg"), [0, 0x4000_0000, 0, 64 << 20]);
    }

    #[test]
    fn every_processor_is_started_by_psci() {
        let tree = tree_of(17, "").unwrap();

        assert_eq!(tree.count("cpu@", "enable-method"), 17);
        assert_eq!(tree.text("/cpus/cpu@100/enable-method"), "psci");
        assert_eq!(tree.text("/psci/method"), "hvc");
    }

    #[test]
    fn the_redistributors_cover_every_processor() {
        let tree = tree_of(3, "").unwrap();

        assert_eq!(tree.cells("/intc@8000000/reg")[6..], [0, 3 * 0x2_0000]);
    }

    #[test]
    fn a_gicv2_has_its_interface_to_the_processors() {
        let tree = tree_with(GicVersion::V2, 3, "").unwrap();

        assert_eq!(tree.text("/intc@8000000/compatible"), "arm,cortex-a15-gic");
        assert_eq!(tree.cells("/intc@8000000/reg")[2..], [0, 0x1000, 0, 0x801_0000, 0, 0x2000]);
    }

    #[test]
    fn nobody_else_gets_the_memory_with_the_stolen_time() {
        let memory = memory();
        let entry = Entry { address: layout::KERNEL, initrd: None, protocol: Protocol::Linux };
        let machine = Machine { vcpus: 1, cmdline: "", entry, devices: &[] };
        let tree = tree(GicVersion::V3, &memory, &machine).unwrap();

        // The first entry of the memory reservation block, to which the header points.
        let word = |at: usize| u64::from_be_bytes(tree[at..at + 8].try_into().unwrap());
        let block = usize::try_from(word(16) >> 32).unwrap();
        assert_eq!(word(block), layout::STOLEN_TIME.0);
        assert_eq!(word(block + 8), layout::STOLEN_TIME_BYTES);
    }

    #[test]
    fn the_time_is_known_from_a_pl031() {
        let tree = tree_of(1, "").unwrap();

        assert_eq!(tree.cells("/rtc@b001000/reg"), [0, 0xb00_1000, 0, 0x1000]);
        assert_eq!(tree.cells("/rtc@b001000/clocks"), tree.cells("/bus-clock/phandle"));
    }

    #[test]
    fn a_device_has_its_registers_and_an_edge_triggered_line() {
        let tree = tree_of(1, "").unwrap();

        assert_eq!(tree.cells("/virtio_mmio@10000000/reg"), [0, 0x1000_0000, 0, 0x1000]);
        assert_eq!(tree.cells("/virtio_mmio@10000000/interrupts"), [SHARED, 5, EDGE_RISING]);
    }

    #[test]
    fn a_command_line_that_linux_would_cut_is_refused() {
        let error = tree_of(1, &"x".repeat(2048)).err();

        assert!(matches!(error, Some(ArchError::CmdlineTooLong { limit: 2047, .. })));
    }

    #[test]
    fn a_command_line_with_a_nul_is_refused() {
        assert!(matches!(tree_of(1, "a\0b").err(), Some(ArchError::CmdlineNul)));
    }

    #[test]
    fn the_tree_is_written_to_the_start_of_ram() {
        use vm_memory::Bytes;
        let memory = memory();
        let entry = Entry { address: layout::KERNEL, initrd: None, protocol: Protocol::Linux };

        write(GicVersion::V3, &memory, &Machine { vcpus: 1, cmdline: "", entry, devices: &[] })
            .unwrap();

        let magic: [u8; 4] = memory.read_obj(layout::RAM).unwrap();
        assert_eq!(magic, 0xd00d_feed_u32.to_be_bytes());
    }
}
