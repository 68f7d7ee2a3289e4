//! Kernel and initrd into guest memory: an ELF kernel or a bzImage, entered in 64-bit mode or by PVH.
#![cfg(target_arch = "x86_64")]

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{ByteValued, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;
use super::tables::zero_page;
use super::vcpu::segments;
use crate::kernel_file::KernelFile;
use crate::machine::{BootFiles, Entry, Protocol};
use crate::{ArchError, initrd, small_pages};

const ACCEPTED: &str = "an x86_64 ELF vmlinux and a 64-bit bzImage";
const ACCEPTED_BY_PVH: &str = "an x86_64 ELF kernel with a PVH note (CONFIG_PVH of Linux)";

/// From the start of a bzImage's protected-mode code to its 64-bit entry
/// (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;
/// `xloadflags` came with this version of the boot protocol.
const PROTOCOL_2_12: u16 = 0x20c;

/// Highest address of an initrd for a vmlinux, which has no header to say: what every bzImage made
/// from one says.
const VMLINUX_INITRD_MAX: u64 = 0x7fff_ffff;

#[derive(Debug, PartialEq, Eq)]
enum Format {
    Elf,
    BzImage,
}

/// A kernel that is in guest memory.
struct Loaded {
    entry: GuestAddress,
    protocol: Protocol,
    /// First address that the kernel leaves alone while it starts.
    end: u64,
    /// Last address an initrd may occupy.
    initrd_max: u64,
    header: setup_header,
}

/// Loads what `boot` names, and what the first vCPU needs to run it.
pub fn load(memory: &GuestMemoryMmap, boot: &mut BootFiles) -> Result<Entry, ArchError> {
    let ram_end = memory.find_region(layout::HIGH_RAM).map_or(0, |ram| ram.len());
    let mut file = KernelFile::open(&boot.kernel)
        .map_err(|source| ArchError::Read { what: "kernel", source })?;
    let kernel = match identify(file.head())? {
        Format::Elf => load_elf(memory, &mut file, ram_end, boot.protocol)?,
        Format::BzImage if boot.protocol == Some(Protocol::Pvh) => {
            let found = "a bzImage, which is not entered by PVH";
            return Err(ArchError::NotAKernel { found, accepted: ACCEPTED_BY_PVH });
        }
        Format::BzImage => load_bzimage(memory, &mut file, ram_end)?,
    };
    if kernel.end > ram_end {
        return Err(ArchError::KernelTooBig {
            needed_mib: kernel.end.div_ceil(1 << 20),
            ram_mib: ram_end >> 20,
        });
    }
    let room = kernel.end..ram_end.min(kernel.initrd_max.saturating_add(1));
    let initrd = boot.initrd.as_mut().map(|file| initrd::load(memory, file, &room)).transpose()?;
    zero_page::write_header(memory, kernel.header.as_slice())?;
    segments::write(memory)?;
    Ok(Entry { address: kernel.entry, initrd, protocol: kernel.protocol })
}

/// The format of the file that begins with `head`.
fn identify(head: &[u8]) -> Result<Format, ArchError> {
    const EM_X86_64: u16 = 62;
    let byte = |at: usize| head.get(at).copied().unwrap_or(0);
    let word = |at: usize| u16::from_le_bytes([byte(at), byte(at + 1)]);
    let found = if head.starts_with(b"\x7fELF") {
        let (class, machine) = (byte(4), word(18));
        match (class, machine) {
            (2, EM_X86_64) => return Ok(Format::Elf),
            (2, _) => "an ELF file for another processor",
            _ => "a 32-bit ELF file",
        }
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        if word(0x206) >= PROTOCOL_2_12 && word(0x236) & XLF_KERNEL_64 != 0 {
            return Ok(Format::BzImage);
        }
        "a bzImage without a 64-bit entry"
    } else if head.get(0x38..0x3c) == Some(b"ARM\x64") {
        "an arm64 Image"
    } else if head.starts_with(b"\x1f\x8b") {
        "a gzip file"
    } else if head.is_empty() {
        "an empty file"
    } else {
        "a file of another kind"
    };
    Err(ArchError::NotAKernel { found, accepted: ACCEPTED })
}

fn load_elf(
    memory: &GuestMemoryMmap,
    kernel: &mut KernelFile<'_>,
    ram_end: u64,
    wanted: Option<Protocol>,
) -> Result<Loaded, ArchError> {
    small_pages::keep_pages_small(memory, kernel.head());
    let loaded = Elf::load(memory, None, kernel, Some(layout::HIGH_RAM))
        .map_err(|source| ArchError::LoadKernel { ram_mib: ram_end >> 20, source })?;
    let (entry, protocol) = elf_entry(&loaded, wanted)?;
    Ok(Loaded {
        entry,
        protocol,
        end: loaded.kernel_end,
        initrd_max: VMLINUX_INITRD_MAX,
        header: vmlinux_header(),
    })
}

/// Where and how to enter an ELF kernel. Without a wish that is the ELF entry, as Linux wants it,
/// unless that is a virtual address: other kernels, as those of the BSDs, have only PVH then.
fn elf_entry(
    loaded: &KernelLoaderResult,
    wanted: Option<Protocol>,
) -> Result<(GuestAddress, Protocol), ArchError> {
    let is_physical = loaded.kernel_load.0 < loaded.kernel_end;
    match (wanted, loaded.pvh_boot_cap) {
        (None | Some(Protocol::Linux), _) if is_physical => {
            Ok((loaded.kernel_load, Protocol::Linux))
        }
        (None | Some(Protocol::Pvh), PvhBootCapability::PvhEntryPresent(entry))
            if entry.0 < loaded.kernel_end =>
        {
            Ok((entry, Protocol::Pvh))
        }
        (Some(Protocol::Pvh), _) => Err(ArchError::NotAKernel {
            found: "an ELF file that names no entry for PVH",
            accepted: ACCEPTED_BY_PVH,
        }),
        _ => Err(ArchError::NotAKernel {
            found: "an ELF file whose entry lies behind all that it loads",
            accepted: ACCEPTED,
        }),
    }
}

/// A vmlinux has no header, but Linux takes nothing from a zero page without one.
fn vmlinux_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448, // "HdrS"
        version: PROTOCOL_2_12,
        cmdline_size: 2047, // COMMAND_LINE_SIZE - 1
        ..Default::default()
    }
}

