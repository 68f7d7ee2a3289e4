//! Guest memory of which parts come and go: where there is none, whatever is written goes to a few bytes that
//! all such places share.
//!
//! Guests, their devices and the host's kernel all reach guest memory through the mappings of this process.
//! So what these lead to is what a guest can use, whoever it makes write; and as there is always a mapping,
//! nobody has to ask before an access, or faults when memory goes away in the middle of one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;

use devices::mapping::{Aside, map_at};
use devices::virtio::mem::BLOCK_BYTES;

use super::PROTECTION;
use super::store::{Source, memfd};

/// Most mappings, of the 65,530 that Linux lets a process have (vm.max_map_count): a guest chooses its blocks,
/// and whatever else this process maps must find room. What a file has comes on top: the guest whose memory it
/// was had as many without.
const MAX_MAPPINGS: usize = 1 << 14;

/// Most mappings where there is no memory at all: 200 bytes of the kernel's and some microseconds for each.
const SINKS: u64 = 512;

/// How many there are if the sink is small then.
const FEW_SINKS: u64 = 64;

/// Size of a sink that is small, in bytes.
const SMALL_SINK_BYTES: u64 = 128 << 20;

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
    /// Where a mapping starts, in bytes from the start, and whether there is no memory; some may have become
    /// one with those before them.
    seams: BTreeMap<u64, bool>,
}

