//! Mappings that come into the place of others, in memory that a guest can reach at any time.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// A mapping that was made aside, at an address that nobody knows: what cannot be made takes nothing away.
pub struct Aside {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Aside {
    /// Maps `bytes` bytes of a file from an offset on, or of fresh memory, with `protection` and `flags` as for
    /// mmap(2).
    pub fn map(
        bytes: usize,
        protection: i32,
        flags: i32,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> io::Result<Self> {
        assert!(flags & libc::MAP_FIXED == 0, "it has no place yet");
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let address = unsafe { map_at(ptr::null_mut(), bytes, protection, flags, file) }?;
        Ok(Aside { address, bytes })
    }

    /// Advice is best effort.
    pub fn advise(&self, advice: i32) {
        // SAFETY: the mapping is this one's own, and nobody has a reference to it.
        unsafe { libc::madvise(self.address, self.bytes, advice) };
    }

    /// Replaces what is at `target`, of the same size. If that fails, what was there still is.
    ///
    /// # Safety
    ///
    /// It must be the caller's for the rest of the process, and nobody may have a reference to it.
    pub unsafe fn put(self, target: *mut libc::c_void) -> io::Result<()> {
        let (bytes, flags) = (self.bytes, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: the mapping has the size of what it replaces, of which the caller says that it may be.
        let moved = unsafe { libc::mremap(self.address, bytes, bytes, flags, target) };
        if moved == target {
            mem::forget(self);
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // It counts where mappings are short.
        drop(self);
        must_be_kept(target.addr(), bytes);
        Err(error)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // SAFETY: it is this one's own, and nobody has a reference to it.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

/// Maps as mmap(2) does, `file` from an offset in bytes on, and fresh memory without one.
///
/// # Safety
///
/// With MAP_FIXED among the `flags`, it must be fine to replace what is at `address`.
pub unsafe fn map_at(
    address: *mut libc::c_void,
    bytes: usize,
    protection: i32,
    flags: i32,
    file: Option<(BorrowedFd<'_>, u64)>,
) -> io::Result<*mut libc::c_void> {
    let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: as the caller promises.
    let mapped = unsafe { libc::mmap(address, bytes, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped) }
}

/// Ends the process if a mapping that failed has taken away what was at `address`: whatever the process maps
/// next might come there, for the guest to read and write.
///
/// Linux looks whether the process may have another mapping (`vm.max_map_count`, RLIMIT_AS) before it takes
/// anything away; what is left is that it has no memory for a structure of its own.
pub fn must_be_kept(address: usize, bytes: usize) {
    let address = ptr::without_provenance_mut(address);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let flags = flags | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: this replaces nothing.
    let mapped = unsafe { map_at(address, bytes, libc::PROT_NONE, flags, None) };
    // Otherwise something is there, or there may be no more mappings, as was said before.
    assert!(mapped.is_err(), "the kernel has no memory for a mapping");
}