fn load_bzimage(
    memory: &GuestMemoryMmap,
    kernel: &mut KernelFile<'_>,
    ram_end: u64,
) -> Result<Loaded, ArchError> {
    let loaded = BzImage::load(memory, None, kernel, Some(layout::HIGH_RAM))
        .map_err(|source| ArchError::LoadKernel { ram_mib: ram_end >> 20, source })?;
    let header = loaded.setup_header.expect("a bzImage has a setup header");
    // It unpacks itself at its preferred address, and needs `init_size` bytes from there on.
    let unpacked = loaded.kernel_load.0.max(header.pref_address);
    let end = unpacked.saturating_add(header.init_size.into()).max(loaded.kernel_end);
    Ok(Loaded {
        entry: GuestAddress(loaded.kernel_load.0 + ENTRY_64),
        protocol: Protocol::Linux,
        end,
        initrd_max: header.initrd_addr_max.into(),
        header,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    const RAM: usize = 64 << 20;
    const LOAD_ADDRESS: u64 = 0x100_0000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A vmlinux of one segment at 16 MiB, with `memory_bytes` in memory.
    fn vmlinux(memory_bytes: u64) -> Vec<u8> {
        let code = [0xf4];
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [LOAD_ADDRESS, 64, 0] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
        for word in [120, LOAD_ADDRESS, LOAD_ADDRESS, 1, memory_bytes, 0x1000] {
            elf.extend(u64::to_le_bytes(word));
        }
        elf.extend(code);
        elf
    }

    /// A bzImage with one byte of protected-mode code.
    fn bzimage(init_size: u32) -> Vec<u8> {
        let mut image = vec![0; 0x401];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        image[0x236] = 1;
        image[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&LOAD_ADDRESS.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        image[0x400] = 0xf4;
        image
    }

    /// A kernel as [`vmlinux`] makes it, whose note names `entry` for PVH.
    fn with_pvh_note(entry: u32) -> Vec<u8> {
        const PT_NOTE: u32 = 4;
        const SEGMENT: std::ops::Range<usize> = 64..120;
        let mut elf = vmlinux(0x1000);
        let mut segment = elf[SEGMENT].to_vec();
        segment[8] += 56; // the code moves behind one more program header
        let mut note = [0; 56];
        note[..4].copy_from_slice(&PT_NOTE.to_le_bytes());
        note[8..16].copy_from_slice(&177_u64.to_le_bytes());
        note[32..40].copy_from_slice(&20_u64.to_le_bytes());
        elf[56] = 2;
        let code = elf.split_off(SEGMENT.end);
        elf.truncate(SEGMENT.start);
        elf.extend([&segment[..], &note, &code].concat());
        for word in [4, 4, 18] {
            elf.extend(u32::to_le_bytes(word));
        }
        elf.extend(b"Xen\0");
        elf.extend(entry.to_le_bytes());
        elf
    }

    /// A kernel as FreeBSD's: linked to the highest 2 GiB, its ELF entry too.
    fn linked_high(mut elf: Vec<u8>) -> Vec<u8> {
        elf[24..32].copy_from_slice(&0xffff_ffff_8038_5000_u64.to_le_bytes());
        elf
    }

    fn load_files(kernel: &[u8], initrd: Option<&[u8]>) -> Result<Entry, ArchError> {
        let kernel = file(kernel);
        load(&memory(), &mut BootFiles { kernel, initrd: initrd.map(file), protocol: None })
    }

    fn load_by(protocol: Option<Protocol>, kernel: &[u8]) -> Result<Entry, ArchError> {
        load(&memory(), &mut BootFiles { kernel: file(kernel), initrd: None, protocol })
    }

    const PVH_ENTRY: u32 = 0x100_0100;

    #[test]
    fn a_kernel_with_both_entries_is_entered_in_64_bit_mode() {
        let entry = load_by(None, &with_pvh_note(PVH_ENTRY)).unwrap();

        assert_eq!((entry.address.0, entry.protocol), (LOAD_ADDRESS, Protocol::Linux));
    }

    #[test]
    fn a_kernel_with_both_entries_is_entered_by_pvh_if_that_is_wanted() {
        let entry = load_by(Some(Protocol::Pvh), &with_pvh_note(PVH_ENTRY)).unwrap();

        assert_eq!((entry.address.0, entry.protocol), (PVH_ENTRY.into(), Protocol::Pvh));
    }

    #[test]
    fn a_kernel_whose_elf_entry_is_virtual_is_entered_by_pvh() {
        let entry = load_by(None, &linked_high(with_pvh_note(PVH_ENTRY))).unwrap();

        assert_eq!((entry.address.0, entry.protocol), (PVH_ENTRY.into(), Protocol::Pvh));
    }

    #[test]
    fn a_kernel_without_a_note_is_not_entered_by_pvh() {
        for kernel in [vmlinux(1), bzimage(1 << 20)] {
            let error = load_by(Some(Protocol::Pvh), &kernel).unwrap_err().to_string();

            assert!(error.contains("accepted are an x86_64 ELF kernel with a PVH note"), "{error}");
        }
    }

    #[test]
    fn an_entry_behind_the_kernel_is_refused_by_either_protocol() {
        let both = linked_high(with_pvh_note(u32::MAX));

        for protocol in [None, Some(Protocol::Linux), Some(Protocol::Pvh)] {
            assert!(matches!(load_by(protocol, &both), Err(ArchError::NotAKernel { .. })));
        }
    }

    #[test]
    fn a_vmlinux_starts_at_its_entry() {
        let entry = load_files(&vmlinux(1), None).unwrap();

        let (address, protocol) = (GuestAddress(LOAD_ADDRESS), Protocol::Linux);
        assert_eq!(entry, Entry { address, initrd: None, protocol });
    }

    #[test]
    fn a_bzimage_starts_at_its_64_bit_entry() {
        let entry = load_files(&bzimage(1 << 20), None).unwrap();

        assert_eq!(entry.address, GuestAddress(0x10_0200));
    }

    #[test]
    fn the_code_of_a_bzimage_is_loaded() {
        let memory = memory();
        let mut boot = BootFiles { kernel: file(&bzimage(1 << 20)), initrd: None, protocol: None };

        load(&memory, &mut boot).unwrap();

        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 0xf4);
    }

    #[test]
    fn an_initrd_lies_page_aligned_at_the_top_of_ram() {
        let entry = load_files(&vmlinux(1), Some(&[7; 5000])).unwrap();

        assert_eq!(entry.initrd, Some((GuestAddress(RAM as u64 - 0x2000), 5000)));
    }

    #[test]
    fn an_initrd_that_does_not_fit_above_the_kernel_is_refused() {
        let kernel = vmlinux(RAM as u64 - LOAD_ADDRESS - 0x1000);

        let error = load_files(&kernel, Some(&[7; 5000])).unwrap_err();

        assert!(matches!(error, ArchError::InitrdTooBig { size: 5000 }));
    }

    #[test]
    fn a_kernel_whose_bss_exceeds_ram_is_refused() {
        let error = load_files(&vmlinux(RAM as u64), None).unwrap_err();

        assert!(matches!(error, ArchError::KernelTooBig { needed_mib: 80, ram_mib: 64 }));
    }

    #[test]
    fn a_bzimage_that_cannot_unpack_in_ram_is_refused() {
        let error = load_files(&bzimage(u32::MAX), None).unwrap_err();

        assert!(matches!(error, ArchError::KernelTooBig { .. }));
    }

    #[test]
    fn a_script_is_not_a_kernel_and_the_error_names_both_formats() {
        let error = load_files(b"#!/bin/sh\n", None).unwrap_err().to_string();

        assert!(error.contains("vmlinux") && error.contains("bzImage"), "{error}");
    }

    #[test]
    fn an_empty_file_is_not_a_kernel() {
        assert!(matches!(load_files(b"", None), Err(ArchError::NotAKernel { .. })));
    }

    #[test]
    fn a_kernel_of_another_processor_is_refused() {
        let mut kernel = vmlinux(1);
        kernel[18] = 183; // EM_AARCH64

        assert!(matches!(load_files(&kernel, None), Err(ArchError::NotAKernel { .. })));
    }

    #[test]
    fn a_bzimage_of_32_bits_is_refused() {
        let mut kernel = bzimage(1 << 20);
        kernel[0x236] = 0;

        assert!(matches!(load_files(&kernel, None), Err(ArchError::NotAKernel { .. })));
    }

    #[test]
    fn every_truncation_of_a_kernel_is_an_error_and_no_panic() {
        let (elf, image) = (vmlinux(1), bzimage(1 << 20));

        for kernel in [&elf[..], &image[..0x400]] {
            for length in 0..kernel.len() {
                assert!(load_files(&kernel[..length], None).is_err(), "{length}");
            }
        }
    }
}
