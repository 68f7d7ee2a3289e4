//! Windows in the guest's address space through which it maps the files of its shares.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use arch::VmFd;
use devices::virtio::fs::Window;
use kvm_bindings::kvm_userspace_memory_region;

use crate::config::ShareConfig;

/// First of the KVM memory slots for windows, far above those for RAM and what extends it.
const FIRST_SLOT: u32 = 256;

/// Windows start at a multiple of this, as everything behind RAM does.
const ALIGNMENT: u64 = 1 << 30;

/// Why a share has no window.
#[derive(Debug, thiserror::Error)]
pub enum DaxError {
    /// The architecture's address space has no room behind RAM.
    #[error("find {bytes} bytes of guest addresses for its DAX window (lower dax_mib)")]
    NoAddresses {
        /// Size of the window.
        bytes: u64,
    },
    /// The host has no address space left.
    #[error("reserve {bytes} bytes of address space for its DAX window (lower dax_mib)")]
    Reserve {
        /// Size of the window.
        bytes: u64,
        /// What mmap(2) said.
        #[source]
        source: io::Error,
    },
    /// KVM refused the memory slot.
    #[error("show its DAX window at {start:#x} to KVM")]
    Slot {
        /// Guest-physical start of the window.
        start: u64,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Takes room for the windows of all `shares` out of `free`, from its beginning on.
pub fn take_addresses(
    shares: &[ShareConfig],
    free: &mut Range<u64>,
) -> Result<Range<u64>, DaxError> {
    let start = free.start;
    for share in shares {
        let bytes = share.dax_bytes();
        free.start = free.start.saturating_add(bytes.next_multiple_of(ALIGNMENT));
        if free.start > free.end {
            return Err(DaxError::NoAddresses { bytes });
        }
    }
    Ok(start..free.start)
}

/// The windows of a machine while they are being made.
pub struct Windows<'a> {
    vm: &'a VmFd,
    addresses: Range<u64>,
    made: Vec<Arc<Window>>,
}

impl<'a> Windows<'a> {
    /// Windows at the guest-physical `addresses`, which [`take_addresses`] found.
    pub fn new(vm: &'a VmFd, addresses: Range<u64>) -> Self {
        Windows { vm, addresses, made: Vec::new() }
    }

    /// Makes a window of `bytes` bytes, and returns it and where the guest sees it.
    pub fn open(&mut self, bytes: u64) -> Result<(Arc<Window>, u64), DaxError> {
        let start = self.addresses.start;
        let window =
            Window::reserve(bytes).map_err(|source| DaxError::Reserve { bytes, source })?;
        let slot = kvm_userspace_memory_region {
            slot: FIRST_SLOT + u32::try_from(self.made.len()).expect("a handful"),
            flags: 0,
            guest_phys_addr: start,
            memory_size: bytes,
            userspace_addr: window.address() as u64,
        };
        // SAFETY: the window keeps these addresses for the rest of the process, and has nothing mapped
        // there but what the guest may access. KVM itself refuses slots that overlap.
        unsafe { self.vm.set_user_memory_region(slot) }
            .map_err(|source| DaxError::Slot { start, source })?;
        self.addresses.start += bytes.next_multiple_of(ALIGNMENT);
        let window = Arc::new(window);
        self.made.push(window.clone());
        Ok((window, start))
    }

    /// All windows that were made.
    pub fn finish(self) -> Arc<[Arc<Window>]> {
        self.made.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(sizes_mib: &[u32]) -> Vec<ShareConfig> {
        let share = |&dax_mib| ShareConfig { dax_mib, ..ShareConfig::new("t", "/".into()) };
        sizes_mib.iter().map(share).collect()
    }

    #[test]
    fn each_window_takes_whole_gibibytes_and_no_window_takes_none() {
        let mut free = 4 << 30..100 << 30;

        let taken = take_addresses(&shares(&[64, 0, 1026]), &mut free).unwrap();

        assert_eq!(taken, 4 << 30..7 << 30);
        assert_eq!(free, 7 << 30..100 << 30);
    }

    #[test]
    fn windows_without_room_are_an_error() {
        let mut free = 4 << 30..5 << 30;

        let error = take_addresses(&shares(&[64, 64]), &mut free).unwrap_err();

        assert!(error.to_string().contains("lower dax_mib"), "{error}");
    }
}
