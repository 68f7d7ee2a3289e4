//! Guest memory of which parts come and go: where there is none, whatever is written goes to a few bytes that
//! all such places share.
//!
//! Guests, their devices and the host's kernel all reach guest memory through the mappings of this process.
//! So what these lead to is what a guest can use, whoever it makes write; and as there is always a mapping,
//! nobody has to ask before an access, or faults when memory goes away in the middle of one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use devices::virtio::mem::BLOCK_BYTES;

use super::PROTECTION;
use super::store::{Source, map_file, memfd};

/// Most mappings, of the 65,530 that Linux lets a process have (vm.max_map_count): a guest chooses its blocks,
/// and whatever else this process maps must find room.
const MAX_MAPPINGS: usize = 1 << 14;

/// Most mappings where there is no memory at all.
const SINKS: u64 = 64;

const SINK_FLAGS: i32 = libc::MAP_SHARED | libc::MAP_NORESERVE;

/// A range of addresses of this process that has memory in some places.
pub(super) struct Patchwork {
    /// Its start, and its size in bytes.
    start: usize,
    bytes: u64,
    /// What memory is made of.
    source: Source,
    is_mergeable: bool,
    /// What is mapped where there is no memory, again and again, and its size in bytes.
    sink: File,
    sink_bytes: u64,
    /// Where one mapping ends and another starts, in bytes from the start; some may be one by now.
    seams: BTreeSet<u64>,
}

/// A mapping that was made aside: what cannot be made takes nothing away.
pub(super) struct Piece {
    address: *mut libc::c_void,
    /// Where it belongs, in bytes from the start of the patchwork.
    place: Range<u64>,
}

impl Patchwork {
    /// Takes all memory out of the `bytes` bytes from address `start` on, which `source` is for.
    ///
    /// # Safety
    ///
    /// They must be mapped, and stay guest memory for the rest of the process.
    pub unsafe fn new(
        start: usize,
        bytes: u64,
        source: Source,
        is_mergeable: bool,
    ) -> io::Result<Self> {
        let (sink, sink_bytes) = (memfd(c"unplugged guest memory")?, sink_bytes(bytes));
        sink.set_len(sink_bytes)?;
        let seams = (0..bytes).step_by(to_usize(sink_bytes)).chain([bytes]).collect();
        let all = Patchwork { start, bytes, source, is_mergeable, sink, sink_bytes, seams };
        // In its place at once, as a machine that is not built needs it no more.
        for place in all.sinks(&(0..bytes)) {
            let whole = 0..place.end - place.start;
            let address = ptr::without_provenance_mut(start + to_usize(place.start));
            map_file(&all.sink, SINK_FLAGS, address, &whole, &whole)?;
        }
        // As for every piece of memory.
        let all_of_it = ptr::without_provenance_mut(start);
        // SAFETY: the range is the one of which the caller says that it is guest memory, and the advice
        // changes nothing of it.
        unsafe { libc::madvise(all_of_it, to_usize(bytes), libc::MADV_DONTDUMP) };
        Ok(all)
    }

    /// Puts memory into `place`, in bytes from the start: zeros, or what the file has there that it is in.
    pub fn fill(&mut self, place: &Range<u64>) -> io::Result<()> {
        self.check(place)?;
        let pieces = self.source.pieces(place)?;
        if self.is_mergeable {
            pieces.iter().for_each(|piece| piece.advise(libc::MADV_MERGEABLE));
        }
        self.check_count(place, &pieces)?;
        self.put(pieces);
        Ok(())
    }

    /// Takes the memory out of `place`, in bytes from the start, and gives it back to the host.
    pub fn empty(&mut self, place: &Range<u64>) -> io::Result<()> {
        self.check(place)?;
        let sink = |place: Range<u64>| {
            let offset = place.start % self.sink_bytes;
            Piece::map(place, SINK_FLAGS, Some((&self.sink, offset)))
        };
        let pieces = self.sinks(place).map(sink).collect::<io::Result<Vec<_>>>()?;
        self.check_count(place, &pieces)?;
        if self.source.is_shared() {
            self.punch(place)?;
        }
        self.put(pieces);
        Ok(())
    }

