//! Kernel and initrd into guest memory: an Image, as it is or in gzip
//! (Documentation/arch/arm64/booting.rst).
#![cfg(target_arch = "aarch64")]

use std::fs::File;
use std::io::{self, Read, Seek};

use flate2::read::GzDecoder;
use linux_loader::loader::pe::arm64_image_header;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;
use crate::machine::{BootFiles, Entry, Protocol};
use crate::{ArchError, initrd};

const ACCEPTED: &str = "an arm64 Image, which may be packed with gzip";

const GZIP: [u8; 2] = [0x1f, 0x8b];
/// "ARM\x64" as a little-endian number.
const MAGIC: u32 = 0x644d_5241;
/// Of the header's flags: the kernel is big-endian.
const BIG_ENDIAN: u64 = 1;
/// Where a kernel from before 3.17 starts, which says nothing of its size.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;
/// What is unpacked at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// A kernel file, however it is packed.
enum Kernel<'a> {
    Plain(&'a mut File),
    Packed(GzDecoder<&'a mut File>),
}

/// Loads what `boot` names.
pub fn load(memory: &GuestMemoryMmap, boot: &mut BootFiles) -> Result<Entry, ArchError> {
    if boot.protocol == Some(Protocol::Pvh) {
        let found = "whatever it is, this processor has no PVH";
        return Err(ArchError::NotAKernel { found, accepted: ACCEPTED });
    }
    let ram_end = memory.find_region(layout::RAM).map_or(0, |ram| layout::RAM.0 + ram.len());
    let mut kernel = Kernel::open(&mut boot.kernel)?;
    let (start, size) = place(&kernel.header()?)?;
    check_room(start, size, ram_end)?;
    let end = kernel.load(memory, start, ram_end)?.max(start.0 + size);
    let room = end..ram_end.min(layout::INITRD_END);
    let initrd = boot.initrd.as_mut().map(|file| initrd::load(memory, file, &room)).transpose()?;
    Ok(Entry { address: start, initrd, protocol: Protocol::Linux })
}

/// Where the Image with this `header` starts, and how many bytes it occupies from there on.
fn place(header: &arm64_image_header) -> Result<(GuestAddress, u64), ArchError> {
    let refuse = |found| Err(ArchError::NotAKernel { found, accepted: ACCEPTED });
    if u32::from_le(header.magic) != MAGIC {
        return refuse("a file without the mark of an arm64 Image");
    }
    if u64::from_le(header.flags) & BIG_ENDIAN != 0 {
        return refuse("a big-endian Image");
    }
    let size = u64::from_le(header.image_size);
    let offset = if size == 0 { OLD_TEXT_OFFSET } else { u64::from_le(header.text_offset) };
    match layout::KERNEL.0.checked_add(offset) {
        Some(start) => Ok((GuestAddress(start), size)),
        None => refuse("an Image that starts nowhere"),
    }
}

impl<'a> Kernel<'a> {
    fn open(file: &'a mut File) -> Result<Self, ArchError> {
        let mut head = [0; GZIP.len()];
        let length =
            file.rewind().and_then(|()| read_up_to(file, &mut head)).map_err(unreadable)?;
        if head[..length] == GZIP { Self::packed(file) } else { Ok(Self::Plain(file)) }
    }

    fn packed(file: &'a mut File) -> Result<Self, ArchError> {
        file.rewind().map_err(unreadable)?;
        Ok(Self::Packed(GzDecoder::new(file)))
    }

    /// The Image's header, from the start of the file; what comes next is read by [`Kernel::load`].
    fn header(&mut self) -> Result<arm64_image_header, ArchError> {
        let mut header = arm64_image_header::default();
        let length = match self {
            Self::Plain(file) => {
                file.rewind().and_then(|()| read_up_to(file, header.as_mut_slice()))
            }
            Self::Packed(file) => read_up_to(file, header.as_mut_slice()),
        };
        if length.map_err(unreadable)? < size_of_val(&header) {
            let found = "a file too short for a kernel";
            return Err(ArchError::NotAKernel { found, accepted: ACCEPTED });
        }
        Ok(header)
    }

    /// Puts the whole Image at `start`, and says where the file ends there.
    fn load(
        self,
        memory: &GuestMemoryMmap,
        start: GuestAddress,
        ram_end: u64,
    ) -> Result<u64, ArchError> {
        match self {
            Self::Plain(file) => {
                let size = file.metadata().map_err(unreadable)?.len();
                check_room(start, size, ram_end)?;
                file.rewind().map_err(unreadable)?;
                let length = usize::try_from(size).expect("it fits in RAM");
                memory.read_exact_volatile_from(start, file, length).map_err(|error| {
                    unreadable(io::Error::new(io::ErrorKind::UnexpectedEof, error))
                })?;
                Ok(start.0 + size)
            }
            Self::Packed(file) => unpack(file.into_inner(), memory, start, ram_end),
        }
    }
}

/// Unpacks `file` to `start`, as far as there is RAM, and says where it ends.
fn unpack(
    file: &mut File,
    memory: &GuestMemoryMmap,
    start: GuestAddress,
    ram_end: u64,
) -> Result<u64, ArchError> {
    file.rewind().map_err(unreadable)?;
    let mut unpacked = GzDecoder::new(file);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut size = 0;
    loop {
        let length = read_up_to(&mut unpacked, &mut chunk).map_err(unreadable)?;
        if length == 0 {
            return Ok(start.0 + size);
        }
        check_room(start, size + length as u64, ram_end)?;
        let at = GuestAddress(start.0 + size);
        memory.write_slice(&chunk[..length], at).map_err(ArchError::memory("the kernel", at))?;
        size += length as u64;
    }
}

fn check_room(start: GuestAddress, size: u64, ram_end: u64) -> Result<(), ArchError> {
    let end = start.0.saturating_add(size);
    if end <= ram_end {
        return Ok(());
    }
    let mib = |address: u64| address.saturating_sub(layout::RAM.0).div_ceil(1 << 20);
    Err(ArchError::KernelTooBig { needed_mib: mib(end), ram_mib: mib(ram_end) })
}

/// Fills `bytes`, unless the end comes first; returns how many there were.
fn read_up_to(file: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < bytes.len() {
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn unreadable(source: io::Error) -> ArchError {
    ArchError::Read { what: "kernel", source }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    const RAM: usize = 8 << 20;
    /// What a kernel can occupy of it, in bytes.
    const ROOM: u64 = RAM as u64 - (layout::KERNEL.0 - layout::RAM.0);

    /// An Image of 64 KiB that occupies `size` bytes.
    fn image(size: u64) -> Vec<u8> {
        let mut image = vec![0; 64 << 10];
        image[16..24].copy_from_slice(&size.to_le_bytes());
        image[56..60].copy_from_slice(&MAGIC.to_le_bytes());
        *image.last_mut().unwrap() = 7;
        image
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn load_files(
        kernel: &[u8],
        initrd: Option<&[u8]>,
    ) -> Result<(Entry, GuestMemoryMmap), ArchError> {
        let memory = GuestMemoryMmap::from_ranges(&[(layout::RAM, RAM)]).unwrap();
        let initrd = initrd.map(file);
        let mut boot = BootFiles { kernel: file(kernel), initrd, protocol: None };
        load(&memory, &mut boot).map(|entry| (entry, memory))
    }

    #[test]
    fn an_image_is_loaded_whole_however_it_is_packed() {
        for kernel in [image(1 << 20), gzip(&image(1 << 20))] {
            let (entry, memory) = load_files(&kernel, None).unwrap();

            let last = GuestAddress(layout::KERNEL.0 + (64 << 10) - 1);
            assert_eq!(entry.address, layout::KERNEL);
            assert_eq!(memory.read_obj::<u8>(last).unwrap(), 7);
        }
    }

    #[test]
    fn an_initrd_lies_at_the_top_of_ram() {
        let (entry, _) = load_files(&image(1 << 20), Some(&[7; 5000])).unwrap();

        let top = layout::RAM.0 + RAM as u64;
        assert_eq!(entry.initrd, Some((GuestAddress(top - 0x2000), 5000)));
    }

    #[test]
    fn an_initrd_that_would_lie_in_the_kernels_memory_is_refused() {
        let kernel = image(ROOM - 0x1000);

        let error = load_files(&kernel, Some(&[7; 5000])).unwrap_err();

        assert!(matches!(error, ArchError::InitrdTooBig { size: 5000 }));
    }

    #[test]
    fn a_kernel_that_occupies_more_than_ram_is_refused() {
        for size in [ROOM + 1, u64::MAX] {
            let error = load_files(&image(size), None).unwrap_err();

            assert!(matches!(error, ArchError::KernelTooBig { .. }), "{error}");
        }
    }

    #[test]
    fn a_kernel_that_unpacks_to_more_than_ram_is_refused() {
        let mut kernel = image(1 << 20);
        kernel.resize(RAM, 0);

        let error = load_files(&gzip(&kernel), None).unwrap_err();

        assert!(matches!(error, ArchError::KernelTooBig { .. }));
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let mut big_endian = image(1 << 20);
        big_endian[24] = 1;

        for kernel in [&b""[..], b"#!/bin/sh\n", &gzip(b"text"), &[0; 4096], &big_endian] {
            assert!(matches!(load_files(kernel, None), Err(ArchError::NotAKernel { .. })));
        }
    }

    #[test]
    fn a_packed_kernel_that_is_cut_off_cannot_be_read() {
        let kernel = gzip(&image(1 << 20));

        let error = load_files(&kernel[..kernel.len() / 2], None).err();

        assert!(matches!(error, Some(ArchError::Read { .. } | ArchError::NotAKernel { .. })));
    }

    #[test]
    fn an_image_whose_offset_overflows_is_refused() {
        let mut kernel = image(1 << 20);
        kernel[8..16].copy_from_slice(&u64::MAX.to_le_bytes());

        assert!(matches!(load_files(&kernel, None), Err(ArchError::NotAKernel { .. })));
    }
}
