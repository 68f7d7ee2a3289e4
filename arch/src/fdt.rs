//! Device-tree nodes that aarch64 and ppc64le share (Devicetree Specification 0.4, chapter 3).

use vm_fdt::FdtWriter;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::ArchError;
use crate::machine::{Machine, MmioDevice};

/// Longest command line that Linux takes there, in bytes without the NUL: COMMAND_LINE_SIZE less 1.
const CMDLINE_LIMIT: usize = 2047;

/// `/chosen`: the command line, and where the initrd lies.
pub(crate) fn chosen(fdt: &mut FdtWriter, machine: &Machine<'_>) -> Result<(), ArchError> {
    let length = machine.cmdline.len();
    if length > CMDLINE_LIMIT {
        return Err(ArchError::CmdlineTooLong { length, limit: CMDLINE_LIMIT });
    }
    if machine.cmdline.contains('\0') {
        return Err(ArchError::CmdlineNul);
    }
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", machine.cmdline)?;
    if let Some((base, size)) = machine.entry.initrd {
        fdt.property_u64("linux,initrd-start", base.0)?;
        fdt.property_u64("linux,initrd-end", base.0 + size)?;
    }
    Ok(fdt.end_node(node)?)
}

/// `/memory@…`, one per region of RAM.
pub(crate) fn memory(fdt: &mut FdtWriter, memory: &GuestMemoryMmap) -> Result<(), ArchError> {
    for region in memory.iter() {
        let base = region.start_addr().0;
        let node = fdt.begin_node(&format!("memory@{base:x}"))?;
        fdt.property_string("device_type", "memory")?;
        fdt.property_array_u64("reg", &[base, region.len()])?;
        fdt.end_node(node)?;
    }
    Ok(())
}

/// `/virtio_mmio@…` with its interrupt in the cells of this machine's controller
/// (virtio 1.2, section 4.2.1).
pub(crate) fn virtio(
    fdt: &mut FdtWriter,
    device: &MmioDevice,
    interrupt: &[u32],
) -> Result<(), ArchError> {
    let node = fdt.begin_node(&format!("virtio_mmio@{:x}", device.base.0))?;
    fdt.property_string("compatible", "virtio,mmio")?;
    fdt.property_array_u64("reg", &[device.base.0, device.size])?;
    fdt.property_array_u32("interrupts", interrupt)?;
    fdt.property_null("dma-coherent")?;
    Ok(fdt.end_node(node)?)
}

/// Copies a finished tree to its place, if it is no larger than `room` bytes.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    tree: &[u8],
    place: GuestAddress,
    room: u64,
) -> Result<(), ArchError> {
    if tree.len() as u64 > room {
        let table = "the device tree";
        return Err(ArchError::TableTooBig { table, size: tree.len(), room });
    }
    memory.write_slice(tree, place).map_err(ArchError::memory("the device tree", place))
}

/// Reads trees, for the tests of both architectures.
#[cfg(test)]
pub(crate) mod testing {
    use std::collections::BTreeMap;

    /// The properties of a device tree by path, such as `/chosen/bootargs`.
    pub(crate) struct Tree(BTreeMap<String, Vec<u8>>);

    impl Tree {
        /// Parses a flattened device tree (Devicetree Specification 0.4, chapter 5).
        pub(crate) fn parse(blob: &[u8]) -> Self {
            const BEGIN_NODE: u32 = 1;
            const END_NODE: u32 = 2;
            const PROPERTY: u32 = 3;
            let word = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap());
            let text = |at: usize| {
                let end = at + blob[at..].iter().position(|byte| *byte == 0).unwrap();
                std::str::from_utf8(&blob[at..end]).unwrap()
            };
            let (mut at, strings) = (word(8) as usize, word(12) as usize);
            let (mut path, mut properties) = (Vec::new(), BTreeMap::new());
            loop {
                let token = word(at);
                at += 4;
                match token {
                    BEGIN_NODE => {
                        path.push(text(at));
                        at = (at + path.last().unwrap().len() + 1).next_multiple_of(4);
                    }
                    END_NODE => {
                        path.pop();
                    }
                    PROPERTY => {
                        let (length, name) =
                            (word(at) as usize, text(strings + word(at + 4) as usize));
                        let value = blob[at + 8..at + 8 + length].to_vec();
                        properties.insert([path.join("/").as_str(), name].join("/"), value);
                        at = (at + 8 + length).next_multiple_of(4);
                    }
                    _ => return Self(properties),
                }
            }
        }

        pub(crate) fn has(&self, path: &str) -> bool {
            self.0.contains_key(path)
        }

        pub(crate) fn text(&self, path: &str) -> &str {
            std::str::from_utf8(&self.0[path]).unwrap().trim_end_matches('\0')
        }

        pub(crate) fn cells(&self, path: &str) -> Vec<u32> {
            self.0[path]
                .chunks(4)
                .map(|cell| u32::from_be_bytes(cell.try_into().unwrap()))
                .collect()
        }

        /// How many nodes have `property` and a name that begins with `name`.
        pub(crate) fn count(&self, name: &str, property: &str) -> usize {
            let is_one = |path: &&String| {
                let mut parts = path.rsplit('/');
                parts.next() == Some(property)
                    && parts.next().is_some_and(|node| node.starts_with(name))
            };
            self.0.keys().filter(is_one).count()
        }
    }
}
