//! Reads and writes whose data lies in the window: a program reads a file into what it has mapped of
//! another one, or writes it from there.
//!
//! Whoever touches the window may get a signal, as most of it is mapped nowhere and a file in it may end
//! before its last page. So the library, which copies what it parses, sees guest RAM only; here, data alone
//! may be in the window, and moves by system calls, which fail with EFAULT.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use fuse_backend_rs::abi::fuse_abi::{
    InHeader, OutHeader, READ_LOCKOWNER, ReadIn, WRITE_CACHE, WRITE_LOCKOWNER, WriteIn, WriteOut,
};
use fuse_backend_rs::api::filesystem::{Context, FileSystem, ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::extension::head_of_answer;
use super::ledger::Ledger;
use super::server::MAX_MESSAGE_BYTES;
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::Chain;

/// `FUSE_READ` and `FUSE_WRITE` (linux/fuse.h).
const READ: u32 = 15;
const WRITE: u32 = 16;

/// Serves the request in `chain`, a read or a write, whose data is anywhere in `window`, which is `ram` and
/// more; the answer is the error of `ready`, if it is one. Returns the size of the answer in bytes.
pub(super) fn serve(
    ledger: &Ledger,
    chain: &Chain<'_>,
    ram: &GuestMemoryMmap,
    window: &GuestMemoryMmap,
    ready: io::Result<()>,
) -> io::Result<usize> {
    // Taken once: the guest may change its descriptors.
    let (writable, readable): (Vec<_>, Vec<_>) =
        chain.clone().partition(|descriptor| descriptor.is_write_only());
    let mut request = Pieces::new(readable)?;
    let mut answer = Pieces::new(writable)?;
    let header: InHeader = request.take(ram)?;
    let context = Context::from(&header);
    let mut head = answer.split_off(size_of::<OutHeader>())?;
    let (result, body) = match header.opcode {
        READ => {
            let data = Data(answer.within(window)?);
            let args = request.take(ram)?;
            let moved = ready.and_then(|()| read(ledger, &context, header.nodeid, args, data));
            (moved, Vec::new())
        }
        WRITE => {
            let args = request.take(ram)?;
            let data = Data(request.within(window)?);
            let written = ready.and_then(|()| write(ledger, &context, header.nodeid, args, data));
            let body = written.as_ref().map_or(Vec::new(), |&size| {
                let size = u32::try_from(size).expect("no more than was sent");
                WriteOut { size, padding: 0 }.as_slice().to_vec()
            });
            (written.map(|_| body.len()), body)
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    answer.put(ram, &body)?;
    let header = head_of_answer(header.unique, result.as_ref().copied());
    head.put(ram, header.as_slice())?;
    Ok(header.len as usize)
}

fn read(
    ledger: &Ledger,
    context: &Context,
    node: u64,
    args: ReadIn,
    mut data: Data,
) -> io::Result<usize> {
    let owner = (args.read_flags & READ_LOCKOWNER != 0).then_some(args.lock_owner);
    ledger.read(context, node, args.fh, &mut data, args.size, args.offset, owner, args.flags)
}

fn write(
    ledger: &Ledger,
    context: &Context,
    node: u64,
    args: WriteIn,
    mut data: Data,
) -> io::Result<usize> {
    let WriteIn { fh, offset, size, fuse_flags, lock_owner, flags, .. } = args;
    let owner = (fuse_flags & WRITE_LOCKOWNER != 0).then_some(lock_owner);
    let is_delayed = fuse_flags & WRITE_CACHE != 0;
    ledger.write(context, node, fh, &mut data, size, offset, owner, is_delayed, flags, fuse_flags)
}

/// What is left of the buffers of one direction.
struct Pieces(VecDeque<Descriptor>);

impl Pieces {
    fn new(descriptors: Vec<Descriptor>) -> io::Result<Self> {
        let bytes: u64 = descriptors.iter().map(|descriptor| u64::from(descriptor.len())).sum();
        if bytes > MAX_MESSAGE_BYTES as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Pieces(descriptors.into()))
    }

    /// The first `bytes` of them, which are taken away here.
    fn split_off(&mut self, bytes: usize) -> io::Result<Self> {
        let mut left = u32::try_from(bytes).map_err(io::Error::other)?;
        let mut first = VecDeque::new();
        while left > 0 {
            let piece = self.0.pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
            let (address, taken) = (piece.addr().0, piece.len().min(left));
            first.push_back(Descriptor::new(address, taken, 0, 0));
            if taken < piece.len() {
                let rest = address.checked_add(taken.into()).ok_or(io::ErrorKind::InvalidInput)?;
                self.0.push_front(Descriptor::new(rest, piece.len() - taken, 0, 0));
            }
            left -= taken;
        }
        Ok(Pieces(first))
    }

    /// Their bytes in `memory`.
    fn within(&self, memory: &GuestMemoryMmap) -> io::Result<Buffers> {
        let mut buffers = Buffers::new(memory.clone());
        buffers.add(self.0.iter().copied()).map_err(io::Error::other)?;
        Ok(buffers)
    }

    /// Takes a structure away that lies in `ram`.
    fn take<T: ByteValued + Default>(&mut self, ram: &GuestMemoryMmap) -> io::Result<T> {
        let mut object = T::default();
        self.split_off(size_of::<T>())?.within(ram)?.copy_out(0, object.as_mut_slice());
        Ok(object)
    }

    /// Fills the first of them with `bytes`, in `ram`.
    fn put(&mut self, ram: &GuestMemoryMmap, bytes: &[u8]) -> io::Result<()> {
        self.split_off(bytes.len())?.within(ram)?.copy_in(0, bytes);
        Ok(())
    }
}

/// The data of a request, for system calls only; what was moved is gone from it.
struct Data(Buffers);

impl Data {
    fn pass(
        &mut self,
        count: usize,
        pass: impl FnOnce(&[FileVolatileSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut left = count;
        let mut slices = Vec::with_capacity(self.0.slices());
        for slice in self.0.iovecs() {
            let bytes = slice.iov_len.min(left);
            // SAFETY: a part of the slice, whose memory the buffers keep.
            slices.push(unsafe { FileVolatileSlice::from_raw_ptr(slice.iov_base.cast(), bytes) });
            left -= bytes;
        }
        let passed = pass(&slices)?;
        self.0.skip(passed);
        Ok(passed)
    }
}

impl ZeroCopyReader for Data {
    fn read_to(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        self.pass(count, |slices| file.write_vectored_at_volatile(slices, offset))
    }
}

impl ZeroCopyWriter for Data {
    fn write_from(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        self.pass(count, |slices| file.read_vectored_at_volatile(slices, offset))
    }

    fn available_bytes(&self) -> usize {
        self.0.bytes()
    }
}

// The traits above ask for these; nothing that copies may touch the data.
impl Read for Data {
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EFAULT))
    }
}

impl Write for Data {
    fn write(&mut self, _buffer: &[u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EFAULT))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
