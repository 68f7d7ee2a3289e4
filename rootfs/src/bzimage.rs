//! Takes the ELF kernel out of a bzImage, so that a guest need not unpack it at every boot.
//!
//! The layout is the kernel's `Documentation/arch/x86/boot.rst`.

use crate::compression;

const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The first boot protocol that says where the payload is.
const VERSION_WITH_PAYLOAD: u16 = 0x0208;
const SECTOR_BYTES: usize = 512;

/// What a header of zero setup sectors means, by tradition.
const DEFAULT_SETUP_SECTORS: usize = 4;

const ELF: &[u8] = b"\x7fELF";

/// Why a file is not a kernel that could be taken out of its wrapping.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither an ELF file nor a bzImage.
    #[error("not a kernel: neither an ELF file nor a bzImage of boot protocol 2.08 or later")]
    NotAKernel,
    /// The header points outside the file.
    #[error("the header places the payload at {offset} + {length} bytes, past the end of the file")]
    PayloadOutside {
        /// Where the payload would start in the file, in bytes.
        offset: usize,
        /// How long it would be, in bytes.
        length: usize,
    },
    /// The payload does not unpack.
    #[error("unpack the payload")]
    Decompress(#[from] compression::Error),
    /// It unpacks to something else than the header of the payload announces.
    #[error("the payload unpacks to {actual} bytes instead of {announced}")]
    WrongSize {
        /// Length after unpacking, in bytes.
        actual: usize,
        /// Length that the kernel build recorded, in bytes.
        announced: usize,
    },
    /// The payload is too short to end with its length.
    #[error("the payload is empty")]
    Empty,
    /// It unpacks to something else than an ELF file.
    #[error("the payload is not an ELF file")]
    NotElf,
}

/// The ELF kernel within `image`, which is a bzImage or already that kernel.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>, Error> {
    if image.starts_with(ELF) {
        return Ok(image.to_vec());
    }
    let payload = payload(image)?;
    // The build appends the unpacked length to every form that does not carry it itself.
    let (packed, announced) = payload.split_last_chunk::<4>().ok_or(Error::Empty)?;
    let kernel = compression::decompress(packed)?;
    let announced = u32::from_le_bytes(*announced) as usize;
    if kernel.len() != announced {
        return Err(Error::WrongSize { actual: kernel.len(), announced });
    }
    if !kernel.starts_with(ELF) {
        return Err(Error::NotElf);
    }
    Ok(kernel)
}

fn payload(image: &[u8]) -> Result<&[u8], Error> {
    let version = bytes(image, VERSION).map(u16::from_le_bytes);
    if bytes(image, MAGIC) != Some(*b"HdrS") || version < Some(VERSION_WITH_PAYLOAD) {
        return Err(Error::NotAKernel);
    }
    let number = |at| bytes(image, at).map(u32::from_le_bytes).ok_or(Error::NotAKernel);
    let (offset, length) = (number(PAYLOAD_OFFSET)? as usize, number(PAYLOAD_LENGTH)? as usize);
    let setup_sectors = match image[SETUP_SECTORS] {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => usize::from(sectors),
    };
    let offset = (setup_sectors + 1) * SECTOR_BYTES + offset;
    image
        .get(offset..)
        .and_then(|rest| rest.get(..length))
        .ok_or(Error::PayloadOutside { offset, length })
}

fn bytes<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::testing::lz4_legacy;
    use crate::elf;
    use object::elf::PT_LOAD;

    const PAYLOAD_AT: u32 = 100;

    fn kernel() -> Vec<u8> {
        elf::testing::kernel(&[(PT_LOAD, b"the kernel itself")])
    }

    /// A bzImage with two setup sectors whose payload is `packed`.
    fn image(packed: &[u8], unpacked_length: usize) -> Vec<u8> {
        let mut payload = packed.to_vec();
        payload.extend(u32::try_from(unpacked_length).unwrap().to_le_bytes());
        let mut image = vec![0; 3 * SECTOR_BYTES + PAYLOAD_AT as usize];
        image[SETUP_SECTORS] = 2;
        image[MAGIC..][..4].copy_from_slice(b"HdrS");
        image[VERSION..][..2].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&PAYLOAD_AT.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image.extend(b"what follows the payload");
        image
    }

    #[test]
    fn the_payload_is_unpacked() {
        let image = image(&lz4_legacy(&kernel()), kernel().len());

        assert_eq!(vmlinux(&image).unwrap(), kernel());
    }

    #[test]
    fn an_elf_kernel_is_taken_as_it_is() {
        assert_eq!(vmlinux(&kernel()).unwrap(), kernel());
    }

    #[test]
    fn a_wrong_length_is_noticed() {
        let image = image(&lz4_legacy(&kernel()), kernel().len() + 1);

        assert!(matches!(vmlinux(&image), Err(Error::WrongSize { .. })));
    }

    #[test]
    fn a_payload_past_the_end_is_noticed() {
        let mut image = image(&lz4_legacy(&kernel()), kernel().len());
        image.truncate(image.len() - kernel().len());

        assert!(matches!(vmlinux(&image), Err(Error::PayloadOutside { .. })));
    }

    #[test]
    fn a_payload_that_is_no_elf_file_is_refused() {
        let text = b"a text that is long enough to be packed";
        let image = image(&lz4_legacy(text), text.len());

        assert!(matches!(vmlinux(&image), Err(Error::NotElf)));
    }

    #[test]
    fn a_text_file_is_not_a_kernel() {
        assert!(matches!(vmlinux(b"hello"), Err(Error::NotAKernel)));
    }

    #[test]
    fn every_cut_of_an_image_is_an_error_and_no_panic() {
        let image = image(&lz4_legacy(&kernel()), kernel().len());

        let cut = image.len() - b"what follows the payload".len() - 1;

        assert!((0..=cut).all(|length| vmlinux(&image[..length]).is_err()));
    }
}
