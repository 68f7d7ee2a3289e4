//! Kernel code that leaves most of some huge pages empty.
#![cfg(target_arch = "x86_64")]

use object::LittleEndian;
use object::elf::{FileHeader64, PF_W, PF_X, PT_LOAD, ProgramHeader64};
use object::read::elf::FileHeader;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// What the host fills at once where it has huge pages, in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// Keeps the host from filling a huge page of `memory` where the code of the ELF kernel that begins with `head`
/// takes less than half of one: linkers leave holes of more than a MiB in it. To be called before the kernel is
/// loaded.
///
/// Best effort: a kernel that cannot be understood is one for the loader to refuse.
pub fn keep_pages_small(memory: &GuestMemoryMmap, head: &[u8]) {
    let Some(segments) = code(head) else { return };
    let bytes = usize::try_from(HUGE_PAGE).expect("a huge page is small");
    for page in sparse_pages(&segments) {
        let Ok(slice) = memory.get_slice(GuestAddress(page), bytes) else { return };
        let start = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the page is mapped, and the advice changes nothing of what is in it.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_NOHUGEPAGE) };
    }
}

/// A segment with code: where it is in memory, and how many bytes of it are loaded.
#[derive(Debug, Clone, Copy)]
struct Segment {
    start: u64,
    loaded: u64,
    bytes: u64,
}

impl Segment {
    fn of(header: &ProgramHeader64<LittleEndian>) -> Option<Self> {
        // What can be written, too, begins with code that is thrown away and ends with the bss.
        let is_code = header.p_type.get(LittleEndian) == PT_LOAD
            && header.p_flags.get(LittleEndian) & (PF_X | PF_W) == PF_X;
        let [start, loaded, bytes] =
            [header.p_paddr, header.p_filesz, header.p_memsz].map(|field| field.get(LittleEndian));
        // No file can have more.
        (is_code && start.checked_add(bytes.max(loaded)).is_some_and(|end| end < 1 << 40))
            .then_some(Segment { start, loaded, bytes })
    }
}

/// The segments with code of the kernel that begins with `head`.
fn code(head: &[u8]) -> Option<Vec<Segment>> {
    let header = FileHeader64::<LittleEndian>::parse(head).ok()?;
    let segments = header.program_headers(header.endian().ok()?, head).ok()?;
    Some(segments.iter().filter_map(Segment::of).collect())
}

/// The addresses of the huge pages that belong to code alone, and less than half of which is loaded.
fn sparse_pages(segments: &[Segment]) -> Vec<u64> {
    let sum = |page: u64, bytes: fn(&Segment) -> u64| -> u64 {
        let within = |segment: &Segment| {
            let end = (segment.start + bytes(segment)).min(page + HUGE_PAGE);
            end.saturating_sub(segment.start.max(page))
        };
        segments.iter().map(within).sum()
    };
    let first = segments.iter().map(|segment| segment.start / HUGE_PAGE).min().unwrap_or(0);
    let end = segments.iter().map(|segment| (segment.start + segment.bytes) / HUGE_PAGE).max();
    (first..end.unwrap_or(0))
        .map(|number| number * HUGE_PAGE)
        .filter(|&page| sum(page, |segment| segment.bytes) == HUGE_PAGE)
        .filter(|&page| sum(page, |segment| segment.loaded) < HUGE_PAGE / 2)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn segment(start: u64, loaded: u64, bytes: u64) -> Segment {
        Segment { start, loaded, bytes }
    }

    #[test]
    fn a_huge_page_with_a_long_hole_is_sparse() {
        let tuned = [
            segment(16 * MIB, 6 * MIB + 4096, 8 * MIB),
            segment(24 * MIB, 4096, MIB),
            segment(25 * MIB, 2 * MIB, 2 * MIB),
        ];

        assert_eq!(sparse_pages(&tuned), [22 * MIB]);
    }

    #[test]
    fn a_huge_page_that_is_not_all_code_is_left_alone() {
        let small = [segment(MIB, 4096, 4096)];
        let at_an_end = [segment(16 * MIB, 4096, 2 * MIB - 1)];

        assert!(sparse_pages(&small).is_empty());
        assert!(sparse_pages(&at_an_end).is_empty());
        assert!(sparse_pages(&[]).is_empty());
    }

    #[test]
    fn what_is_no_kernel_has_no_code() {
        assert!(code(b"").is_none());
        assert!(code(&[0x7f; 64]).is_none());
    }
}
