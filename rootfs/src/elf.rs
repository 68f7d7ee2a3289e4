//! What an ELF kernel need not carry.

use object::elf::{FileHeader64, PF_X, PT_LOAD, ProgramHeader64};
use object::pod::{bytes_of_slice, from_bytes_mut};
use object::read::elf::FileHeader;
use object::{LittleEndian, U16, U64};

/// What linkers put between functions of x86: a breakpoint.
const FILLER: u8 = 0xcc;

/// Granularity of what is left out, in bytes: that of memory.
const PAGE_BYTES: usize = 4096;

/// From how many pages on filler is worth a segment of its own.
const HOLE_PAGES: usize = 16;

/// A header that cannot be: the error of [`leave_filler_out`].
#[derive(Debug, thiserror::Error)]
#[error("not a 64-bit little-endian ELF file whose program headers describe what it holds")]
pub struct Malformed;

type Segment = ProgramHeader64<LittleEndian>;

/// Takes out of what is loaded of `kernel` what says nothing: the memory of a new guest is zeros, and to write
/// some there takes time and memory of the host.
///
/// - Zeros at the end of a segment. Debian's kernel has 11 MiB of them, because a section that is not empty to
///   the linker follows its bss.
/// - Long filler within code, which nothing jumps to. There are 3 MiB of it: code against speculation beyond
///   returns has to have addresses that differ from each other in certain bits only, and constants begin at a
///   huge page of their own.
///
/// The file keeps its size, and a segment its place and size in memory (System V ABI, "Program Header").
pub fn leave_filler_out(kernel: &mut [u8]) -> Result<(), Malformed> {
    let header = FileHeader64::<LittleEndian>::parse(&*kernel).map_err(|_| Malformed)?;
    let endian = header.endian().map_err(|_| Malformed)?;
    let segments = header.program_headers(endian, &*kernel).map_err(|_| Malformed)?;
    let trimmed: Vec<_> = segments
        .iter()
        .map(|segment| trimmed(kernel, segment).ok_or(Malformed))
        .collect::<Result<_, _>>()?;
    let pieces: Vec<_> = trimmed.iter().flat_map(|segment| pieces(kernel, segment)).collect();
    let place = usize::try_from(header.e_phoff.get(endian)).map_err(|_| Malformed)?;
    let taken = size_of_val(segments);
    let all = if has_room(kernel, place + taken, size_of_val(&*pieces) - taken, &trimmed) {
        &pieces
    } else {
        &trimmed
    };
    let count = u16::try_from(all.len()).map_err(|_| Malformed)?;
    let bytes = bytes_of_slice(all);
    kernel.get_mut(place..place + bytes.len()).ok_or(Malformed)?.copy_from_slice(bytes);
    let (header, _) =
        from_bytes_mut::<FileHeader64<LittleEndian>>(kernel).map_err(|()| Malformed)?;
    header.e_phnum = U16::new(endian, count);
    Ok(())
}

/// Whether there is nothing yet in `bytes` bytes of the file from `start` on, and it belongs to none of the
/// `segments`.
fn has_room(kernel: &[u8], start: usize, bytes: usize, segments: &[Segment]) -> bool {
    let is_free = |segment: &Segment| {
        segment.p_filesz.get(LittleEndian) == 0
            || segment.p_offset.get(LittleEndian) >= (start + bytes) as u64
    };
    let room = kernel.get(start..start + bytes);
    room.is_some_and(|room| room.iter().all(|byte| *byte == 0)) && segments.iter().all(is_free)
}

/// `segment` without the zeros at its end; `None` if it does not lie in the file, or its memory has no room for
/// what does.
fn trimmed(kernel: &[u8], segment: &Segment) -> Option<Segment> {
    let contents = contents(kernel, segment)?;
    if segment.p_type.get(LittleEndian) != PT_LOAD {
        return Some(*segment);
    }
    if segment.p_memsz.get(LittleEndian) < contents.len() as u64 {
        return None;
    }
    // Loaders take no notice of a segment of which the file has nothing, not even of where it ends.
    let last = contents.iter().rposition(|byte| *byte != 0).unwrap_or(0);
    let size = contents.len().min(last + 1) as u64;
    Some(Segment { p_filesz: U64::new(LittleEndian, size), ..*segment })
}

