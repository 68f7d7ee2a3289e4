//! Guest memory of which a kernel uses a few pages here and there when it boots: with huge pages, the host
//! would fill all of it.
#![cfg(target_arch = "x86_64")]

use std::ops::Range;

use object::LittleEndian;
use object::elf::{FileHeader64, PF_W, PF_X, PT_LOAD, ProgramHeader64};
use object::read::elf::FileHeader;
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap};

/// What the host fills at once where it has huge pages, in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// What Linux keeps a map of its own for (`SECTION_SIZE_BITS`), in bytes.
const SECTION: u64 = 128 << 20;

/// Starts and ends of what Linux uses little of below its usual place: what it asks for by address, and the end
/// of the last block of 4 MiB that its page allocator begins before init runs. Those between fill up.
const LOW: [(u64, u64); 2] = [(0, 8 << 20), (14 << 20, 16 << 20)];

/// Keeps the host from filling huge pages of `memory` where the ELF kernel that begins with `head` uses but a
/// few pages while it boots. To be called before the kernel is loaded.
///
/// Best effort: a kernel that cannot be understood is one for the loader to refuse.
pub fn keep_pages_small(memory: &GuestMemoryMmap, head: &[u8]) {
    let Some(image) = segments(head) else { return };
    let Some(ram_end) = memory.last_addr().checked_add(1) else { return };
    for range in sparse(&image, ram_end.raw_value()) {
        let bytes = usize::try_from(range.end - range.start).expect("it is mapped");
        let Ok(slice) = memory.get_slice(GuestAddress(range.start), bytes) else { continue };
        let start = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the range is mapped, and the advice changes nothing of what is in it.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_NOHUGEPAGE) };
    }
}

/// A part of a kernel: where it is in memory, and how many bytes of it are loaded.
#[derive(Debug, Clone, Copy)]
struct Segment {
    start: u64,
    loaded: u64,
    bytes: u64,
    /// Whether it is code and nothing else. What can be written, too, begins with code that is thrown away and
    /// ends with the bss.
    is_code: bool,
}

impl Segment {
    fn of(header: &ProgramHeader64<LittleEndian>) -> Option<Self> {
        let [start, loaded, bytes] =
            [header.p_paddr, header.p_filesz, header.p_memsz].map(|field| field.get(LittleEndian));
        let bytes = bytes.max(loaded);
        let is_code = header.p_flags.get(LittleEndian) & (PF_X | PF_W) == PF_X;
        // No memory has more.
        (header.p_type.get(LittleEndian) == PT_LOAD
            && start.checked_add(bytes).is_some_and(|end| end < 1 << 40))
        .then_some(Segment { start, loaded, bytes, is_code })
    }

    fn end(&self) -> u64 {
        self.start + self.bytes
    }
}

/// The parts of the kernel that begins with `head`.
fn segments(head: &[u8]) -> Option<Vec<Segment>> {
    let header = FileHeader64::<LittleEndian>::parse(head).ok()?;
    let segments = header.program_headers(header.endian().ok()?, head).ok()?;
    Some(segments.iter().filter_map(Segment::of).collect())
}

/// The huge pages of RAM up to `ram_end` of which a kernel of these segments uses little.
fn sparse(image: &[Segment], ram_end: u64) -> Vec<Range<u64>> {
    let start = image.iter().map(|segment| segment.start).min().unwrap_or(0);
    let end = image.iter().map(Segment::end).max().unwrap_or(0);
    // What has not a huge page of its own is no Linux.
    if end < start + HUGE_PAGE {
        return Vec::new();
    }
    let below = start / HUGE_PAGE * HUGE_PAGE;
    let mut sparse = LOW.map(|(start, end)| start.min(below)..end.min(below)).to_vec();
    sparse.extend(sparse_code(image));
    if (1..HUGE_PAGE / 2).contains(&(end % HUGE_PAGE)) {
        sparse.push(page_before(end.next_multiple_of(HUGE_PAGE)));
    }
    // A map of what is used of the first section, alone at its end: the other sections' maps are there, too.
    if (end..ram_end).contains(&SECTION) {
        sparse.push(page_before(SECTION));
    }
    // What it takes for good before there is an allocator comes from the end.
    sparse.push(page_before(ram_end.next_multiple_of(HUGE_PAGE)));
    sparse.retain(|range| !range.is_empty() && range.end <= ram_end);
    sparse
}

fn page_before(end: u64) -> Range<u64> {
    end.saturating_sub(HUGE_PAGE)..end
}

