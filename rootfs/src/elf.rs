//! What an ELF kernel need not carry.

use object::elf::{FileHeader64, PT_LOAD, ProgramHeader64};
use object::pod::slice_from_bytes_mut;
use object::read::elf::FileHeader;
use object::{LittleEndian, U64};

/// A header that cannot be: the error of [`leave_zeros_out`].
#[derive(Debug, thiserror::Error)]
#[error("not a 64-bit little-endian ELF file whose program headers describe what it holds")]
pub struct Malformed;

/// Takes the zeros at the end of each segment out of what is loaded of `kernel`: the memory of a new
/// guest is zeros, and to write some there takes time and memory of the host. Debian's kernel has 11 MiB
/// of them, because a section that is not empty to the linker follows its bss.
///
/// The file keeps its size, and a segment its size in memory (System V ABI, "Program Header").
pub fn leave_zeros_out(kernel: &mut [u8]) -> Result<(), Malformed> {
    let header = FileHeader64::<LittleEndian>::parse(&*kernel).map_err(|_| Malformed)?;
    let endian = header.endian().map_err(|_| Malformed)?;
    let segments = header.program_headers(endian, &*kernel).map_err(|_| Malformed)?;
    let sizes: Vec<_> = segments
        .iter()
        .map(|segment| trimmed_size(kernel, segment).ok_or(Malformed))
        .collect::<Result<_, _>>()?;
    let first = usize::try_from(header.e_phoff.get(endian)).map_err(|_| Malformed)?;
    let headers = kernel.get_mut(first..).ok_or(Malformed)?;
    let (segments, _) = slice_from_bytes_mut::<ProgramHeader64<LittleEndian>>(headers, sizes.len())
        .map_err(|()| Malformed)?;
    for (segment, size) in segments.iter_mut().zip(sizes) {
        segment.p_filesz = U64::new(endian, size);
    }
    Ok(())
}

/// How much of the file a segment needs, in bytes; `None` if it does not lie in the file.
fn trimmed_size(kernel: &[u8], segment: &ProgramHeader64<LittleEndian>) -> Option<u64> {
    let size = segment.p_filesz.get(LittleEndian);
    if segment.p_type.get(LittleEndian) != PT_LOAD {
        return Some(size);
    }
    let start = usize::try_from(segment.p_offset.get(LittleEndian)).ok()?;
    let end = start.checked_add(usize::try_from(size).ok()?)?;
    let contents = kernel.get(start..end)?;
    let last = contents.iter().rposition(|byte| *byte != 0);
    // Loaders take no notice of a segment of which the file has nothing, not even of where it ends.
    Some(last.map_or(size.min(1), |last| last as u64 + 1))
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
    pub const SEGMENT: usize = size_of::<ProgramHeader64<LittleEndian>>();

    /// An ELF file with a segment of type `kind` for each of `segments`, whose contents these are.
    pub fn kernel(segments: &[(u32, &[u8])]) -> Vec<u8> {
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
        let mut offset = HEADER + segments.len() * SEGMENT;
        for (kind, contents) in segments {
            let size = U64::new(E, contents.len() as u64);
            let segment = ProgramHeader64 {
                p_type: U32::new(E, *kind),
                p_flags: U32::default(),
                p_offset: U64::new(E, offset as u64),
                p_vaddr: U64::default(),
                p_paddr: U64::default(),
                p_filesz: size,
                p_memsz: size,
                p_align: U64::default(),
            };
            file.extend(bytes_of(&segment));
            offset += contents.len();
        }
        segments.iter().for_each(|(_, contents)| file.extend(*contents));
        file
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{E, HEADER, SEGMENT, kernel};
    use super::*;
    use object::elf::PT_NOTE;
    use object::pod::from_bytes;

    /// What each segment takes of the file and of memory.
    fn sizes(kernel: &[u8], count: usize) -> Vec<(u64, u64)> {
        let size = |index| {
            let at = HEADER + index * SEGMENT;
            let (segment, _) = from_bytes::<ProgramHeader64<LittleEndian>>(&kernel[at..]).unwrap();
            (segment.p_filesz.get(E), segment.p_memsz.get(E))
        };
        (0..count).map(size).collect()
    }

    #[test]
    fn zeros_at_the_end_of_what_is_loaded_stay_in_memory_alone() {
        let mut kernel = kernel(&[
            (PT_LOAD, b"text"),
            (PT_LOAD, b"da\0ta\0\0\0"),
            (PT_LOAD, &[0; 9]),
            (PT_NOTE, b"note\0"),
        ]);
        let contents = kernel[HEADER + 4 * SEGMENT..].to_vec();

        leave_zeros_out(&mut kernel).unwrap();

        assert_eq!(sizes(&kernel, 4), [(4, 4), (5, 8), (1, 9), (5, 5)]);
        assert_eq!(kernel[HEADER + 4 * SEGMENT..], contents);
    }

    #[test]
    fn a_segment_beyond_the_file_is_refused() {
        let whole = kernel(&[(PT_LOAD, b"text")]);

        for length in 0..whole.len() {
            assert!(leave_zeros_out(&mut whole[..length].to_vec()).is_err(), "{length}");
        }
    }
}
