//! Guest RAM of a process written to a file, as far as there is something in it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Bytes of one entry of pagemap, an integer in native byte order
/// (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_BYTES: usize = 8;

/// The page is in memory, or in swap.
const TOUCHED: u64 = 1 << 63 | 1 << 62;

/// Pages looked at in one go: those of a huge page.
const PAGES: usize = 512;

/// Where the memory of a machine is that stands still, and where in a file it belongs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    pub(super) parts: Vec<Part>,
    /// Size of the file, in bytes: there may be room at its end for memory that is not plugged in.
    pub(super) file_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    /// In the process.
    pub(super) address: u64,
    pub(super) bytes: u64,
    /// In the file.
    pub(super) offset: u64,
}

impl MemoryLayout {
    /// Size of the file with the memory, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Writes the memory to the empty `file`, with holes for what is untouched or zeros: the file of a
    /// [`crate::SavedMemory`]. `process` is the folder in `/proc` of the process that the machine is in;
    /// it takes the right to trace that.
    pub fn copy(&self, process: &Path, file: &File) -> io::Result<()> {
        let memory = File::open(process.join("mem"))?;
        let pages = File::open(process.join("pagemap"))?;
        self.parts.iter().try_for_each(|part| copy(part, &memory, &pages, file))?;
        file.set_len(self.file_bytes)
    }
}

fn copy(part: &Part, memory: &File, pages: &File, file: &File) -> io::Result<()> {
    let page_bytes = page_bytes();
    let mut entries = vec![0; PAGES * ENTRY_BYTES];
    let mut bytes = vec![0; PAGES * page_bytes];
    let block_bytes = bytes.len() as u64;
    for start in (0..part.bytes).step_by(bytes.len()) {
        let entry = (part.address + start) / page_bytes as u64;
        let count = (part.bytes - start).min(block_bytes).div_ceil(page_bytes as u64);
        let count = usize::try_from(count).expect("at most PAGES");
        let entries = &mut entries[..count * ENTRY_BYTES];
        pages.read_exact_at(entries, entry * ENTRY_BYTES as u64)?;
        let is_touched: Vec<bool> = entries
            .chunks_exact(ENTRY_BYTES)
            .map(|entry| u64::from_ne_bytes(entry.try_into().expect("of this size")) & TOUCHED != 0)
            .collect();
        let mut page = 0;
        for run in is_touched.chunk_by(|a, b| a == b) {
            if run[0] {
                let offset = start + (page * page_bytes) as u64;
                let bytes = &mut bytes[..run.len() * page_bytes];
                memory.read_exact_at(bytes, part.address + offset)?;
                write(bytes, page_bytes, file, part.offset + offset)?;
            }
            page += run.len();
        }
    }
    Ok(())
}

/// Writes the pages of `bytes` that are not all zeros to `file`, where they begin at `offset`.
fn write(bytes: &[u8], page_bytes: usize, file: &File, offset: u64) -> io::Result<()> {
    let has_data = |page: &[u8]| page.iter().any(|byte| *byte != 0);
    let pages: Vec<&[u8]> = bytes.chunks(page_bytes).collect();
    let mut start = 0;
    for run in pages.chunk_by(|a, b| has_data(a) == has_data(b)) {
        let length = run.len() * page_bytes;
        if has_data(run[0]) {
            file.write_all_at(&bytes[start..start + length], offset + start as u64)?;
        }
        start += length;
    }
    Ok(())
}

fn page_bytes() -> usize {
    // SAFETY: sysconf has no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).expect("every host has a page size")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use arch::machine::MemoryMap;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::{GuestRam, SavedMemory, Sharing, Store};

    #[test]
    fn what_was_written_is_in_the_file_and_nothing_else_takes_room() {
        let regions = vec![(GuestAddress(0), 64 << 20), (GuestAddress(1 << 32), 32 << 20)];
        let map = MemoryMap { regions, device_window: 0..0, extension_window: 0..0 };
        let ram = |store| GuestRam::allocate(&map, &MemoryConfig::default(), store).unwrap();
        let places = [1 << 20, (64 << 20) - 1, (1 << 32) + (20 << 20)].map(GuestAddress);
        let original = ram(Store::anonymous());
        for (value, place) in (1u8..).zip(places) {
            original.memory().write_obj(value, place).unwrap();
        }
        // Touched, but there is nothing in it.
        original.memory().write_obj(0u8, GuestAddress(5 << 20)).unwrap();
        let file = tempfile::tempfile().unwrap();

        original.layout().copy(Path::new("/proc/self"), &file).unwrap();

        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 96 << 20);
        assert!(metadata.blocks() * 512 <= 3 * page_bytes() as u64, "{metadata:?}");
        let copy = ram(Store::of_saved(SavedMemory { file, sharing: Sharing::Private }));
        for (value, place) in (1u8..).zip(places) {
            assert_eq!(copy.memory().read_obj::<u8>(place).unwrap(), value);
        }
    }
}