    /// Frees what the file has for `place`; where there is no memory, what the sink has.
    fn punch(&self, place: &Range<u64>) -> io::Result<()> {
        let start = ptr::without_provenance_mut(self.start + to_usize(place.start));
        let bytes = to_usize(place.end - place.start);
        // SAFETY: the range is guest memory, as whoever made this promised. It stays mapped; that it becomes
        // zeros is what a guest may do to its memory at any time.
        match unsafe { libc::madvise(start, bytes, libc::MADV_REMOVE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// `place` by where the sink starts again.
    fn sinks(&self, place: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let (place, sink_bytes) = (place.clone(), self.sink_bytes);
        let numbers = place.start / sink_bytes..place.end.div_ceil(sink_bytes);
        numbers.map(move |number| {
            let whole = number * sink_bytes..(number + 1) * sink_bytes;
            whole.start.max(place.start)..whole.end.min(place.end)
        })
    }

    fn check(&self, place: &Range<u64>) -> io::Result<()> {
        let is_inside = place.start < place.end && place.end <= self.bytes;
        let is_aligned = (place.start | place.end) % BLOCK_BYTES == 0;
        if is_inside && is_aligned { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Whether there would not be too many mappings with `pieces` in `place`.
    fn check_count(&self, place: &Range<u64>, pieces: &[Piece]) -> io::Result<()> {
        let replaced = self.seams.range(place.start..=place.end).count();
        match self.seams.len() - replaced + pieces.len() < MAX_MAPPINGS {
            true => Ok(()),
            false => Err(io::Error::other("blocks of memory lie scattered in too many places")),
        }
    }

    /// Puts `pieces`, each of which follows on the one before, where they belong.
    fn put(&mut self, pieces: Vec<Piece>) {
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return };
        let place = first.place.start..last.place.end;
        let replaced: Vec<_> = self.seams.range(place.clone()).copied().collect();
        replaced.iter().for_each(|seam| _ = self.seams.remove(seam));
        self.seams.insert(place.end);
        for piece in pieces {
            self.seams.insert(piece.place.start);
            // SAFETY: it belongs into the range that whoever made this gave away, as all callers checked.
            unsafe { piece.put(self.start) };
        }
    }
}

impl Piece {
    /// Maps memory, or `file` from an offset on, aside; it is for `place`.
    pub fn map(place: Range<u64>, flags: i32, file: Option<(&File, u64)>) -> io::Result<Self> {
        let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let bytes = to_usize(place.end - place.start);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, PROTECTION, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let piece = Piece { address, place };
        // A core dump is for our bugs; the guest's secrets do not belong in it.
        piece.advise(libc::MADV_DONTDUMP);
        Ok(piece)
    }

    /// Advice is best effort: a kernel without KSM still runs guests.
    fn advise(&self, advice: i32) {
        // SAFETY: the mapping is this one's own, and none of the advice used here unmaps it.
        unsafe { libc::madvise(self.address, self.bytes(), advice) };
    }

    fn bytes(&self) -> usize {
        to_usize(self.place.end - self.place.start)
    }

    /// Replaces what is where this belongs.
    ///
    /// # Safety
    ///
    /// That must be a part of guest memory which starts at `start`, and to which nobody has a reference.
    unsafe fn put(self, start: usize) {
        let target = ptr::without_provenance_mut(start + to_usize(self.place.start));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the mapping has the size of what it replaces, of which the caller says that it may be.
        let moved =
            unsafe { libc::mremap(self.address, self.bytes(), self.bytes(), flags, target) };
        // It fails once there are as many mappings as may be, of which we keep clear.
        assert!(moved == target, "memory for a mapping: {}", io::Error::last_os_error());
        std::mem::forget(self);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: it is this one's own, and nobody has a reference to it.
        unsafe { libc::munmap(self.address, self.bytes()) };
    }
}

/// How large the sink for `bytes` bytes is: what a guest can use of it beside what it may.
fn sink_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(SINKS).next_power_of_two().max(BLOCK_BYTES)
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("no larger than a mapping")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::config::MemoryBacking;
    use crate::memory::store::{SavedMemory, Sharing, Store};

    const BLOCKS: u64 = 256;
    const BYTES: u64 = BLOCKS * BLOCK_BYTES;

    /// Memory of which nothing is there, as guests and devices see it.
    struct Memory {
        patchwork: Patchwork,
        start: *mut u8,
    }

    impl Memory {
        fn of(mut store: Store) -> Self {
            let source = store.source(BYTES).unwrap();
            let start = store.map(to_usize(BYTES)).unwrap();
            // SAFETY: the range was just mapped and is never unmapped; only copies are made of what is there.
            let patchwork = unsafe { Patchwork::new(start.addr(), BYTES, source, true) }.unwrap();
            Memory { patchwork, start }
        }

        fn anonymous() -> Self {
            Memory::of(Store::anonymous())
        }

        fn fill(&mut self, blocks: Range<u64>) -> io::Result<()> {
            self.patchwork.fill(&(blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES))
        }

        fn empty(&mut self, blocks: Range<u64>) -> io::Result<()> {
            self.patchwork.empty(&(blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES))
        }

        /// The first word of a block.
        fn word(&self, block: u64) -> *mut u64 {
            self.start.wrapping_add(to_usize(block * BLOCK_BYTES)).cast()
        }

        fn read(&self, block: u64) -> u64 {
            // SAFETY: the word is mapped, and nobody has a reference to it.
            unsafe { self.word(block).read_volatile() }
        }

        fn write(&self, block: u64, value: u64) {
            // SAFETY: as in `read`.
            unsafe { self.word(block).write_volatile(value) }
        }

        /// Writes to every page of a block.
        fn write_all(&self, block: u64) {
            for page in 0..BLOCK_BYTES / 4096 {
                let place = self.word(block).wrapping_byte_add(to_usize(page * 4096));
                // SAFETY: as in `read`.
                unsafe { place.write_volatile(1) };
            }
        }

        /// What is in use of the sink, in bytes.
        fn sunk_bytes(&self) -> u64 {
            self.patchwork.sink.metadata().unwrap().blocks() * 512
        }
    }

    #[test]
    fn memory_is_where_it_was_put_and_nowhere_else() {
        let mut memory = Memory::anonymous();

        memory.fill(3..5).unwrap();
        (0..BLOCKS).for_each(|block| memory.write(block, block + 1));

        assert_eq!([memory.read(3), memory.read(4)], [4, 5]);
        let blocks_of_sink = sink_bytes(BYTES) / BLOCK_BYTES;
        for block in (0..BLOCKS).filter(|block| !(3..5).contains(block)) {
            // The last one to write there has written everywhere.
            assert!(memory.read(block) > BLOCKS - blocks_of_sink, "{block}");
        }
    }

    #[test]
    fn writing_where_there_is_no_memory_costs_no_more_than_the_sink() {
        let mut memory = Memory::anonymous();
        memory.fill(0..BLOCKS).unwrap();
        memory.empty(0..BLOCKS).unwrap();

        (0..BLOCKS).for_each(|block| memory.write_all(block));

        assert_eq!(memory.sunk_bytes(), sink_bytes(BYTES));
        assert_eq!(sink_bytes(BYTES), BYTES / 64);
    }

    #[test]
    fn memory_that_was_taken_out_comes_back_as_zeros() {
        let mut memory = Memory::anonymous();
        memory.fill(0..4).unwrap();
        (0..4).for_each(|block| memory.write(block, 7));

        memory.empty(1..3).unwrap();
        memory.fill(1..3).unwrap();

        let words: Vec<_> = (0..4).map(|block| memory.read(block)).collect();
        assert_eq!(words, [7, 0, 0, 7]);
    }

    #[test]
    fn a_file_has_what_is_written_to_memory_and_a_hole_for_the_rest() {
        let store = Store::create(&MemoryBacking::Memfd).unwrap();
        let file = store.file().unwrap().try_clone().unwrap();
        let mut memory = Memory::of(store);

        memory.fill(2..6).unwrap();
        (0..BLOCKS).for_each(|block| memory.write(block, 7));
        assert_eq!(file.metadata().unwrap().blocks() * 512, 4 * 4096);
        memory.empty(3..5).unwrap();
        (0..BLOCKS).for_each(|block| memory.write(block, 8));

        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * 4096);
        memory.fill(3..5).unwrap();
        assert_eq!([memory.read(2), memory.read(3), memory.read(4), memory.read(5)], [8, 0, 0, 8]);
    }

    #[test]
    fn what_a_file_has_is_there_for_the_next_machine() {
        let store = Store::create(&MemoryBacking::Memfd).unwrap();
        let file = store.file().unwrap().try_clone().unwrap();
        let mut old = Memory::of(store);
        old.fill(2..6).unwrap();
        old.write(3, 7);

        for sharing in [Sharing::Private, Sharing::Shared] {
            let saved = SavedMemory { file: file.try_clone().unwrap(), sharing };
            let mut new = Memory::of(Store::of_saved(saved));
            new.fill(2..3).unwrap();
            new.fill(3..6).unwrap();
            assert_eq!([new.read(2), new.read(3), new.read(4)], [0, 7, 0], "{sharing:?}");
            new.write(3, 8);
        }

        assert_eq!(old.read(3), 8);
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let mut memory = Memory::anonymous();

        assert!(memory.fill(0..BLOCKS + 1).is_err());
        assert!(memory.fill(1..1).is_err());
        assert!(memory.patchwork.empty(&(4096..BLOCK_BYTES)).is_err());
    }

    #[test]
    fn too_many_mappings_are_refused_and_change_nothing() {
        let mut memory = Memory::anonymous();
        memory.fill(0..BLOCKS).unwrap();
        memory.write(100, 7);
        let few = memory.patchwork.seams.len();
        assert_eq!(few, 2);
        // As many as if there were more blocks.
        memory.patchwork.seams.extend((1..).map(|n| BYTES + n).take(MAX_MAPPINGS - 3));

        assert!(memory.empty(100..101).is_err());
        assert_eq!(memory.read(100), 7);

        // The last ones lie next to each other.
        memory.empty(255..256).unwrap();
        memory.fill(255..256).unwrap();
        assert!(memory.patchwork.seams.len() <= MAX_MAPPINGS);
    }
}