/// What is to be mapped somewhere.
pub(super) struct Piece<'a> {
    /// Where it belongs, in bytes from the start of the patchwork.
    pub place: Range<u64>,
    /// As for mmap(2).
    pub flags: i32,
    /// A file, and where in there it starts, in bytes; without one, it is fresh memory.
    pub file: Option<(&'a File, u64)>,
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
        let seams = (0..bytes).step_by(to_usize(sink_bytes)).map(|start| (start, true)).collect();
        let all = Patchwork { start, bytes, source, is_mergeable, sink, sink_bytes, seams };
        // In its place at once, as a machine that is not built needs it no more.
        for piece in all.sinks(&(0..bytes)) {
            // SAFETY: the caller says that it is guest memory.
            unsafe { piece.map_in_place(start) }?;
        }
        Ok(all)
    }

    /// Puts memory into `place`, in bytes from the start: zeros, or what the file has there that it is in. If
    /// that fails, there is what there was.
    pub fn fill(&mut self, place: &Range<u64>) -> io::Result<()> {
        self.check(place)?;
        let pieces = self.source.pieces(place);
        let seams = self.seams_with(place, &pieces, false)?;
        self.put(place, &pieces)?;
        self.note(place, seams);
        Ok(())
    }

    /// Takes the memory out of `place`, in bytes from the start, and gives it back to the host. If that fails,
    /// there is memory where there was, but perhaps not what was written to it.
    pub fn empty(&mut self, place: &Range<u64>) -> io::Result<()> {
        self.check(place)?;
        let pieces: Vec<_> = self.sinks(place).collect();
        let seams = self.seams_with(place, &pieces, true)?;
        if self.source.is_shared() {
            self.punch(place)?;
        }
        self.put(place, &pieces)?;
        self.note(place, seams);
        if self.seams.values().all(|is_sink| *is_sink) {
            // A guest that leaves alone what is no memory has nothing there; otherwise it stays what it is.
            _ = self.punch(&(0..self.sink_bytes));
        }
        Ok(())
    }

    /// Frees what the file has for `place`; where there is no memory, what the sink has.
    fn punch(&self, place: &Range<u64>) -> io::Result<()> {
        let (start, bytes) = (self.address(place), to_usize(place.end - place.start));
        // SAFETY: the range is guest memory, as whoever made this promised. It stays mapped; that it becomes
        // zeros is what a guest may do to its memory at any time.
        match unsafe { libc::madvise(start, bytes, libc::MADV_REMOVE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// What is mapped at `place` if there is no memory: one piece up to where the sink starts again.
    fn sinks(&self, place: &Range<u64>) -> impl Iterator<Item = Piece<'_>> + use<'_> {
        let (place, bytes) = (place.clone(), self.sink_bytes);
        (place.start / bytes..place.end.div_ceil(bytes)).map(move |number| {
            let whole = number * bytes..(number + 1) * bytes;
            let place = whole.start.max(place.start)..whole.end.min(place.end);
            let file = Some((&self.sink, place.start - whole.start));
            Piece { place, flags: SINK_FLAGS, file }
        })
    }

    fn check(&self, place: &Range<u64>) -> io::Result<()> {
        let is_inside = place.start < place.end && place.end <= self.bytes;
        let is_aligned = (place.start | place.end) % BLOCK_BYTES == 0;
        if is_inside && is_aligned { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// The seams of `place`, its end among them, with `pieces` there, which are sinks or are not. It fails if
    /// there would be too many.
    fn seams_with(
        &self,
        place: &Range<u64>,
        pieces: &[Piece],
        are_sinks: bool,
    ) -> io::Result<Vec<(u64, bool)>> {
        let mut before = place.start.checked_sub(1).map(|last| self.is_sink(last));
        let after = (place.end < self.bytes).then(|| (place.end, self.is_sink(place.end)));
        let mut seams = Vec::new();
        for (at, is_sink) in pieces.iter().map(|piece| (piece.place.start, are_sinks)).chain(after)
        {
            // The kernel makes mappings one if one goes on in their file where the other ends.
            let is_one = before == Some(is_sink)
                && if is_sink { at % self.sink_bytes != 0 } else { self.source.is_shared() };
            if !is_one {
                seams.push((at, is_sink));
            }
            before = Some(is_sink);
        }
        let replaced = self.seams.range(place.start..=place.end).count();
        match self.seams.len() - replaced + seams.len() <= MAX_MAPPINGS + self.source.most_seams() {
            true => Ok(seams),
            false => Err(io::Error::other("blocks of memory lie scattered in too many places")),
        }
    }

    /// Whether there is no memory at an offset.
    fn is_sink(&self, at: u64) -> bool {
        self.seams.range(..=at).next_back().is_none_or(|(_, is_sink)| *is_sink)
    }

    /// Makes `seams` those of `place`, and of its end.
    fn note(&mut self, place: &Range<u64>, seams: Vec<(u64, bool)>) {
        let replaced: Vec<_> =
            self.seams.range(place.start..=place.end).map(|(at, _)| *at).collect();
        replaced.iter().for_each(|at| _ = self.seams.remove(at));
        self.seams.extend(seams);
    }

    /// Puts `pieces`, each of which follows on the one before, into `place`. If that fails, there are the
    /// mappings that there were.
    fn put(&self, place: &Range<u64>, pieces: &[Piece]) -> io::Result<()> {
        let aside = pieces.iter().map(|piece| self.map_aside(piece));
        let aside = aside.collect::<io::Result<Vec<_>>>()?;
        // To replace a mapping frees its pages while nobody else in this process can map or fault any.
        self.advise(place, libc::MADV_DONTNEED);
        let mut rest = pieces.iter().zip(aside);
        while let Some((piece, mapping)) = rest.next() {
            let target = self.address(&piece.place);
            // SAFETY: it belongs into the range that whoever made this gave away, as all callers checked.
            if let Err(error) = unsafe { mapping.put(target) } {
                // They count, too.
                drop(rest);
                self.put_back(&(place.start..piece.place.start));
                return Err(error);
            }
        }
        Ok(())
    }

    fn map_aside(&self, piece: &Piece) -> io::Result<Aside> {
        let mapping = Aside::map(piece.bytes(), PROTECTION, piece.flags, piece.file())?;
        // A core dump is for our bugs; the guest's secrets do not belong in it.
        mapping.advise(libc::MADV_DONTDUMP);
        if self.is_mergeable && piece.flags != SINK_FLAGS {
            mapping.advise(libc::MADV_MERGEABLE);
        }
        Ok(mapping)
    }

    /// Maps at `place` what there is by the seams.
    fn put_back(&self, place: &Range<u64>) {
        let starts = self.seams.range(place.start + 1..place.end.max(place.start + 1));
        let starts = starts.map(|(at, _)| *at).chain([place.end]);
        let mut next = place.start;
        for end in starts {
            let (range, is_sink) = (next..end, self.is_sink(next));
            let pieces =
                if is_sink { self.sinks(&range).collect() } else { self.source.pieces(&range) };
            for piece in pieces.iter().filter(|piece| !piece.place.is_empty()) {
                // SAFETY: as in `put`.
                let done = unsafe { piece.map_in_place(self.start) };
                // Others must not get at what the guest may use, nor the guest at more than it may.
                done.expect("the kernel has memory for the mappings that it had");
            }
            if self.is_mergeable && !is_sink {
                self.advise(&range, libc::MADV_MERGEABLE);
            }
            next = end;
        }
    }

    /// Advice is best effort: a kernel without KSM still runs guests.
    fn advise(&self, place: &Range<u64>, advice: i32) {
        let bytes = to_usize(place.end - place.start);
        // SAFETY: the range is guest memory, as whoever made this promised, and stays mapped. What the guest
        // loses by the advice used here is what it gave up.
        unsafe { libc::madvise(self.address(place), bytes, advice) };
    }

    fn address(&self, place: &Range<u64>) -> *mut libc::c_void {
        ptr::without_provenance_mut(self.start + to_usize(place.start))
    }
}

impl Piece<'_> {
    /// Replaces what is where this belongs at once, for which the kernel needs fewest mappings.
    ///
    /// # Safety
    ///
    /// That must be a part of guest memory which starts at `start`, and to which nobody has a reference.
    unsafe fn map_in_place(&self, start: usize) -> io::Result<()> {
        let target = ptr::without_provenance_mut(start + to_usize(self.place.start));
        let (bytes, flags) = (self.bytes(), self.flags | libc::MAP_FIXED);
        // SAFETY: as the caller promises.
        let mapped = unsafe { map_at(target, bytes, PROTECTION, flags, self.file()) }?;
        // As aside.
        // SAFETY: the mapping was just made, and the advice changes nothing of it.
        unsafe { libc::madvise(mapped, bytes, libc::MADV_DONTDUMP) };
        Ok(())
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.file.map(|(file, offset)| (file.as_fd(), offset))
    }

    fn bytes(&self) -> usize {
        to_usize(self.place.end - self.place.start)
    }
}

/// How large the sink for `bytes` bytes is: what a guest can use of it beside what it may.
fn sink_bytes(bytes: u64) -> u64 {
    let with = |sinks| bytes.div_ceil(sinks).next_power_of_two();
    with(FEW_SINKS).min(SMALL_SINK_BYTES).max(with(SINKS)).max(BLOCK_BYTES)
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("no larger than a mapping")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use devices::testing::in_a_child;

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
        fn of(store: Store) -> Self {
            Memory::of_blocks(store, BLOCKS)
        }

        fn of_blocks(mut store: Store, blocks: u64) -> Self {
            let bytes = blocks * BLOCK_BYTES;
            let source = store.source(bytes).unwrap();
            let start = store.map(to_usize(bytes)).unwrap();
            // SAFETY: the range was just mapped and is never unmapped; only copies are made of what is there.
            let patchwork = unsafe { Patchwork::new(start.addr(), bytes, source, true) }.unwrap();
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

    /// How many mappings of the process lie in the memory.
    fn mappings(memory: &Memory) -> usize {
        let (start, bytes) = (memory.patchwork.start, to_usize(memory.patchwork.bytes));
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let number = |digits| usize::from_str_radix(digits, 16).unwrap();
        let starts = maps.lines().map(|line| number(line.split_once('-').unwrap().0));
        starts.filter(|from| (start..start + bytes).contains(from)).count()
    }

    /// Uses up the mappings that the process may have (`vm.max_map_count`). Returns the first of pages of
    /// which each is one, every second to be read.
    fn use_up_mappings() -> *mut libc::c_void {
        let most = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let most: usize = most.trim().parse().unwrap();
        let flags = super::super::FLAGS;
        // SAFETY: a new mapping that replaces nothing, of which every second page becomes another one.
        unsafe {
            let start = libc::mmap(ptr::null_mut(), most * 4096, libc::PROT_NONE, flags, -1, 0);
            let split =
                |nth| libc::mprotect(start.byte_add(nth * 4096), 4096, libc::PROT_READ) == 0;
            assert!((1..most).step_by(2).any(|nth| !split(nth)));
            start
        }
    }

    #[test]
    fn without_mappings_left_all_of_what_is_asked_for_is_done_or_nothing() {
        let file = memfd(c"test").unwrap();
        (0..20).for_each(|n| file.write_all_at(&[7], (2 * n + 1) * BLOCK_BYTES).unwrap());
        file.set_len(2048 * BLOCK_BYTES).unwrap();
        let saved = SavedMemory { file, sharing: Sharing::Private };
        let mut memory = Memory::of_blocks(Store::of_saved(saved), 2048);
        // A sink has 32 blocks: what is written to the last ones shows in all others.
        let is_sunk = |memory: &Memory| {
            (2016..2048).for_each(|block| memory.write(block, 9));
            (0..41).all(|block| memory.read(block) == 9)
        };
        let mut try_all = |blocks: Range<u64>| {
            let is_there = |memory: &Memory| {
                blocks.clone().all(|block| memory.read(block) == block % 2 * 7)
                    && memory.read(blocks.end) == 9
            };
            in_a_child(|| {
                let mut page = use_up_mappings();
                let mut give_one_back = || {
                    // SAFETY: the page is one that nobody uses.
                    assert_eq!(unsafe { libc::munmap(page, 4096) }, 0);
                    page = page.wrapping_byte_add(4096);
                };
                let mut failed = 0;
                while memory.fill(blocks.clone()).is_err() {
                    assert!(is_sunk(&memory), "{failed}");
                    failed += 1;
                    give_one_back();
                }
                assert!(is_there(&memory));
                while memory.empty(blocks.clone()).is_err() {
                    assert!(is_there(&memory), "{failed}");
                    failed += 1;
                    give_one_back();
                }
                is_sunk(&memory) && failed > 1
            })
        };

        // Within a sink, where the second piece is the one that has no mapping left, and across two.
        assert_eq!([try_all(1..3), try_all(25..39)], [true; 2]);
    }

    #[test]
    fn blocks_that_are_emptied_one_by_one_leave_no_more_mappings_than_all_at_once() {
        let mut memory = Memory::of_blocks(Store::anonymous(), 2048);
        let all = [mappings(&memory), memory.patchwork.seams.len()];
        assert_eq!(all, [64; 2]);

        memory.fill(0..2048).unwrap();
        for block in (0..2048).step_by(2).chain((1..2048).step_by(2)) {
            memory.empty(block..block + 1).unwrap();
            assert!(memory.patchwork.seams.len() <= 2048);
        }

        assert_eq!([mappings(&memory), memory.patchwork.seams.len()], all);
    }

    #[test]
    fn no_mapping_is_left_out_of_the_count() {
        for store in [Store::anonymous(), Store::create(&MemoryBacking::Memfd).unwrap()] {
            let mut memory = Memory::of_blocks(store, 2048);
            for number in 0..300 {
                // Somewhere, of some size.
                let start = number * 1009 % 2000;
                let blocks = start..start + 1 + number * 31 % 40;
                let done = if number % 3 == 2 { memory.empty(blocks) } else { memory.fill(blocks) };
                done.unwrap();
                memory.write(start, number);
                assert!(mappings(&memory) <= memory.patchwork.seams.len(), "{number}");
            }
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
        let in_mib = |gib: u64| sink_bytes(gib << 30) >> 20;
        assert_eq!([1, 8, 32, 64, 128, 1024].map(in_mib), [16, 128, 128, 128, 256, 2048]);
        assert_eq!(sink_bytes(BLOCK_BYTES), BLOCK_BYTES);

        memory.empty(3..4).unwrap();
        assert_eq!(memory.sunk_bytes(), 0);
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
        assert_eq!(memory.patchwork.seams.len(), 1);
        // As many as if there were more blocks.
        memory.patchwork.seams.extend((1..).map(|n| (BYTES + n, false)).take(MAX_MAPPINGS - 2));

        assert!(memory.empty(100..101).is_err());
        assert_eq!(memory.read(100), 7);

        // The last ones lie next to each other.
        memory.empty(255..256).unwrap();
        memory.fill(255..256).unwrap();
        assert!(memory.patchwork.seams.len() <= MAX_MAPPINGS);
    }
}