/// The huge pages that belong to code alone, and less than half of which is loaded: linkers leave holes of more
/// than a MiB in it.
fn sparse_code(image: &[Segment]) -> Vec<Range<u64>> {
    let segments: Vec<&Segment> = image.iter().filter(|segment| segment.is_code).collect();
    let sum = |page: u64, bytes: fn(&Segment) -> u64| -> u64 {
        let within = |segment: &&Segment| {
            let end = (segment.start + bytes(segment)).min(page + HUGE_PAGE);
            end.saturating_sub(segment.start.max(page))
        };
        segments.iter().map(within).sum()
    };
    let first = segments.iter().map(|segment| segment.start / HUGE_PAGE).min().unwrap_or(0);
    let end = segments.iter().map(|segment| segment.end() / HUGE_PAGE).max().unwrap_or(0);
    (first..end)
        .map(|number| number * HUGE_PAGE)
        .filter(|&page| sum(page, |segment| segment.bytes) == HUGE_PAGE)
        .filter(|&page| sum(page, |segment| segment.loaded) < HUGE_PAGE / 2)
        .map(|page| page..page + HUGE_PAGE)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn code(start: u64, loaded: u64, bytes: u64) -> Segment {
        Segment { start, loaded, bytes, is_code: true }
    }

    fn data(start: u64, bytes: u64) -> Segment {
        Segment { start, loaded: bytes, bytes, is_code: false }
    }

    /// Starts and ends in MiB.
    fn in_mib(ranges: &[Range<u64>]) -> Vec<(u64, u64)> {
        ranges.iter().map(|range| (range.start / MIB, range.end / MIB)).collect()
    }

    #[test]
    fn a_huge_page_of_code_with_a_long_hole_is_sparse() {
        let tuned = [
            code(16 * MIB, 6 * MIB + 4096, 8 * MIB),
            code(24 * MIB, 4096, MIB),
            code(25 * MIB, 2 * MIB, 2 * MIB),
        ];

        assert_eq!(in_mib(&sparse_code(&tuned)), [(22, 24)]);
    }

    #[test]
    fn a_huge_page_that_is_not_all_code_is_left_alone() {
        let small = [code(MIB, 4096, 4096)];
        let at_an_end = [code(16 * MIB, 4096, 2 * MIB - 1)];

        assert!(sparse_code(&small).is_empty());
        assert!(sparse_code(&at_an_end).is_empty());
        assert!(sparse_code(&[data(16 * MIB, 4096)]).is_empty());
        assert!(sparse_code(&[]).is_empty());
    }

    #[test]
    fn what_linux_takes_before_it_has_an_allocator_is_sparse() {
        let kernel = [code(16 * MIB, 8 * MIB, 8 * MIB), data(24 * MIB, 6 * MIB + 4096)];

        let of = |ram_mib: u64| in_mib(&sparse(&kernel, ram_mib * MIB));

        assert_eq!(of(128), [(0, 8), (14, 16), (30, 32), (126, 128)]);
        assert_eq!(of(256), [(0, 8), (14, 16), (30, 32), (126, 128), (254, 256)]);
    }

    #[test]
    fn memory_far_below_a_kernel_keeps_its_huge_pages() {
        let kernel = [data(256 * MIB, 10 * MIB)];

        let around = [(0, 8), (14, 16), (510, 512)];
        assert_eq!(in_mib(&sparse(&kernel, 512 * MIB)), around);
    }

    #[test]
    fn there_is_no_advice_about_memory_that_is_not_there() {
        let kernel = [code(16 * MIB, 8 * MIB, 8 * MIB), data(24 * MIB, 6 * MIB + 4096)];

        for ram in [0, 4096, 16 * MIB, 31 * MIB, 65 * MIB + 4096] {
            assert!(sparse(&kernel, ram).iter().all(|range| range.end <= ram), "{ram}");
        }
    }

    #[test]
    fn a_kernel_that_is_full_to_its_end_keeps_its_huge_page() {
        let kernel = [data(MIB, 10 * MIB)];

        assert_eq!(in_mib(&sparse(&kernel, 64 * MIB)), [(62, 64)]);
    }

    #[test]
    fn a_program_that_is_no_linux_is_left_alone() {
        assert!(sparse(&[code(MIB, 4096, 4096)], 256 * MIB).is_empty());
        assert!(sparse(&[], 256 * MIB).is_empty());
        assert!(segments(b"").is_none());
        assert!(segments(&[0x7f; 64]).is_none());
    }
}