/// `segment` in pieces, one up to the end of each hole.
fn pieces(kernel: &[u8], segment: &Segment) -> Vec<Segment> {
    let of = |field: U64<LittleEndian>| field.get(LittleEndian);
    let is_code = segment.p_type.get(LittleEndian) == PT_LOAD
        && segment.p_flags.get(LittleEndian) & PF_X != 0;
    let Some(contents) = contents(kernel, segment).filter(|_| is_code) else {
        return vec![*segment];
    };
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut add = |start: usize, file_end: usize, memory_end: u64| {
        let start = start as u64;
        let moved = |field| U64::new(LittleEndian, of(field) + start);
        pieces.push(Segment {
            p_offset: moved(segment.p_offset),
            p_vaddr: moved(segment.p_vaddr),
            p_paddr: moved(segment.p_paddr),
            p_filesz: U64::new(LittleEndian, file_end as u64 - start),
            p_memsz: U64::new(LittleEndian, memory_end - start),
            ..*segment
        });
    };
    for (from, to) in holes(contents) {
        add(start, from, to as u64);
        start = to;
    }
    add(start, contents.len(), of(segment.p_memsz));
    pieces
}

/// Where in `contents`, which begin with a page, there are many pages of filler, but for the beginning and the
/// end.
fn holes(contents: &[u8]) -> Vec<(usize, usize)> {
    let is_filler = |page: &[u8]| page.iter().all(|byte| *byte == FILLER);
    let mut holes = Vec::new();
    let mut at = 0;
    for run in contents
        .chunks(PAGE_BYTES)
        .collect::<Vec<_>>()
        .chunk_by(|a, b| is_filler(a) == is_filler(b))
    {
        let end = at + run.iter().map(|page| page.len()).sum::<usize>();
        let is_within = at > 0 && end < contents.len();
        if is_within && run.len() >= HOLE_PAGES && is_filler(run[0]) {
            holes.push((at, end));
        }
        at = end;
    }
    holes
}

/// What the file has of `segment`; `None` if it does not lie in the file.
fn contents<'k>(kernel: &'k [u8], segment: &Segment) -> Option<&'k [u8]> {
    let start = usize::try_from(segment.p_offset.get(LittleEndian)).ok()?;
    let size = usize::try_from(segment.p_filesz.get(LittleEndian)).ok()?;
    kernel.get(start..start.checked_add(size)?)
}

#[cfg(test)]
pub mod testing {
    use super::*;
    use object::elf::{ELFCLASS64, ELFDATA2LSB, ELFMAG, EV_CURRENT, Ident};
    use object::pod::bytes_of;
    use object::{U16, U32};
    use std::mem::size_of;

    pub const E: LittleEndian = LittleEndian;
    pub const HEADER: usize = size_of::<FileHeader64<LittleEndian>>();
    pub const SEGMENT: usize = size_of::<Segment>();
    /// Where the contents begin.
    pub const CONTENTS: usize = 1 << 10;

