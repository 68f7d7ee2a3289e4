//! Gives pages of guest RAM back to the host.

use std::io;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestRegionMmap};

/// Size of the pages a balloon's driver counts in, in bytes, whatever the size of a page is to
/// guest or host (virtio 1.2, section 5.5.6).
pub const BALLOON_PAGE: u32 = 4096;

/// Why memory the guest offered was not given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// The guest does not have this memory.
    #[error("{bytes} bytes at {start:#x} are not in guest memory")]
    NotMemory {
        /// Guest-physical start of the range.
        start: u64,
        /// Its size, in bytes.
        bytes: u64,
        /// How vm-memory puts it.
        #[source]
        source: GuestMemoryError,
    },
    /// The host's kernel keeps the memory, for example because it is locked.
    #[error("madvise")]
    Refused(#[source] io::Error),
}

/// Guest RAM of which the guest may offer any part to be forgotten.
///
/// A page that was given back is a page of zeros as soon as somebody looks at it again; in private
/// memory on a file, which is that of a machine built from a template, it is the template's.
pub struct Discarder {
    memory: GuestMemoryMmap,
    /// Size of a host page, in bytes: a power of two.
    host_page: usize,
    given_back_bytes: u64,
}

impl Discarder {
    /// For the RAM of one guest.
    pub fn new(memory: GuestMemoryMmap) -> Self {
        // SAFETY: sysconf has no preconditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let host_page = usize::try_from(page).expect("every host has a page size");
        Discarder { memory, host_page, given_back_bytes: 0 }
    }

    /// Whether a page that was given back may be anything but zeros when it is looked at again.
    pub fn may_leave_contents(&self) -> bool {
        let anonymous_or_shared = libc::MAP_ANONYMOUS | libc::MAP_SHARED;
        self.memory.iter().any(|region| region.flags() & anonymous_or_shared == 0)
    }

    /// How much was given back so far, in bytes; memory that was used and given back twice counts
    /// twice.
    pub fn given_back_bytes(&self) -> u64 {
        self.given_back_bytes
    }

    /// Gives back the whole host pages among the `bytes` bytes from guest address `start` on; nothing
    /// of them if a part is no guest memory.
    pub fn range(&mut self, start: u64, bytes: u64) -> Result<(), DiscardError> {
        let not_memory = |source| DiscardError::NotMemory { start, bytes, source };
        let address = GuestAddress(start);
        let invalid = || not_memory(GuestMemoryError::InvalidGuestAddress(address));
        let length = usize::try_from(bytes).map_err(|_| invalid())?;
        if length == 0 {
            return Ok(());
        }
        if start.checked_add(bytes).is_none() || !self.memory.check_range(address, length) {
            return Err(invalid());
        }
        // In a file that is shared, only a hole gives memory back.
        let is_shared = |region: &GuestRegionMmap| region.flags() & libc::MAP_SHARED != 0;
        let advice = match self.memory.find_region(address).is_some_and(is_shared) {
            true => libc::MADV_REMOVE,
            false => libc::MADV_DONTNEED,
        };
        for slice in self.memory.get_slices(address, length) {
            let slice = slice.map_err(not_memory)?;
            let guard = slice.ptr_guard_mut();
            // Half a page may be all that the guest does not need of it.
            let before =
                guard.as_ptr().addr().next_multiple_of(self.host_page) - guard.as_ptr().addr();
            let whole = slice.len().saturating_sub(before) & !(self.host_page - 1);
            if whole == 0 {
                continue;
            }
            let first = guard.as_ptr().wrapping_add(before);
            // SAFETY: the `whole` bytes from `first` on are inside the slice, which lies in a
            // mapping that `self.memory` keeps. They stay mapped; that they become zeros is what a
            // guest may do to its memory at any time.
            if unsafe { libc::madvise(first.cast(), whole, advice) } != 0 {
                return Err(DiscardError::Refused(io::Error::last_os_error()));
            }
            self.given_back_bytes = self.given_back_bytes.saturating_add(whole as u64);
        }
        Ok(())
    }

