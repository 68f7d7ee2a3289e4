//! The compressed forms in which Debian ships kernels and modules, told apart by their first bytes.

use std::io::{self, Read};

const ELF: &[u8] = b"\x7fELF";
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Every block of the legacy lz4 form but the last holds this much when unpacked, in bytes.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// No kernel or module comes near this size; past it the input is broken, in bytes.
const LARGEST: u64 = 512 << 20;

/// Slow to write, fast to read: an initrd is packed once and unpacked at every boot.
const ZSTD_LEVEL: i32 = 19;

/// Why some data could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the forms known here.
    #[error(
        "unknown compression, first bytes {first_bytes:02x?}: expected ELF, lz4, xz or zstd data"
    )]
    Unknown {
        /// What the data starts with.
        first_bytes: Vec<u8>,
    },
    /// A known form, damaged.
    #[error("broken {form} data")]
    Broken {
        /// Name of the form.
        form: &'static str,
        /// What its decoder says.
        #[source]
        source: io::Error,
    },
    /// Larger than anything that belongs in a guest image.
    #[error("unpacks to more than {} MiB", LARGEST >> 20)]
    TooLarge,
}

/// Unpacks `data`; an ELF file is returned as it is.
pub fn decompress(data: &[u8]) -> Result<Vec<u8>, Error> {
    if data.starts_with(ELF) {
        Ok(data.to_vec())
    } else if let Some(blocks) = data.strip_prefix(LZ4_LEGACY) {
        lz4_legacy(blocks)
    } else if data.starts_with(XZ) {
        read_all("xz", lzma_rust2::XzReader::new(data, false))
    } else if data.starts_with(ZSTD) {
        let broken = |source| Error::Broken { form: "zstd", source };
        read_all("zstd", zstd::Decoder::with_buffer(data).map_err(broken)?.single_frame())
    } else {
        Err(Error::Unknown { first_bytes: data.iter().take(6).copied().collect() })
    }
}

/// Packs `data` as zstd with a checksum; the same data gives the same bytes.
pub fn compress_zstd(data: &[u8]) -> io::Result<Vec<u8>> {
    zstd::encode_all(data, ZSTD_LEVEL)
}

fn read_all(form: &'static str, reader: impl Read) -> Result<Vec<u8>, Error> {
    let mut unpacked = Vec::new();
    let length = reader
        .take(LARGEST + 1)
        .read_to_end(&mut unpacked)
        .map_err(|source| Error::Broken { form, source })?;
    if length as u64 > LARGEST { Err(Error::TooLarge) } else { Ok(unpacked) }
}

/// The form that `lz4 -l` writes: little-endian lengths, each before its block, and no end mark.
fn lz4_legacy(mut blocks: &[u8]) -> Result<Vec<u8>, Error> {
    let broken = |source| Error::Broken { form: "lz4", source };
    let mut unpacked = Vec::new();
    let mut buffer = vec![0; LZ4_LEGACY_BLOCK];
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block =
            rest.get(..length).ok_or_else(|| broken(io::ErrorKind::UnexpectedEof.into()))?;
        let written = lz4_flex::block::decompress_into(block, &mut buffer).map_err(|error| {
            broken(io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
        })?;
        unpacked.extend_from_slice(&buffer[..written]);
        if unpacked.len() as u64 > LARGEST {
            return Err(Error::TooLarge);
        }
        blocks = &rest[length..];
    }
    Ok(unpacked)
}

#[cfg(test)]
pub(crate) mod testing {
    //! What packs the samples of the tests.

    /// Packs `data` in the legacy lz4 form, each block as literals only.
    pub fn lz4_legacy(data: &[u8]) -> Vec<u8> {
        let mut packed = super::LZ4_LEGACY.to_vec();
        for chunk in data.chunks(super::LZ4_LEGACY_BLOCK) {
            let block = literals(chunk);
            packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    /// One lz4 sequence of literals: a token, the length in 255s, the bytes.
    fn literals(data: &[u8]) -> Vec<u8> {
        let rest = data.len().checked_sub(15).expect("the samples are longer than a token holds");
        let mut block = vec![0xf0];
        block.extend(std::iter::repeat_n(255, rest / 255));
        block.push(u8::try_from(rest % 255).unwrap());
        block.extend_from_slice(data);
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] = b"\x7fELF and then some more bytes to pack";

    /// `SAMPLE` as `xz --check=crc32 --x86 --lzma2` packs it: the filters of a kernel build.
    const SAMPLE_XZ: &[u8] = &[
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04,
        0x00, 0x21, 0x01, 0x16, 0x00, 0x0d, 0x86, 0x35, 0x1f, 0x01, 0x00, 0x24, 0x7f, 0x45, 0x4c,
        0x46, 0x20, 0x61, 0x6e, 0x64, 0x20, 0x74, 0x68, 0x65, 0x6e, 0x20, 0x73, 0x6f, 0x6d, 0x65,
        0x20, 0x6d, 0x6f, 0x72, 0x65, 0x20, 0x62, 0x79, 0x74, 0x65, 0x73, 0x20, 0x74, 0x6f, 0x20,
        0x70, 0x61, 0x63, 0x6b, 0x00, 0x00, 0x00, 0x00, 0xe7, 0x76, 0x5e, 0xf9, 0x00, 0x01, 0x39,
        0x25, 0xd6, 0xec, 0x06, 0x65, 0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x01,
        0x59, 0x5a,
    ];

    #[test]
    fn an_elf_file_is_left_alone() {
        assert_eq!(decompress(SAMPLE).unwrap(), SAMPLE);
    }

    #[test]
    fn zstd_data_survives_the_round_trip() {
        let packed = compress_zstd(SAMPLE).unwrap();

        assert_eq!(decompress(&packed).unwrap(), SAMPLE);
    }

    #[test]
    fn xz_data_with_the_x86_filter_is_unpacked() {
        assert_eq!(decompress(SAMPLE_XZ).unwrap(), SAMPLE);
    }

    #[test]
    fn lz4_data_of_several_blocks_is_unpacked() {
        let data: Vec<u8> = SAMPLE.iter().copied().cycle().take(LZ4_LEGACY_BLOCK + 100).collect();

        assert_eq!(decompress(&testing::lz4_legacy(&data)).unwrap(), data);
    }

    #[test]
    fn a_cut_off_lz4_block_is_an_error() {
        let mut packed = testing::lz4_legacy(SAMPLE);
        packed.pop();

        assert!(matches!(decompress(&packed), Err(Error::Broken { form: "lz4", .. })));
    }

    #[test]
    fn unknown_data_is_named_by_its_first_bytes() {
        let error = decompress(b"\x1f\x8b\x08").unwrap_err();

        assert_eq!(
            error.to_string(),
            "unknown compression, first bytes [1f, 8b, 08]: expected ELF, lz4, xz or zstd data"
        );
    }
}
