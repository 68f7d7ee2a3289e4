//! What a block device asks of the host's kernel that the standard library does not offer.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// ioctls of linux/fs.h, which differ between architectures in the part they share: BLKSSZGET is
/// `_IO(0x12, 104)`, these are 119 and 127.
const BLKDISCARD: libc::Ioctl = libc::BLKSSZGET + 15;
const BLKZEROOUT: libc::Ioctl = libc::BLKSSZGET + 23;

/// Alignment of direct I/O where the host does not say: no file system asks for more.
const SAFE_ALIGNMENT: Alignment = Alignment { memory: 4096, file: 4096 };

/// What direct I/O must be a multiple of, in bytes; powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// For addresses of memory.
    pub memory: usize,
    /// For offsets in the file and for lengths.
    pub file: usize,
}

/// What direct I/O on `file` takes.
pub fn direct_alignment(file: &File) -> Alignment {
    asked_of_file(file).or_else(|| asked_of_device(file)).unwrap_or(SAFE_ALIGNMENT)
}

/// Linux 6.1 and later say it of files.
fn asked_of_file(file: &File) -> Option<Alignment> {
    // SAFETY: a structure of integers may be all zeros.
    let mut facts: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, and the kernel fills in one structure, which is ours.
    let result = unsafe {
        let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
        libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, &raw mut facts)
    };
    let known = result == 0 && facts.stx_mask & libc::STATX_DIOALIGN != 0;
    known.then(|| alignment(facts.stx_dio_mem_align, facts.stx_dio_offset_align)).flatten()
}

/// Every Linux says it of block devices.
fn asked_of_device(file: &File) -> Option<Alignment> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET stores one int, which is ours; what is no block device does not know it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut bytes) };
    let bytes = u32::try_from(bytes).ok().filter(|_| result == 0)?;
    alignment(bytes, bytes)
}

fn alignment(memory: u32, file: u32) -> Option<Alignment> {
    let power = |bytes: u32| usize::try_from(bytes).ok().filter(|bytes| bytes.is_power_of_two());
    Some(Alignment { memory: power(memory)?, file: power(file)? })
}

/// Gives back the storage of `bytes` of a file from `offset` on, which then read as zeros.
pub fn punch_hole(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, bytes)
}

/// Fills `bytes` of a file from `offset` on with zeros, and keeps their storage.
pub fn zero_range(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, bytes)
}

/// Lets a block device forget `bytes` from `offset` on.
pub fn discard_device(device: &File, offset: u64, bytes: u64) -> io::Result<()> {
    range_ioctl(device, BLKDISCARD, offset, bytes)
}

/// Fills `bytes` of a block device from `offset` on with zeros, and keeps their storage.
pub fn zero_device(device: &File, offset: u64, bytes: u64) -> io::Result<()> {
    range_ioctl(device, BLKZEROOUT, offset, bytes)
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
    let signed = |value: u64| i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let (offset, bytes) = (signed(offset)?, signed(bytes)?);
    // SAFETY: the call touches no memory of this process.
    outcome(unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, bytes) })
}

fn range_ioctl(device: &File, request: libc::Ioctl, offset: u64, bytes: u64) -> io::Result<()> {
    let range = [offset, bytes];
    // SAFETY: both requests read two 64-bit numbers, which outlive the call.
    outcome(unsafe { libc::ioctl(device.as_raw_fd(), request, &raw const range) })
}

fn outcome(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_linux_fs_h() {
        let number = |request: libc::Ioctl| request & 0xffff;
        assert_eq!(number(BLKDISCARD), 0x1277);
        assert_eq!(number(BLKZEROOUT), 0x127f);
    }

    #[test]
    fn an_alignment_of_nothing_is_none() {
        assert_eq!(alignment(0, 512), None);
        assert_eq!(alignment(4, 512), Some(Alignment { memory: 4, file: 512 }));
    }
}