    /// Gives back the pages with these numbers, neighbours together, and each only once. Returns the
    /// first failure; it does not stop the rest. The order of `pages` is lost.
    pub fn pages(&mut self, pages: &mut [u32]) -> Result<(), DiscardError> {
        let mut outcome = Ok(());
        pages.sort_unstable();
        for run in pages.chunk_by(|a, b| b - a <= 1) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let start = u64::from(*first) * u64::from(BALLOON_PAGE);
            let bytes = (u64::from(last - first) + 1) * u64::from(BALLOON_PAGE);
            outcome = outcome.and(self.range(start, bytes));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::{DiscardError, Discarder, GuestMemoryMmap};

    const PAGE: usize = super::BALLOON_PAGE as usize;
    const BALLOON_PAGE: u64 = super::BALLOON_PAGE as u64;

    /// Two regions of 16 pages each, one behind the other, then a hole, all filled with ones.
    fn memory() -> GuestMemoryMmap {
        let regions = [(GuestAddress(0), 16 * PAGE), (GuestAddress(16 * BALLOON_PAGE), 16 * PAGE)];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        memory.write_slice(&vec![1; 32 * PAGE], GuestAddress(0)).unwrap();
        memory
    }

    /// Numbers of the pages that read as zeros.
    fn given_back(memory: &GuestMemoryMmap) -> Vec<u64> {
        let is_zero = |page: &u64| {
            let mut bytes = vec![1; PAGE];
            memory.read_slice(&mut bytes, GuestAddress(page * BALLOON_PAGE)).unwrap();
            bytes.iter().all(|byte| *byte == 0)
        };
        (0..32).filter(is_zero).collect()
    }

    #[test]
    fn a_range_may_cross_from_one_region_into_the_next() {
        let memory = memory();
        let mut discarder = Discarder::new(memory.clone());

        discarder.range(15 * BALLOON_PAGE, 2 * BALLOON_PAGE).unwrap();

        assert_eq!(given_back(&memory), [15, 16]);
        assert_eq!(discarder.given_back_bytes(), 2 * BALLOON_PAGE);
    }

    #[test]
    fn a_page_of_which_a_part_is_needed_stays() {
        let memory = memory();
        let mut discarder = Discarder::new(memory.clone());

        discarder.range(BALLOON_PAGE + 1, 3 * BALLOON_PAGE).unwrap();
        discarder.range(8 * BALLOON_PAGE + 1, BALLOON_PAGE - 2).unwrap();

        assert_eq!(given_back(&memory), [2, 3]);
    }

    #[test]
    fn a_range_that_leaves_memory_is_refused_whole() {
        let memory = memory();
        let mut discarder = Discarder::new(memory.clone());

        for (start, bytes) in [
            (31 * BALLOON_PAGE, 2 * BALLOON_PAGE),
            (31 * BALLOON_PAGE, u64::MAX),
            (u64::MAX, 1),
            (u64::MAX - 1, 2),
            (1 << 40, BALLOON_PAGE),
        ] {
            assert!(discarder.range(start, bytes).is_err());
        }

        assert!(given_back(&memory).is_empty());
        assert_eq!(discarder.given_back_bytes(), 0);
    }

    #[test]
    fn pages_in_any_order_and_several_times_are_given_back_once() {
        let memory = memory();
        let mut discarder = Discarder::new(memory.clone());

        discarder.pages(&mut [9, 3, 2, 3, 4, 9, 3]).unwrap();

        assert_eq!(given_back(&memory), [2, 3, 4, 9]);
        assert_eq!(discarder.given_back_bytes(), 4 * BALLOON_PAGE);
    }

    #[test]
    fn a_page_the_guest_does_not_have_does_not_stop_the_others() {
        let memory = memory();
        let mut discarder = Discarder::new(memory.clone());

        let outcome = discarder.pages(&mut [1, 1000, u32::MAX, 30]);

        assert!(matches!(outcome, Err(DiscardError::NotMemory { start, .. })
            if start == 1000 * BALLOON_PAGE));
        assert_eq!(given_back(&memory), [1, 30]);
    }

    #[test]
    fn no_page_is_no_work() {
        let memory = memory();
        let mut discarder = Discarder::new(memory.clone());

        discarder.pages(&mut []).unwrap();
        discarder.range(1 << 40, 0).unwrap();

        assert!(given_back(&memory).is_empty());
    }
}
