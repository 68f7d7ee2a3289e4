//! How the guest learns the machine: the zero page or the PVH start info, and an MP table and ACPI
//! tables, of which a kernel takes what it was built for.

mod acpi;
mod mp;
mod start_info;
pub mod zero_page;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::ArchError;
use crate::machine::{Machine, Protocol};

/// Writes every table of `machine`, after the kernel's setup header.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine<'_>) -> Result<(), ArchError> {
    acpi::write(memory, machine)?;
    mp::write(memory, machine.vcpus)?;
    zero_page::write(memory, machine)?;
    match machine.entry.protocol {
        Protocol::Linux => Ok(()),
        Protocol::Pvh => start_info::write(memory, machine),
    }
}

/// Copies a finished table to its place.
fn write_table(
    memory: &GuestMemoryMmap,
    table: &'static str,
    bytes: &[u8],
    place: GuestAddress,
    room: u64,
) -> Result<(), ArchError> {
    if bytes.len() as u64 > room {
        return Err(ArchError::TableTooBig { table, size: bytes.len(), room });
    }
    memory.write_slice(bytes, place).map_err(ArchError::memory(table, place))
}

/// What has to be added to `bytes` for their sum to be 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}
