//! The DAX window: files of the host as memory of the guest, which so shares the host's page cache
//! (virtio 1.2, section 5.11.6.4).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingFlags};
use fuse_backend_rs::transport::FsCacheReqHandler;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use crate::mapping::{Aside, map_at, must_be_kept};

/// What Linux maps at once, in bytes, and to which multiples it keeps in file and window
/// (`FUSE_DAX_SZ`, fs/fuse/dax.c). The window is a row of slots of this size, each of which takes two of
/// the mappings that a process may have (`vm.max_map_count`) at most: the file, and zeros behind its end.
pub const SLOT_BYTES: u64 = 2 << 20;

/// How a place is reserved in which nothing is mapped.
const RESERVED: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// A range of addresses in which files are mapped as the guest asks for.
///
/// It costs addresses only: where no file is mapped, nobody can access it. It is never given up,
/// because a memory slot of the guest may refer to it for as long as the process lives. Nothing in
/// this process touches it, so no truncated file can be a fault of the process.
///
/// A mapping may reach beyond the end of its file, which is short or was truncated. An access of the
/// guest there cannot be completed: KVM_RUN fails, or never gets beyond it where KVM takes the page
/// for one that comes later (asynchronous page faults, x86). [`Window::patch`] puts zeros there until
/// the guest asks for something.
pub struct Window {
    /// Address of the range in this process.
    start: usize,
    bytes: u64,
    /// What is mapped, by number of the slot. Locked while mappings change.
    slots: Mutex<BTreeMap<u64, Slot>>,
    /// Whether a slot has a patch. Written under the lock.
    is_patched: AtomicBool,
    /// How often a patch has changed something. Written under the lock.
    patches: AtomicU64,
}

/// What is mapped in a slot, all of it.
struct Slot {
    file: Arc<File>,
    offset: u64,
    protection: i32,
    /// From where in the slot on zeros stand in for what is beyond the end of the file.
    patch: Option<u64>,
}

