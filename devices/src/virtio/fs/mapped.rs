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
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::ledger::Ledger;
use super::server::{MAX_MESSAGE_BYTES, READ, WRITE};
use crate::virtio::queue::Chain;

/// Serves the request in `chain`, a read or a write, whose data is anywhere in `window`, which is `ram` and
/// more. Returns the size of the answer in bytes.
pub(super) fn serve(
    ledger: &Ledger,
    chain: &Chain<'_>,
    ram: &GuestMemoryMmap,
    window: &GuestMemoryMmap,
) -> io::Result<usize> {
    // Taken once: the guest may change its descriptors.
    let (writable, readable): (Vec<_>, Vec<_>) =
        chain.clone().partition(|descriptor| descriptor.is_write_only());
    let mut request = Pieces::new(&readable)?;
    let mut answer = Pieces::new(&writable)?;
    let header: InHeader = request.take(ram)?;
    let context = Context::from(&header);
    let mut head = answer.split_off(size_of::<OutHeader>())?;
    let (result, body) = match header.opcode {
        READ => {
            let data = Data::new(&answer, window)?;
            (read(ledger, &context, header.nodeid, request.take(ram)?, data), Vec::new())
        }
        WRITE => {
            let args = request.take(ram)?;
            let written =
                write(ledger, &context, header.nodeid, args, Data::new(&request, window)?);
            let body = written.as_ref().map_or(Vec::new(), |&size| {
                let size = u32::try_from(size).expect("no more than was sent");
                WriteOut { size, padding: 0 }.as_slice().to_vec()
            });
            (written.map(|_| body.len()), body)
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    answer.put(ram, &body)?;
    let (error, bytes) = match result {
        Ok(bytes) => (0, size_of::<OutHeader>() + bytes),
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), size_of::<OutHeader>()),
    };
    let len = u32::try_from(bytes).expect("no more than MAX_MESSAGE_BYTES");
    head.put(ram, OutHeader { len, error, unique: header.unique }.as_slice())?;
    Ok(bytes)
}

fn read(
    ledger: &Ledger,
    context: &Context,
    node: u64,
    args: ReadIn,
    mut data: Data<'_>,
) -> io::Result<usize> {
    let owner = (args.read_flags & READ_LOCKOWNER != 0).then_some(args.lock_owner);
    ledger.read(context, node, args.fh, &mut data, args.size, args.offset, owner, args.flags)
}

fn write(
    ledger: &Ledger,
    context: &Context,
    node: u64,
    args: WriteIn,
    mut data: Data<'_>,
) -> io::Result<usize> {
    let WriteIn { fh, offset, size, fuse_flags, lock_owner, flags, .. } = args;
    let owner = (fuse_flags & WRITE_LOCKOWNER != 0).then_some(lock_owner);
    let is_delayed = fuse_flags & WRITE_CACHE != 0;
    ledger.write(context, node, fh, &mut data, size, offset, owner, is_delayed, flags, fuse_flags)
}

/// What is left of the buffers of one direction: addresses, and lengths in bytes.
struct Pieces(VecDeque<(GuestAddress, usize)>);

impl Pieces {
    fn new(descriptors: &[Descriptor]) -> io::Result<Self> {
        let bytes: u64 = descriptors.iter().map(|descriptor| u64::from(descriptor.len())).sum();
        if bytes > MAX_MESSAGE_BYTES as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let piece = |descriptor: &Descriptor| (descriptor.addr(), descriptor.len() as usize);
        Ok(Pieces(descriptors.iter().map(piece).collect()))
    }

    /// The first `bytes` of them, which are taken away here.
    fn split_off(&mut self, mut bytes: usize) -> io::Result<Self> {
        let mut first = VecDeque::new();
        while bytes > 0 {
            let (address, length) = self.0.pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
            let taken = length.min(bytes);
            first.push_back((address, taken));
            if taken < length {
                let rest =
                    address.0.checked_add(taken as u64).ok_or(io::ErrorKind::InvalidInput)?;
                self.0.push_front((GuestAddress(rest), length - taken));
            }
            bytes -= taken;
        }
        Ok(Pieces(first))
    }

    /// Takes a structure away that lies in `ram`.
    fn take<T: ByteValued + Default>(&mut self, ram: &GuestMemoryMmap) -> io::Result<T> {
        let mut object = T::default();
        let mut bytes = object.as_mut_slice();
        for (address, length) in self.split_off(bytes.len())?.0 {
            let (piece, rest) = bytes.split_at_mut(length);
            ram.read_slice(piece, address).map_err(io::Error::other)?;
            bytes = rest;
        }
        Ok(object)
    }

    /// Fills the first of them with `bytes`, in `ram`.
    fn put(&mut self, ram: &GuestMemoryMmap, mut bytes: &[u8]) -> io::Result<()> {
        for (address, length) in self.split_off(bytes.len())?.0 {
            let (piece, rest) = bytes.split_at(length);
            ram.write_slice(piece, address).map_err(io::Error::other)?;
            bytes = rest;
        }
        Ok(())
    }
}

/// The data of a request, for system calls only.
struct Data<'m>(Vec<FileVolatileSlice<'m>>);

impl<'m> Data<'m> {
    fn new(pieces: &Pieces, window: &'m GuestMemoryMmap) -> io::Result<Self> {
        let mut slices = Vec::new();
        for &(address, length) in &pieces.0 {
            for slice in window.get_slices(address, length) {
                let slice = slice.map_err(io::Error::other)?;
                slices.push(FileVolatileSlice::from_volatile_slice(&slice));
            }
        }
        Ok(Data(slices))
    }

    /// The first `bytes` of it.
    fn first(&self, mut bytes: usize) -> Vec<FileVolatileSlice<'m>> {
        let mut first = Vec::with_capacity(self.0.len());
        for slice in &self.0 {
            let taken = slice.len().min(bytes);
            if taken == 0 {
                continue;
            }
            // SAFETY: a part of `slice`, whose memory the borrow of the window keeps.
            first.push(unsafe { FileVolatileSlice::from_raw_ptr(slice.as_ptr(), taken) });
            bytes -= taken;
        }
        first
    }
}

impl ZeroCopyReader for Data<'_> {
    fn read_to(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        file.write_vectored_at_volatile(&self.first(count), offset)
    }
}

impl ZeroCopyWriter for Data<'_> {
    fn write_from(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        file.read_vectored_at_volatile(&self.first(count), offset)
    }

    fn available_bytes(&self) -> usize {
        self.0.iter().map(FileVolatileSlice::len).sum()
    }
}

// The traits above ask for these; nothing that copies may touch the data.
impl Read for Data<'_> {
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EFAULT))
    }
}

impl Write for Data<'_> {
    fn write(&mut self, _buffer: &[u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EFAULT))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
