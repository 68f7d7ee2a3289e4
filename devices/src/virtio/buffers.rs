//! Guest buffers in the form `readv` and `writev` take, so that data moves between guest memory
//! and a file descriptor without a copy in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryError, GuestMemoryMmap};

/// Most pieces of memory one system call takes (UIO_MAXIOV in linux/uio.h).
const MAX_SLICES: usize = 1024;

/// Why a chain's buffers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BufferError {
    /// A descriptor names memory the guest does not have.
    #[error("a buffer is not in guest memory")]
    OutOfMemory(#[source] GuestMemoryError),
    /// A chain has more buffers than any honest driver has a use for.
    #[error("more than {MAX_SLICES} buffers")]
    TooMany,
}

/// Pieces of one guest's memory, in order, as one stretch of bytes.
///
/// The guest may change these bytes at any time: they are only ever copied, never looked at in
/// place.
pub struct Buffers {
    /// Keeps what the slices point into mapped.
    memory: GuestMemoryMmap,
    slices: Vec<libc::iovec>,
    bytes: usize,
}

// SAFETY: the pointers lead into the shared mapping of guest memory, which `memory` keeps alive,
// which any thread may access, and which nobody owns.
unsafe impl Send for Buffers {}

impl Buffers {
    /// No bytes yet of `memory`.
    pub fn new(memory: GuestMemoryMmap) -> Self {
        Buffers { memory, slices: Vec::new(), bytes: 0 }
    }

    /// Length of the stretch, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many pieces of memory there are; a bound for what `add` may still take.
    pub fn slices(&self) -> usize {
        self.slices.len()
    }

    /// Forgets every piece, but not the room for them.
    pub fn clear(&mut self) {
        self.slices.clear();
        self.bytes = 0;
    }

    /// Adds the buffers of `descriptors` at the end and returns their length, in bytes. If one of
    /// them is bad, none is added.
    pub fn add(
        &mut self,
        descriptors: impl Iterator<Item = Descriptor>,
    ) -> Result<usize, BufferError> {
        let (slices, bytes) = (self.slices.len(), self.bytes);
        for descriptor in descriptors {
            if let Err(error) = self.add_one(descriptor) {
                self.slices.truncate(slices);
                self.bytes = bytes;
                return Err(error);
            }
        }
        Ok(self.bytes - bytes)
    }

    fn add_one(&mut self, descriptor: Descriptor) -> Result<(), BufferError> {
        for slice in self.memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            let slice = slice.map_err(BufferError::OutOfMemory)?;
            if self.slices.len() == MAX_SLICES {
                return Err(BufferError::TooMany);
            }
            self.bytes += slice.len();
            self.slices.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        Ok(())
    }

    /// Drops the first `count` bytes, or all if there are fewer.
    pub fn skip(&mut self, count: usize) {
        let mut left = count.min(self.bytes);
        self.bytes -= left;
        let whole = self.slices.iter().take_while(|slice| {
            let fits = slice.iov_len <= left;
            left -= if fits { slice.iov_len } else { 0 };
            fits
        });
        let whole = whole.count();
        self.slices.drain(..whole);
        if let Some(first) = self.slices.first_mut() {
            // `left` is less than the length of this slice, so the pointer stays inside it.
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(left).cast();
            first.iov_len -= left;
        }
    }

    /// Keeps the first `count` bytes only.
    pub fn truncate(&mut self, count: usize) {
        let mut left = count.min(self.bytes);
        self.bytes = left;
        let mut kept = 0;
        for slice in &mut self.slices {
            if left == 0 {
                break;
            }
            slice.iov_len = slice.iov_len.min(left);
            left -= slice.iov_len;
            kept += 1;
        }
        self.slices.truncate(kept);
    }

    /// Copies the bytes at `offset` out into `data`; returns how many there were.
    pub fn copy_out(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut copied = 0;
        self.for_each_at(offset, data.len(), |guest, length| {
            let piece = &mut data[copied..copied + length];
            // SAFETY: `guest` is valid for `length` bytes of the mapping that `self.memory` keeps
            // alive, and `piece`, which is ours alone, has that length.
            unsafe { guest.copy_to_nonoverlapping(piece.as_mut_ptr(), length) };
            copied += length;
        });
        copied
    }

    /// Copies `data` to the bytes at `offset`; returns how many there was room for.
    pub fn copy_in(&self, offset: usize, data: &[u8]) -> usize {
        let mut copied = 0;
        self.for_each_at(offset, data.len(), |guest, length| {
            let piece = &data[copied..copied + length];
            // SAFETY: `guest` is valid for `length` bytes of the mapping that `self.memory` keeps
            // alive, and `piece`, which the guest cannot reach, has that length.
            unsafe { guest.copy_from_nonoverlapping(piece.as_ptr(), length) };
            copied += length;
        });
        copied
    }

    fn for_each_at(&self, offset: usize, count: usize, mut copy: impl FnMut(*mut u8, usize)) {
        let (mut skip, mut left) = (offset, count);
        for slice in &self.slices {
            if skip >= slice.iov_len {
                skip -= slice.iov_len;
                continue;
            }
            let length = left.min(slice.iov_len - skip);
            if length == 0 {
                break;
            }
            copy(slice.iov_base.cast::<u8>().wrapping_add(skip), length);
            left -= length;
            skip = 0;
        }
    }