impl Window {
    /// Reserves `bytes` bytes of addresses, which must be a multiple of [`SLOT_BYTES`].
    pub fn reserve(bytes: u64) -> io::Result<Window> {
        assert!(bytes % SLOT_BYTES == 0, "a window is a row of whole slots");
        let out_of_memory = |_| io::Error::from(io::ErrorKind::OutOfMemory);
        let padded = usize::try_from(bytes + SLOT_BYTES).map_err(out_of_memory)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let mapped =
            unsafe { libc::mmap(ptr::null_mut(), padded, libc::PROT_NONE, RESERVED, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Window {
            start: mapped.addr().next_multiple_of(to_usize(SLOT_BYTES)),
            bytes,
            slots: Mutex::default(),
            is_patched: AtomicBool::new(false),
            patches: AtomicU64::new(0),
        })
    }

    /// Where the window is in this process: a multiple of [`SLOT_BYTES`].
    pub fn address(&self) -> usize {
        self.start
    }

    /// The size of the window, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The window as guest memory that starts at `start`, to hand buffers in it to the kernel, which
    /// says EFAULT where nothing is mapped. An access of this process could be a fault of it.
    pub(super) fn region(&self, start: u64) -> Option<GuestRegionMmap> {
        let (address, bytes) = self.within(&(0..self.bytes));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is reserved for the rest of the process, and what is mapped there is
        // memory that guests and kernels change at any time, as guest memory is.
        let mapping =
            unsafe { MmapRegion::build_raw(address.cast(), bytes, protection, RESERVED) }.ok()?;
        GuestRegionMmap::new(mapping, GuestAddress(start))
    }

    /// Puts zeros wherever a mapping reaches beyond the end of its file. Returns whether there was
    /// such a place, so that a guest that could not go on can now. Any thread may call it.
    ///
    /// Where the process has no mapping left for them there are none, and the guest cannot go on.
    pub fn patch(&self) -> bool {
        let mut slots = self.lock();
        let mut any = false;
        for (&number, slot) in slots.iter_mut() {
            let Ok(metadata) = slot.file.metadata() else { continue };
            let held = metadata.len().saturating_sub(slot.offset).next_multiple_of(page_bytes());
            let (base, end) = (number * SLOT_BYTES, (number + 1) * SLOT_BYTES);
            let zeros = libc::PROT_READ | libc::PROT_WRITE;
            if held < SLOT_BYTES
                && slot.patch != Some(held)
                && self.fill(base + held..end, zeros).is_ok()
            {
                slot.patch = Some(held);
                any = true;
            }
        }
        if any {
            self.is_patched.store(true, Ordering::Release);
            self.patches.fetch_add(1, Ordering::Release);
        }
        any
    }

    /// How often [`Window::patch`] has found something to do. Whoever finds nothing to do, and another number
    /// than before it was needed, came after somebody else.
    pub fn patches(&self) -> u64 {
        self.patches.load(Ordering::Acquire)
    }

    /// Shows the files again where [`Window::patch`] put zeros. Must come before anything is done for
    /// the guest, as that may make a file longer; so nothing may be done if it fails, for want of
    /// mappings.
    pub(super) fn unpatch(&self) -> io::Result<()> {
        if !self.is_patched.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut slots = self.lock();
        let patched = slots.iter().filter_map(|(&number, slot)| Some((number, slot.patch?)));
        for (number, held) in patched.collect::<Vec<_>>() {
            let Some(slot) = slots.get_mut(&number) else { continue };
            let (base, end) = (number * SLOT_BYTES, (number + 1) * SLOT_BYTES);
            if self.show(base + held..end, &slot.file, slot.offset + held, slot.protection).is_ok()
            {
                slot.patch = None;
            } else {
                // Rather nothing than zeros that are not in the file.
                self.fill(base..end, libc::PROT_NONE)?;
                slots.remove(&number);
            }
        }
        self.is_patched.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether any file is mapped.
    pub(super) fn is_used(&self) -> bool {
        !self.lock().is_empty()
    }

    /// Takes all files out of the window. If that fails, for want of mappings, all stay there, where
    /// they harm nobody: they are files of the guest's share, and the next clear takes them, too.
    pub(super) fn clear(&self) {
        let mut slots = self.lock();
        if !slots.is_empty() && self.fill(0..self.bytes, libc::PROT_NONE).is_ok() {
            slots.clear();
            self.is_patched.store(false, Ordering::Release);
        }
    }

    /// Maps `bytes` bytes of `file` from `offset` on at `place` in the window, whole slots. If that
    /// fails, what was there still is.
    fn map(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        place: u64,
        bytes: u64,
        protection: i32,
    ) -> io::Result<()> {
        let end = place.checked_add(bytes).filter(|&end| bytes != 0 && end <= self.bytes);
        let file_end = offset.checked_add(bytes).and_then(|end| i64::try_from(end).ok());
        // Of a slot that is mapped in part, the rest would remain: one more mapping for each part.
        let is_aligned = (place | offset | bytes) % SLOT_BYTES == 0;
        let (Some(end), Some(_), true) = (end, file_end, is_aligned) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let file = Arc::new(File::from(file.try_clone_to_owned()?));
        let mut slots = self.lock();
        self.show(place..end, &file, offset, protection)?;
        for start in (place..end).step_by(to_usize(SLOT_BYTES)) {
            let slot = Slot {
                file: file.clone(),
                offset: offset + (start - place),
                protection,
                patch: None,
            };
            slots.insert(start / SLOT_BYTES, slot);
        }
        Ok(())
    }

    /// Takes the files out of the slots at `place`. If that fails all of them are still there.
    fn unmap(&self, place: u64, bytes: u64) -> io::Result<()> {
        if place % SLOT_BYTES != 0 || place >= self.bytes || bytes == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let end = place.saturating_add(bytes).min(self.bytes).next_multiple_of(SLOT_BYTES);
        let mut slots = self.lock();
        self.fill(place..end, libc::PROT_NONE)?;
        let mut rest = slots.split_off(&(place / SLOT_BYTES));
        slots.append(&mut rest.split_off(&(end / SLOT_BYTES)));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Slot>> {
        self.slots.lock().expect("nothing panics while mappings change")
    }

    /// Replaces what is at `place`, which is within the window, by `file` from `offset` on. If that
    /// fails, what was there still is.
    fn show(&self, place: Range<u64>, file: &File, offset: u64, protection: i32) -> io::Result<()> {
        let (address, bytes) = self.within(&place);
        // Not there at once: many files cannot be mapped, and the attempt would already have taken
        // away what was there. Whatever this process maps next would be the guest's to see.
        let mapping =
            Aside::map(bytes, protection, libc::MAP_SHARED, Some((file.as_fd(), offset)))?;
        // SAFETY: it goes into the reservation made by `reserve`, which is never given up and to which
        // nothing in this process has a reference.
        unsafe { mapping.put(address) }
    }

    /// Replaces what is at `place`, which is within the window, by zeros, which nobody can access with
    /// PROT_NONE as `protection`. If that fails, what was there still is.
    fn fill(&self, place: Range<u64>, protection: i32) -> io::Result<()> {
        let (address, bytes) = self.within(&place);
        let flags = RESERVED | libc::MAP_FIXED;
        // SAFETY: the range is within the reservation made by `reserve`, which is never given up and
        // to which nothing in this process has a reference.
        let mapped = unsafe { map_at(address, bytes, protection, flags, None) };
        mapped.inspect_err(|_| must_be_kept(address.addr(), bytes)).map(drop)
    }

    fn within(&self, place: &Range<u64>) -> (*mut libc::c_void, usize) {
        assert!(place.start < place.end && place.end <= self.bytes, "all callers checked it");
        let address = self.start + to_usize(place.start);
        (ptr::without_provenance_mut(address), to_usize(place.end - place.start))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What the library maps and unmaps with.
pub(super) struct Mapper(pub(super) Arc<Window>);

impl FsCacheReqHandler for Mapper {
    fn map(
        &mut self,
        file_offset: u64,
        place: u64,
        bytes: u64,
        flags: u64,
        file: RawFd,
    ) -> io::Result<()> {
        let is_writable = flags & SetupmappingFlags::WRITE.bits() != 0;
        let protection =
            if is_writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: the library keeps the file open during the call.
        let file = unsafe { BorrowedFd::borrow_raw(file) };
        self.0.map(file, file_offset, place, bytes, protection)
    }

    fn unmap(&mut self, requests: Vec<RemovemappingOne>) -> io::Result<()> {
        requests.iter().try_for_each(|request| self.0.unmap(request.moffset, request.len))
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("a window is within a 64-bit address space")
}

/// Size of a page of this host, in bytes.
fn page_bytes() -> u64 {
    // SAFETY: sysconf has no preconditions.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("every system has pages")
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::io::Write;
    use std::thread;

    use super::*;
    use crate::testing::in_a_child;

    const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

    fn window() -> Window {
        Window::reserve(4 * SLOT_BYTES).unwrap()
    }

    fn file_of(byte: u8, bytes: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![byte; bytes]).unwrap();
        file
    }

    /// One byte of the window as the kernel reads it for a guest, or why it cannot.
    fn peek(window: &Window, place: u64) -> io::Result<u8> {
        let mut byte = 0u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let (address, _) = window.within(&(place..place + 1));
        let remote = libc::iovec { iov_base: address, iov_len: 1 };
        // SAFETY: `local` is one byte that may be written; the kernel checks `remote`.
        let read = unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        };
        if read == 1 { Ok(byte) } else { Err(io::Error::last_os_error()) }
    }

    fn errno(result: io::Result<()>) -> Option<i32> {
        result.err().and_then(|error| error.raw_os_error())
    }

    #[test]
    fn nothing_is_mapped_at_first() {
        let window = window();

        assert!(peek(&window, 0).is_err());
        assert_eq!(window.address() % to_usize(SLOT_BYTES), 0);
    }

    #[test]
    fn a_file_is_there_until_it_is_taken_away() {
        let (window, file) = (window(), file_of(7, 3 << 20));

        window.map(file.as_fd(), 0, SLOT_BYTES, 2 * SLOT_BYTES, BOTH).unwrap();
        let mapped =
            [SLOT_BYTES, SLOT_BYTES + (3 << 20) - 1].map(|place| peek(&window, place).ok());
        window.unmap(SLOT_BYTES, SLOT_BYTES).unwrap();

        assert_eq!(mapped, [Some(7), Some(7)]);
        assert!(peek(&window, SLOT_BYTES).is_err());
        assert_eq!(peek(&window, 2 * SLOT_BYTES).unwrap(), 7);
    }

    #[test]
    fn what_lies_outside_or_across_slots_is_refused() {
        let (window, file) = (window(), file_of(7, 1));
        let refused = [
            (0, 0, 5 * SLOT_BYTES),
            (0, 4 * SLOT_BYTES, SLOT_BYTES),
            (0, u64::MAX - SLOT_BYTES + 1, SLOT_BYTES),
            (0, 0, u64::MAX),
            (0, 0, 0),
            (0, 4096, 4096),
            (4096, 0, SLOT_BYTES),
            (0, 0, 4096),
            (u64::MAX - SLOT_BYTES + 1, 0, SLOT_BYTES),
            (1 << 63, 0, SLOT_BYTES),
        ];

        for (offset, place, bytes) in refused {
            let mapped = window.map(file.as_fd(), offset, place, bytes, BOTH);
            assert_eq!(errno(mapped), Some(libc::EINVAL), "{offset:#x} {place:#x} {bytes:#x}");
        }
        for (place, bytes) in [(4096, 4096), (4 * SLOT_BYTES, 1), (0, 0), (u64::MAX, 1)] {
            assert_eq!(errno(window.unmap(place, bytes)), Some(libc::EINVAL));
        }
        assert!(peek(&window, 0).is_err());
    }

    #[test]
    fn a_file_that_cannot_be_mapped_leaves_what_was_there() {
        let (window, file) = (window(), file_of(7, 1));
        let unmappable = File::open("/proc/self/maps").unwrap();
        window.map(file.as_fd(), 0, 0, SLOT_BYTES, BOTH).unwrap();

        assert!(window.map(unmappable.as_fd(), 0, 0, SLOT_BYTES, libc::PROT_READ).is_err());

        assert_eq!(peek(&window, 0).unwrap(), 7);
    }

    #[test]
    fn beyond_the_end_of_a_file_are_zeros_once_it_is_patched() {
        let (window, file) = (window(), file_of(7, 5000));
        window.map(file.as_fd(), 0, 0, SLOT_BYTES, BOTH).unwrap();
        assert!(peek(&window, 8192).is_err());

        assert!(window.patch());

        assert_eq!(peek(&window, 8192).unwrap(), 0);
        assert_eq!(peek(&window, 4999).unwrap(), 7);
        assert!(!window.patch());
    }

    #[test]
    fn a_truncated_file_is_patched_from_its_new_end_on() {
        let (window, file) = (window(), file_of(7, 3 << 20));
        window.map(file.as_fd(), 0, 0, 2 * SLOT_BYTES, BOTH).unwrap();
        window.patch();

        file.set_len(4096).unwrap();

        assert!(window.patch());
        assert_eq!(peek(&window, 4096).unwrap(), 0);
        assert_eq!(peek(&window, SLOT_BYTES).unwrap(), 0);
    }

    #[test]
    fn whoever_has_nothing_to_patch_learns_that_somebody_else_had() {
        let (window, file) = (window(), file_of(7, 5000));
        window.map(file.as_fd(), 0, 0, SLOT_BYTES, BOTH).unwrap();
        assert_eq!(window.patches(), 0);

        let mut seen = Vec::new();
        for bytes in [5000, 5000, 4096] {
            file.set_len(bytes).unwrap();
            let patched = thread::scope(|scope| scope.spawn(|| window.patch()).join().unwrap());
            seen.push((patched, window.patch(), window.patches()));
        }

        assert_eq!(seen, [(true, false, 1), (false, false, 1), (true, false, 2)]);
    }

    #[test]
    fn a_file_that_grows_is_seen_when_the_patch_is_gone() {
        let (window, mut file) = (window(), file_of(7, 4096));
        window.map(file.as_fd(), 0, 0, SLOT_BYTES, BOTH).unwrap();
        window.patch();

        file.write_all(&[8; 4096]).unwrap();
        window.unpatch().unwrap();

        assert_eq!(peek(&window, 4096).unwrap(), 8);
        assert!(peek(&window, 8192).is_err());
    }

    /// How many mappings of the process lie in the window; neighbours that nobody can access count, too.
    fn mappings(window: &Window) -> usize {
        let (start, end) = (window.start, window.start + to_usize(window.bytes));
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let number = |digits| usize::from_str_radix(digits, 16).unwrap();
        let ranges =
            maps.lines().map(|line| line.split_once(' ').unwrap().0.split_once('-').unwrap());
        ranges.filter(|(from, to)| number(from) < end && number(to) > start).count()
    }

    #[test]
    fn a_slot_takes_two_mappings_however_often_its_file_changes() {
        let (window, file) = (window(), file_of(7, 3 << 20));
        for slot in 0..4 {
            window.map(file.as_fd(), 0, slot * SLOT_BYTES, SLOT_BYTES, BOTH).unwrap();
        }

        for pages in [1, 300, 7, 200, 100, 511] {
            file.set_len(pages * 4096).unwrap();
            window.patch();
            assert!(mappings(&window) <= 2 * 4 + 1, "{}", mappings(&window));
            window.unpatch().unwrap();
            assert!(mappings(&window) <= 4 + 1, "{}", mappings(&window));
        }
    }

    /// Uses up the mappings that the process may have (`vm.max_map_count`): no call succeeds that would
    /// leave more than there are; with `beyond`, none that makes one.
    pub fn use_up_mappings(beyond: bool) {
        let most = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let most = most.trim().parse().unwrap();
        let page = to_usize(page_bytes());
        let none = ptr::null_mut();
        // SAFETY: a new mapping that replaces nothing, of which every second page becomes another one.
        unsafe {
            let start = libc::mmap(none, most * page, libc::PROT_NONE, RESERVED, -1, 0);
            let split =
                |nth| libc::mprotect(start.byte_add(nth * page), page, libc::PROT_READ) == 0;
            assert!((1..most).step_by(2).any(|nth| !split(nth)));
            // The last one that may be made: the kernel compares before it counts.
            assert!(!beyond || libc::mmap(none, page, BOTH, RESERVED, -1, 0) != libc::MAP_FAILED);
        }
    }

    #[test]
    fn without_mappings_left_what_is_mapped_stays_and_what_is_asked_for_fails() {
        let (window, file, other) = (window(), file_of(7, 5000), file_of(8, 5000));
        window.map(file.as_fd(), 0, 0, SLOT_BYTES, BOTH).unwrap();
        let outcome = |beyond| {
            in_a_child(|| {
                use_up_mappings(beyond);
                let map =
                    |place| errno(window.map(other.as_fd(), 0, place, SLOT_BYTES, libc::PROT_READ));
                let refused = [map(0), map(SLOT_BYTES)];
                refused == [Some(libc::ENOMEM); 2]
                    && peek(&window, 0).ok() == Some(7)
                    && peek(&window, SLOT_BYTES).is_err()
                    // Which makes no new one, but needs one for a moment.
                    && window.unmap(0, SLOT_BYTES).is_ok() != beyond
                    && window.is_used() == beyond
                    && peek(&window, 0).is_ok() == beyond
            })
        };

        assert_eq!([false, true].map(outcome), [true, true]);
    }

    #[test]
    fn zeros_for_which_there_are_no_mappings_left_are_not_there_and_those_that_are_stay() {
        let (window, patched, file) = (window(), file_of(7, 5000), file_of(8, 5000));
        window.map(patched.as_fd(), 0, 0, SLOT_BYTES, BOTH).unwrap();
        window.patch();
        window.map(file.as_fd(), 0, SLOT_BYTES, SLOT_BYTES, BOTH).unwrap();

        assert!(in_a_child(|| {
            use_up_mappings(true);
            !window.patch()
                && peek(&window, SLOT_BYTES + 8192).is_err()
                && peek(&window, SLOT_BYTES).ok() == Some(8)
                // Nothing may be done for the guest now.
                && errno(window.unpatch()) == Some(libc::ENOMEM)
                && errno(window.unpatch()) == Some(libc::ENOMEM)
                && peek(&window, 8192).ok() == Some(0)
        }));
    }

    #[test]
    fn a_file_that_cannot_be_shown_again_is_gone() {
        let (window, file) = (window(), file_of(7, 5000));
        window.map(file.as_fd(), 0, 0, SLOT_BYTES, BOTH).unwrap();
        window.patch();

        assert!(in_a_child(|| {
            use_up_mappings(false);
            window.unpatch().is_ok() && !window.is_used() && peek(&window, 0).is_err()
        }));
    }

    #[test]
    fn nothing_is_left_after_a_clear() {
        let (window, file) = (window(), file_of(7, 1));
        window.map(file.as_fd(), 0, 3 * SLOT_BYTES, SLOT_BYTES, BOTH).unwrap();
        window.patch();

        window.clear();

        assert!(peek(&window, 3 * SLOT_BYTES).is_err());
        assert!(!window.patch());
    }
}
