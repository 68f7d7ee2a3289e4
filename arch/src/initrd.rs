//! The initial RAM disk into guest memory, as every architecture places it.

use std::fs::File;
use std::io::{self, ErrorKind, Seek};
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::ArchError;

const PAGE: u64 = 0x1000;

/// Puts `initrd` as high in `room` as it fits, so that it is out of the kernel's way, and says where
/// it is and of how many bytes.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    initrd: &mut File,
    room: &Range<u64>,
) -> Result<(GuestAddress, u64), ArchError> {
    let read = |source| ArchError::Read { what: "initrd", source };
    let size = initrd.metadata().map_err(read)?.len();
    let base = place(size, room).ok_or(ArchError::InitrdTooBig { size })?;
    let length = usize::try_from(size).map_err(|_| ArchError::InitrdTooBig { size })?;
    initrd.rewind().map_err(read)?;
    memory
        .read_exact_volatile_from(base, initrd, length)
        .map_err(|error| read(io::Error::new(ErrorKind::UnexpectedEof, error)))?;
    Ok((base, size))
}

/// The highest page from which on `size` bytes lie in `room`.
fn place(size: u64, room: &Range<u64>) -> Option<GuestAddress> {
    let base = room.end.checked_sub(size)? / PAGE * PAGE;
    (base >= room.start).then_some(GuestAddress(base))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initrd_ends_with_its_room() {
        assert_eq!(place(0x800, &(0..0x8000_0000)), Some(GuestAddress(0x7fff_f000)));
    }

    #[test]
    fn an_initrd_that_is_larger_than_its_room_has_no_place() {
        assert_eq!(place(0x2000, &(0x1000..0x2000)), None);
        assert_eq!(place(0x3000, &(0..0x2000)), None);
    }
}
