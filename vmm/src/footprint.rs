//! What keeps the memory of a process with a VM small. None of it changes what the process does.

use std::ffi::{c_int, c_void};
use std::ptr;

use libc::{Elf64_Phdr, PF_W, PT_LOAD, dl_phdr_info};

/// Makes all threads share one heap; to be called before the first thread starts.
///
/// glibc gives each thread a heap of its own, and each costs resident memory. The threads of a VM
/// allocate next to nothing once the guest runs, so they gain nothing from it.
pub fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets a tunable.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives back the heap and the code that only the start needed; to be called once the guest is up.
///
/// Most of the program parses, checks and sets up, and never runs again. What still runs comes back
/// from the page cache as it is touched.
pub fn give_back_startup_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim only releases memory that is free.
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: the callback keeps to what it is given, and needs no data.
    unsafe { libc::dl_iterate_phdr(Some(unmap_constant_segments), ptr::null_mut()) };
}

/// Unmaps the pages of the program's segments that are never written, code and constants.
extern "C" fn unmap_constant_segments(
    program: *mut dl_phdr_info,
    _: usize,
    _: *mut c_void,
) -> c_int {
    const STOP: c_int = 1; // the program itself is the first object
    // SAFETY: the caller passes an object that lives as long as the call.
    let program = unsafe { &*program };
    for index in 0..usize::from(program.dlpi_phnum) {
        // SAFETY: the object has `dlpi_phnum` headers.
        let segment = unsafe { &*program.dlpi_phdr.add(index) };
        if segment.p_type != PT_LOAD || segment.p_flags & PF_W != 0 {
            continue;
        }
        let Some((start, bytes)) = pages(program, segment) else { continue };
        let start = ptr::with_exposed_provenance_mut::<c_void>(start);
        // SAFETY: the range is a private mapping of the program's file that nobody has written to,
        // so that its pages read the same when they come back; segments share no page, as their
        // protection differs.
        unsafe { libc::madvise(start, bytes, libc::MADV_DONTNEED) };
    }
    STOP
}

/// Address and size, in bytes, of all pages of `segment`.
fn pages(program: &dl_phdr_info, segment: &Elf64_Phdr) -> Option<(usize, usize)> {
    // SAFETY: sysconf has no preconditions.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    let start = usize::try_from(program.dlpi_addr.wrapping_add(segment.p_vaddr)).ok()?;
    let before = start % page;
    Some((start - before, before + usize::try_from(segment.p_memsz).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    static CONSTANT: [u64; 1024] = [7; 1024];

    #[test]
    fn code_and_constants_come_back() {
        give_back_startup_memory();

        assert_eq!(std::hint::black_box(&CONSTANT).iter().sum::<u64>(), 7 * 1024);
    }
}