    /// The pieces as system calls take them. The pointers are good until the buffers are changed or
    /// dropped.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.slices
    }

    /// Whether every piece begins at a multiple of `address` and has a multiple of `length`, both in
    /// bytes of this process.
    pub fn is_aligned(&self, address: usize, length: usize) -> bool {
        self.slices
            .iter()
            .all(|slice| slice.iov_base.addr() % address == 0 && slice.iov_len % length == 0)
    }

    /// Fills the stretch from `fd`, as far as one `readv` goes.
    pub fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.call(fd, libc::readv)
    }

    /// Writes the stretch to `fd`, as far as one `writev` goes.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.call(fd, libc::writev)
    }

    /// Fills the stretch from byte `offset` of `fd` on, as far as one `preadv` goes.
    pub fn read_from_at(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.call_at(fd, offset, libc::preadv64)
    }

    /// Writes the stretch to byte `offset` of `fd` on, as far as one `pwritev` goes.
    pub fn write_to_at(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.call_at(fd, offset, libc::pwritev64)
    }

    fn call(
        &self,
        fd: BorrowedFd<'_>,
        call: unsafe extern "C" fn(RawFd, *const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<usize> {
        // SAFETY: each slice is valid for reads and writes as long as `self.memory` lives, and `fd`
        // is open for the duration of the call.
        outcome(unsafe { call(fd.as_raw_fd(), self.slices.as_ptr(), self.count()) })
    }

    fn call_at(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        call: unsafe extern "C" fn(RawFd, *const libc::iovec, libc::c_int, i64) -> isize,
    ) -> io::Result<usize> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: as in `call`.
        outcome(unsafe { call(fd.as_raw_fd(), self.slices.as_ptr(), self.count(), offset) })
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.slices.len()).expect("there are at most MAX_SLICES slices")
    }
}

fn outcome(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::testing::{MEMORY_BYTES, memory};

    fn descriptor(address: u64, length: u32) -> Descriptor {
        Descriptor::new(address, length, 0, 0)
    }

    /// "abcdef" in three pieces, one of them empty.
    fn abcdef() -> Buffers {
        let memory = memory();
        memory.write_slice(b"ab", GuestAddress(0x1000)).unwrap();
        memory.write_slice(b"cdef", GuestAddress(0x2000)).unwrap();
        let mut buffers = Buffers::new(memory);
        let pieces = [descriptor(0x1000, 2), descriptor(0x1800, 0), descriptor(0x2000, 4)];
        assert_eq!(buffers.add(pieces.into_iter()).unwrap(), 6);
        buffers
    }

    fn content(buffers: &Buffers) -> Vec<u8> {
        let mut data = vec![0; buffers.bytes()];
        assert_eq!(buffers.copy_out(0, &mut data), data.len());
        data
    }

    #[test]
    fn pieces_read_as_one_stretch() {
        assert_eq!(content(&abcdef()), b"abcdef");
    }

    #[test]
    fn skip_may_end_inside_a_piece() {
        let mut buffers = abcdef();
        buffers.skip(3);
        assert_eq!(content(&buffers), b"def");
    }

    #[test]
    fn skip_past_the_end_leaves_nothing() {
        let mut buffers = abcdef();
        buffers.skip(7);
        assert_eq!(content(&buffers), b"");
    }

    #[test]
    fn truncate_may_end_inside_a_piece() {
        let mut buffers = abcdef();
        buffers.truncate(3);
        assert_eq!(content(&buffers), b"abc");
    }

    #[test]
    fn copies_stop_at_the_end() {
        let buffers = abcdef();
        let mut data = [0; 8];
        assert_eq!(buffers.copy_out(4, &mut data), 2);
        assert_eq!(buffers.copy_in(5, b"XY"), 1);
        assert_eq!(content(&buffers), b"abcdeX");
    }

    #[test]
    fn memory_the_guest_does_not_have_is_refused_whole() {
        let mut buffers = abcdef();
        let end = MEMORY_BYTES as u64;
        let pieces = [descriptor(0x3000, 1), descriptor(end - 1, 2)];

        buffers.add(pieces.into_iter()).unwrap_err();

        assert_eq!(content(&buffers), b"abcdef");
    }

    #[test]
    fn an_address_that_overflows_is_refused() {
        let mut buffers = Buffers::new(memory());
        buffers.add([descriptor(u64::MAX, 2)].into_iter()).unwrap_err();
    }

    #[test]
    fn one_crooked_piece_makes_the_stretch_unaligned() {
        let mut buffers = Buffers::new(memory());
        buffers.add([descriptor(0x1000, 512)].into_iter()).unwrap();
        assert!(buffers.is_aligned(512, 512));
        assert!(!buffers.is_aligned(512, 1024));

        buffers.add([descriptor(0x2100, 512)].into_iter()).unwrap();

        assert!(buffers.is_aligned(256, 512));
        assert!(!buffers.is_aligned(512, 512));
    }

    #[test]
    fn too_many_pieces_are_refused() {
        let mut buffers = Buffers::new(memory());
        let pieces = (0..=MAX_SLICES).map(|_| descriptor(0x1000, 1));
        assert!(matches!(buffers.add(pieces), Err(BufferError::TooMany)));
    }

    #[test]
    fn bytes_go_to_a_file_and_back() {
        let file: File = tempfile::tempfile().unwrap();
        let buffers = abcdef();

        assert_eq!(buffers.write_to_at(file.as_fd(), 10).unwrap(), 6);
        buffers.copy_in(0, b"......");
        assert_eq!(buffers.read_from_at(file.as_fd(), 11).unwrap(), 5);

        assert_eq!(content(&buffers), b"bcdef.");
    }
}