    /// An ELF file with a segment of type `kind` for each of `segments`, whose contents these are, from
    /// 1 KiB on.
    pub fn kernel(segments: &[(u32, &[u8])]) -> Vec<u8> {
        let flags = |kind| if kind == PT_LOAD { PF_X } else { 0 };
        let header = FileHeader64 {
            e_ident: Ident {
                magic: ELFMAG,
                class: ELFCLASS64,
                data: ELFDATA2LSB,
                version: EV_CURRENT,
                os_abi: 0,
                abi_version: 0,
                padding: [0; 7],
            },
            e_type: U16::default(),
            e_machine: U16::default(),
            e_version: U32::new(E, EV_CURRENT.into()),
            e_entry: U64::default(),
            e_phoff: U64::new(E, HEADER as u64),
            e_shoff: U64::default(),
            e_flags: U32::default(),
            e_ehsize: U16::new(E, HEADER.try_into().unwrap()),
            e_phentsize: U16::new(E, SEGMENT.try_into().unwrap()),
            e_phnum: U16::new(E, segments.len().try_into().unwrap()),
            e_shentsize: U16::default(),
            e_shnum: U16::default(),
            e_shstrndx: U16::default(),
        };
        let mut file = bytes_of(&header).to_vec();
        let mut offset = CONTENTS;
        for (kind, contents) in segments {
            let size = U64::new(E, contents.len() as u64);
            let segment = ProgramHeader64 {
                p_type: U32::new(E, *kind),
                p_flags: U32::new(E, flags(*kind)),
                p_offset: U64::new(E, offset as u64),
                p_vaddr: U64::new(E, 0x1000_0000 + offset as u64),
                p_paddr: U64::new(E, offset as u64),
                p_filesz: size,
                p_memsz: size,
                p_align: U64::default(),
            };
            file.extend(bytes_of(&segment));
            offset += contents.len();
        }
        file.resize(CONTENTS, 0);
        segments.iter().for_each(|(_, contents)| file.extend(*contents));
        file
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{CONTENTS, E, HEADER, SEGMENT, kernel};
    use super::*;
    use object::elf::PT_NOTE;

    fn segments(kernel: &[u8]) -> Vec<Segment> {
        let header = FileHeader64::<LittleEndian>::parse(kernel).unwrap();
        header.program_headers(E, kernel).unwrap().to_vec()
    }

    /// What each segment takes of the file and of memory.
    fn sizes(kernel: &[u8]) -> Vec<(u64, u64)> {
        let sizes = |segment: &Segment| (segment.p_filesz.get(E), segment.p_memsz.get(E));
        segments(kernel).iter().map(sizes).collect()
    }

    /// What a loader puts into memory, which begins at the address of the first segment.
    fn loaded(kernel: &[u8], bytes: usize) -> Vec<u8> {
        let mut memory = vec![0; bytes];
        for segment in segments(kernel).iter().filter(|segment| segment.p_type.get(E) == PT_LOAD) {
            let at = usize::try_from(segment.p_paddr.get(E)).unwrap() - CONTENTS;
            let contents = contents(kernel, segment).unwrap();
            memory[at..at + contents.len()].copy_from_slice(contents);
            assert_eq!(segment.p_vaddr.get(E), segment.p_paddr.get(E) + 0x1000_0000);
        }
        memory
    }

    #[test]
    fn zeros_at_the_end_of_what_is_loaded_stay_in_memory_alone() {
        let mut kernel = kernel(&[
            (PT_LOAD, b"text"),
            (PT_LOAD, b"da\0ta\0\0\0"),
            (PT_LOAD, &[0; 9]),
            (PT_NOTE, b"note\0"),
        ]);
        let contents = kernel[CONTENTS..].to_vec();

        leave_filler_out(&mut kernel).unwrap();

        assert_eq!(sizes(&kernel), [(4, 4), (5, 8), (1, 9), (5, 5)]);
        assert_eq!(kernel[CONTENTS..], contents);
    }

    fn code_with(hole_pages: usize) -> Vec<u8> {
        let [page, filler] = [b'c', FILLER].map(|byte| vec![byte; PAGE_BYTES]);
        let hole = filler.repeat(hole_pages);
        [&page, &hole, &page, &*filler, &page, &hole, &page[..100]].concat()
    }

    #[test]
    fn long_filler_within_code_is_not_loaded() {
        let code = code_with(HOLE_PAGES);
        let mut kernel = kernel(&[(PT_LOAD, &code), (PT_NOTE, b"note")]);

        leave_filler_out(&mut kernel).unwrap();

        let [page, hole] = [1, HOLE_PAGES].map(|pages| (pages * PAGE_BYTES) as u64);
        let expected = [(page, page + hole), (3 * page, 3 * page + hole), (100, 100), (4, 4)];
        assert_eq!(sizes(&kernel), expected);
        let mut memory = code.clone();
        for (from, to) in holes(&code) {
            memory[from..to].fill(0);
        }
        assert_eq!(loaded(&kernel, code.len()), memory);
    }

    #[test]
    fn what_is_no_long_filler_is_loaded() {
        let short = code_with(HOLE_PAGES - 1);
        let at_the_ends = [vec![FILLER; HOLE_PAGES * PAGE_BYTES], vec![1; PAGE_BYTES]].concat();
        let reversed: Vec<_> = at_the_ends.iter().rev().copied().collect();

        for code in [short, at_the_ends, reversed] {
            let mut kernel = kernel(&[(PT_LOAD, &code)]);
            let before = kernel.clone();

            leave_filler_out(&mut kernel).unwrap();

            assert!(kernel == before);
        }
    }

    #[test]
    fn filler_stays_where_there_is_no_room_for_more_headers() {
        let mut kernel = kernel(&[(PT_LOAD, &code_with(HOLE_PAGES))]);
        kernel[HEADER + 2 * SEGMENT] = 1;
        let before = kernel.clone();

        leave_filler_out(&mut kernel).unwrap();

        assert!(kernel == before);
    }

    #[test]
    fn a_segment_beyond_the_file_is_refused() {
        let whole = kernel(&[(PT_LOAD, b"text")]);

        for length in 0..whole.len() {
            assert!(leave_filler_out(&mut whole[..length].to_vec()).is_err(), "{length}");
        }
    }
}
