//! Guest RAM: host memory that suits the guest's page tables, and the KVM slots that show it.

mod copy;
mod patchwork;
mod pluggable;
mod store;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;

use arch::machine::MemoryMap;
use arch::{Arch, Host, VmFd};
use devices::virtio::mmio::RegisterPages;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use log::debug;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::config::MemoryConfig;

pub use self::copy::MemoryLayout;
use self::copy::Part;
use self::patchwork::Patchwork;
pub use self::pluggable::Pluggable;
pub use self::store::{SavedMemory, Sharing, Store};

/// Size of a huge page, in bytes: guest and host addresses agree modulo this, or KVM could map RAM
/// only in small pages, at 512 times the faults.
pub const HUGE_PAGE: usize = 2 << 20;

/// The memory slot for the registers of devices: behind those for RAM and what extends it, before those
/// for windows.
const REGISTERS_SLOT: u32 = 255;

const GIB: u64 = 1 << 30;

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Not reserved: a guest's RAM is a limit, not a need, and the host may promise more than it has.
pub const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Which step of making guest RAM failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no address space left for the region.
    #[error("reserve {bytes} bytes of address space for guest RAM (lower memory.size_mib)")]
    Map {
        /// Size of the region.
        bytes: usize,
        /// What mmap(2) said.
        #[source]
        source: io::Error,
    },
    /// The file for the memory cannot be made.
    #[error("create the file for guest RAM (memory.backing)")]
    CreateFile {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is a file where the one for the memory is to be.
    #[error("the file for guest RAM {path:?} must not exist yet: it may be another machine's")]
    FileExists {
        /// Where it is.
        path: PathBuf,
    },
    /// The file with the memory of a saved machine lacks a part.
    #[error("the file with guest RAM has {found} bytes, of at least {needed}")]
    ShortFile {
        /// Its size, in bytes.
        found: u64,
        /// The size that it should have, in bytes.
        needed: u64,
    },
    /// The architecture's address space has no room behind RAM.
    #[error("find {bytes} bytes of guest addresses for more memory (lower memory.pluggable_mib)")]
    NoAddresses {
        /// Size of what finds no place.
        bytes: u64,
    },
    /// The host has no memory for the mappings of what can be plugged in, or no file.
    #[error("prepare the memory that can be plugged in")]
    Pluggable(#[source] io::Error),
    /// The architecture's memory map is not one vm-memory accepts.
    #[error("lay out guest RAM")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// The region's mapping is not one vm-memory accepts.
    #[error("describe a region of guest RAM")]
    Region(#[source] vm_memory::mmap::MmapRegionError),
    /// The host has no memory for the registers of devices.
    #[error("map memory for the registers of devices")]
    Registers(#[source] FromRangesError),
    /// KVM refused the memory slot.
    #[error("show guest RAM at {base:#x} to KVM")]
    Slot {
        /// Guest-physical start of the region.
        base: u64,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The guest's RAM. Dropping it gives the memory back.
pub struct GuestRam {
    memory: GuestMemoryMmap,
    /// RAM and what extends it.
    with_extensions: GuestMemoryMmap,
    /// Where memory can be plugged in.
    pluggable: Option<Range<u64>>,
    /// What drivers read of devices: there for as long as a memory slot may refer to it.
    registers: Option<RegisterPages>,
    store: Store,
}

impl GuestRam {
    /// Maps every region of `map` out of `store`; nothing becomes resident before it is touched.
    pub fn allocate(
        map: &MemoryMap,
        config: &MemoryConfig,
        mut store: Store,
    ) -> Result<Self, MemoryError> {
        let regions = map
            .regions
            .iter()
            .map(|&(base, bytes)| allocate_region(base, bytes, config, &mut store))
            .collect::<Result<Vec<_>, _>>()?;
        let memory = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
        let with_extensions = memory.clone();
        Ok(GuestRam { with_extensions, memory, pluggable: None, registers: None, store })
    }

    /// The memory the guest starts with, as loaders use it.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The file that the guest's memory is kept in, if it is.
    pub fn file(&self) -> Option<&File> {
        self.store.file()
    }

    /// All memory in which a driver may place rings and buffers.
    pub fn device_memory(&self) -> &GuestMemoryMmap {
        &self.with_extensions
    }

    /// Maps the memory that can be plugged in later at the start of `window`, and takes its addresses
    /// out of there, in whole GiB. There is none before it is plugged in. Returns it, if there is any.
    pub fn add_pluggable(
        &mut self,
        vm: &Arc<VmFd>,
        window: &mut Range<u64>,
        config: &MemoryConfig,
    ) -> Result<Option<Pluggable>, MemoryError> {
        let bytes = u64::from(config.pluggable_mib) << 20;
        if bytes == 0 {
            return Ok(None);
        }
        let start = window.start;
        window.start = start.saturating_add(bytes.next_multiple_of(GIB));
        if window.start > window.end {
            return Err(MemoryError::NoAddresses { bytes });
        }
        let source = self.store.source(bytes).map_err(MemoryError::Pluggable)?;
        let region = allocate_region(GuestAddress(start), bytes, config, &mut self.store)?;
        let address = region.as_ptr().addr();
        // SAFETY: the region is mapped, `GuestRam` never unmaps it, and it is nothing but the guest's.
        let memory = unsafe { Patchwork::new(address, bytes, source, config.mergeable) }
            .map_err(MemoryError::Pluggable)?;
        self.insert(region)?;
        self.pluggable = Some(start..start + bytes);
        Ok(Some(Pluggable::new(vm.clone(), start..start + bytes, address as u64, memory)))
    }

    /// Where the memory is, for who copies it to the file of a [`SavedMemory`]. What can be plugged in
    /// is not; it must not be.
    pub fn layout(&self) -> MemoryLayout {
        let mut range = 0..0;
        let mut next = |bytes: u64| {
            let offset = store::after(&range);
            range = offset..offset + bytes;
            offset
        };
        let parts = self.memory.iter().map(|region| {
            let (address, bytes) = (region.as_ptr().addr() as u64, region.len());
            Part { address, bytes, offset: next(bytes) }
        });
        let parts = parts.collect();
        if let Some(pluggable) = &self.pluggable {
            next(pluggable.end - pluggable.start);
        }
        MemoryLayout { parts, file_bytes: range.end }
    }

    /// Whether the memory goes with the machine, all of it.
    pub fn is_anonymous(&self) -> bool {
        self.store.is_anonymous()
    }

    /// Adds `region` as further guest memory; a guest for which it is `read_only` may only make
    /// devices write to it.
    pub fn extend(
        &mut self,
        vm: &VmFd,
        region: GuestRegionMmap,
        read_only: bool,
    ) -> Result<(), MemoryError> {
        let slot = u32::try_from(self.with_extensions.num_regions()).expect("a handful");
        show(vm, slot, if read_only { KVM_MEM_READONLY } else { 0 }, &region)?;
        self.insert(region)
    }

    fn insert(&mut self, region: GuestRegionMmap) -> Result<(), MemoryError> {
        self.with_extensions =
            self.with_extensions.insert_region(Arc::new(region)).map_err(MemoryError::Layout)?;
        Ok(())
    }

    /// Makes the pages for the register blocks of devices, at the guest-physical `addresses`. Where KVM
    /// can, the guest reads them without an exit; what it writes there is one in any case.
    pub fn add_registers(
        &mut self,
        vm: &VmFd,
        addresses: Range<u64>,
    ) -> Result<RegisterPages, MemoryError> {
        let bytes = usize::try_from(addresses.end - addresses.start).expect("some pages");
        let pages = GuestRegionMmap::from_range(GuestAddress(addresses.start), bytes, None)
            .map_err(MemoryError::Registers)?;
        // A host that shows no memory for reading only leaves the reads to the bus.
        if let Err(error) = show(vm, REGISTERS_SLOT, KVM_MEM_READONLY, &pages) {
            debug!("registers are read by exits: {error}");
        }
        let pages = RegisterPages::new(Arc::new(pages), Host::publish);
        Ok(self.registers.insert(pages).clone())
    }

    /// Makes each region a memory slot of `vm`.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        (0..).zip(self.memory.iter()).try_for_each(|(slot, region)| show(vm, slot, 0, region))
    }
}

/// Makes `region` memory slot number `slot` of `vm`.
fn show(vm: &VmFd, slot: u32, flags: u32, region: &GuestRegionMmap) -> Result<(), MemoryError> {
    let (base, address) = (region.start_addr().raw_value(), region.as_ptr().addr() as u64);
    // SAFETY: `GuestRam`, which has the region, unmaps none as long as there is the machine.
    unsafe { set_slot(vm, slot, flags, base, region.len(), address) }
}

/// Makes `memory_size` bytes from `userspace_addr` on memory slot number `slot` of `vm`.
///
/// # Safety
///
/// They must be memory of this process for as long as there is the machine, and nothing but the guest's.
unsafe fn set_slot(
    vm: &VmFd,
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
) -> Result<(), MemoryError> {
    let region =
        kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
    // SAFETY: as the caller promises; KVM itself refuses slots that overlap.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|source| MemoryError::Slot { base: guest_phys_addr, source })
}

impl Drop for GuestRam {
    /// Frees the pages and keeps the addresses: a device may hold a clone of the memory for longer,
    /// and then reads zeros instead of somebody else's mapping.
    fn drop(&mut self) {
        let start = self.pluggable.as_ref().map(|addresses| GuestAddress(addresses.start));
        for region in self.with_extensions.iter() {
            let is_pluggable = start == Some(region.start_addr());
            if is_pluggable || region.flags() & libc::MAP_ANONYMOUS == 0 {
                replace(region);
            }
        }
        for region in self.memory.iter() {
            advise(region, libc::MADV_DONTNEED);
        }
    }
}

/// Maps nothing but zeros in the place of a file, which would be kept for as long as it is mapped.
/// Failing to costs memory, nothing else.
fn replace(region: &GuestRegionMmap) {
    let flags = FLAGS | libc::MAP_FIXED;
    // SAFETY: the new mapping has the place and the size of that of the region, which is there for the
    // rest of the process; memory that changes under a reader is what guest RAM is anyway.
    unsafe { libc::mmap(region.as_ptr().cast(), region.size(), PROTECTION, flags, -1, 0) };
}

fn allocate_region(
    base: GuestAddress,
    bytes: u64,
    config: &MemoryConfig,
    store: &mut Store,
) -> Result<GuestRegionMmap, MemoryError> {
    let bytes = usize::try_from(bytes).expect("a region fits a 64-bit address space");
    let region = describe(base, store.map(bytes)?, bytes, store.flags())?;
    // A core dump is for our bugs; the guest's secrets do not belong in it.
    advise(&region, libc::MADV_DONTDUMP);
    if config.mergeable {
        advise(&region, libc::MADV_MERGEABLE);
    }
    Ok(region)
}

/// The mapping of `bytes` bytes from `start` on, made with `flags`, as guest memory at `base`. It must
/// be readable and writable for the rest of the process.
pub fn describe(
    base: GuestAddress,
    start: *mut u8,
    bytes: usize,
    flags: i32,
) -> Result<GuestRegionMmap, MemoryError> {
    // SAFETY: all callers mapped `bytes` bytes from `start` on, readable and writable, and nobody
    // ever unmaps them.
    let mapping = unsafe { MmapRegion::build_raw(start, bytes, PROTECTION, flags) }
        .map_err(MemoryError::Region)?;
    Ok(GuestRegionMmap::new(mapping, base).expect("a region ends below 2^64"))
}

/// Maps `bytes` bytes at a multiple of [`HUGE_PAGE`].
pub fn map_aligned(bytes: usize) -> io::Result<*mut u8> {
    let padded = bytes.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), padded, PROTECTION, FLAGS, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = mapped.addr().next_multiple_of(HUGE_PAGE) - mapped.addr();
    let after = padded - before - bytes;
    let start = mapped.cast::<u8>().wrapping_add(before);
    unmap(mapped.cast(), before);
    unmap(start.wrapping_add(bytes), after);
    Ok(start)
}

/// Gives up the unused end of a fresh mapping. Failing to costs address space, nothing else.
fn unmap(start: *mut u8, bytes: usize) {
    if bytes != 0 {
        // SAFETY: the range lies in a mapping made by the caller, and nobody has a reference to it.
        unsafe { libc::munmap(start.cast(), bytes) };
    }
}

/// Advice is best effort: a kernel without KSM still runs guests.
fn advise(region: &GuestRegionMmap, advice: i32) {
    // SAFETY: the region is mapped, and none of the advice used here unmaps it; memory that changes
    // under a reader is what guest RAM is anyway.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn ram(sizes_mib: &[u64]) -> GuestRam {
        let regions = (0..)
            .map(|n| GuestAddress(n << 32))
            .zip(sizes_mib.iter().map(|mib| mib << 20))
            .collect();
        let map = MemoryMap { regions, device_window: 0..0, extension_window: 0..0 };
        GuestRam::allocate(&map, &MemoryConfig::default(), Store::anonymous()).unwrap()
    }

    #[test]
    fn every_region_starts_at_a_huge_page() {
        let ram = ram(&[3, 5]);

        let past_a_huge_page: Vec<_> =
            ram.memory().iter().map(|region| region.as_ptr().addr() % HUGE_PAGE).collect();

        assert_eq!(past_a_huge_page, [0, 0]);
    }

    #[test]
    fn the_last_byte_can_be_used() {
        let ram = ram(&[3]);

        ram.memory().write_obj(7u8, GuestAddress((3 << 20) - 1)).unwrap();

        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress((3 << 20) - 1)).unwrap(), 7);
        assert!(ram.memory().write_obj(7u8, GuestAddress(3 << 20)).is_err());
    }

    #[test]
    fn dropped_ram_reads_as_zeros_through_a_clone() {
        let ram = ram(&[2]);
        let clone = ram.memory().clone();
        clone.write_obj(7u8, GuestAddress(0)).unwrap();

        drop(ram);

        assert_eq!(clone.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }

    #[test]
    fn more_ram_than_addresses_is_an_error() {
        let map = MemoryMap {
            regions: vec![(GuestAddress(0), 1 << 60)],
            device_window: 0..0,
            extension_window: 0..0,
        };

        let error =
            GuestRam::allocate(&map, &MemoryConfig::default(), Store::anonymous()).err().unwrap();

        assert!(error.to_string().contains("lower memory.size_mib"));
    }
}
