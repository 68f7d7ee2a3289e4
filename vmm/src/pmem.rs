//! Files mapped into the guest's memory, where it reads them without asking anybody.
//!
//! The pages are those of the host's page cache, so that machines with the same image share them.
//! What a guest writes, if it may, goes to pages of its own and ends with it: the mapping is private
//! either way. For a read-only file KVM keeps the guest from writing. Its mapping is writable all the
//! same: a guest can point a device's buffers there, and that must not be a fault of this process.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use arch::VmFd;
use vm_allocator::{AddressAllocator, AllocPolicy};
use vm_memory::GuestAddress;

use crate::builder::open_file;
use crate::config::PmemConfig;
use crate::error::Error;
use crate::memory::{self, GuestRam, HUGE_PAGE, MemoryError};

/// A file the guest finds at a place in its memory.
pub struct MappedFile {
    /// What log lines call it.
    pub name: String,
    /// Guest-physical start, at a multiple of 2 MiB.
    pub start: GuestAddress,
    /// Size, in bytes: that of the file, rounded up to 2 MiB. What is past the file is zero.
    pub bytes: u64,
}

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// How long the file is cannot be found out.
    #[error("read the size of the file")]
    Size(#[source] io::Error),
    /// The guest's address space is full.
    #[error("find {bytes} bytes of free guest addresses")]
    Full {
        /// Size of the mapping.
        bytes: u64,
        /// How the allocator puts it.
        #[source]
        source: vm_allocator::Error,
    },
    /// The host refused to map the file.
    #[error("map the file")]
    Map(#[source] io::Error),
    /// The mapping could not be shown to the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Maps the files of `config` into the guest's memory, at addresses of `window`.
pub fn map_all(
    config: &[PmemConfig],
    window: &Range<u64>,
    ram: &mut GuestRam,
    vm: &VmFd,
) -> Result<Vec<MappedFile>, Error> {
    if config.is_empty() {
        return Ok(Vec::new());
    }
    let mut addresses = AddressAllocator::new(window.start, window.end - window.start)
        .map_err(|source| PmemError::Full { bytes: 0, source })
        .map_err(|source| failure("pmem (any)", source))?;
    let mut mapped = Vec::with_capacity(config.len());
    for pmem in config {
        let name = format!("pmem {}", pmem.id);
        let file = open_file("persistent memory", &pmem.path)?;
        let (start, bytes) = map(&file, pmem.read_only, &mut addresses, ram, vm)
            .map_err(|source| failure(&name, source))?;
        mapped.push(MappedFile { name, start, bytes });
    }
    Ok(mapped)
}

fn failure(name: &str, source: PmemError) -> Error {
    Error::Device { name: name.to_owned(), source: Box::new(source) }
}

fn map(
    file: &File,
    read_only: bool,
    addresses: &mut AddressAllocator,
    ram: &mut GuestRam,
    vm: &VmFd,
) -> Result<(GuestAddress, u64), PmemError> {
    let file_bytes = file.metadata().map_err(PmemError::Size)?.len();
    // A length is at most 2^63 - 1. Linux takes nothing smaller than a huge page, and KVM maps it
    // with huge pages where the page cache has them.
    let huge_page = HUGE_PAGE as u64;
    let bytes = file_bytes.next_multiple_of(huge_page);
    let start = addresses
        .allocate(bytes, huge_page, AllocPolicy::FirstMatch)
        .map_err(|source| PmemError::Full { bytes, source })?
        .start();
    let host = map_file(file, file_bytes, bytes).map_err(PmemError::Map)?;
    let length = usize::try_from(bytes).expect("it is mapped");
    ram.extend(vm, memory::describe(GuestAddress(start), host, length, memory::FLAGS)?, read_only)?;
    Ok((GuestAddress(start), bytes))
}

/// Maps the file's `file_bytes` bytes, and zeros behind them up to `bytes`.
fn map_file(file: &File, file_bytes: u64, bytes: u64) -> io::Result<*mut u8> {
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let file_bytes = usize::try_from(file_bytes).map_err(too_large)?;
    let start = memory::map_aligned(usize::try_from(bytes).map_err(too_large)?)?;
    // SAFETY: the new mapping replaces the first `file_bytes` bytes, up to the end of their last
    // page, of one that was just made, is at least as long, and is known to nobody else.
    let mapped = unsafe {
        libc::mmap(
            start.cast(),
            file_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(start)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn behind_the_file_there_are_zeros_that_can_be_written() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();

        let start = map_file(&file, 5000, 2 << 20).unwrap();
        // SAFETY: 2 MiB are mapped there for good, and this test alone knows them.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start, 2 << 20) };
        bytes[4999] = 8;
        bytes[(2 << 20) - 1] = 9;

        assert_eq!((bytes[0], bytes[4998], bytes[4999], bytes[5000]), (7, 7, 8, 0));
        assert_eq!(bytes[5000..(2 << 20) - 1].iter().find(|byte| **byte != 0), None);
    }

    #[test]
    fn what_is_written_does_not_reach_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let reading = File::open(file.path()).unwrap();

        let start = map_file(&reading, 4096, 2 << 20).unwrap();
        // SAFETY: 2 MiB are mapped there for good, and this test alone knows them.
        unsafe { start.write(8) };

        assert_eq!(std::fs::read(file.path()).unwrap(), [7; 4096]);
    }
}
