//! Requests that the library does not know: a copy within the host, and a file without a name.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use fuse_backend_rs::abi::fuse_abi::{
    CopyFileRangeIn, CreateIn, EntryOut, InHeader, OpenOut, OutHeader, WriteOut,
};
use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingFlags};
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use fuse_backend_rs::transport::{FsCacheReqHandler, Reader, VirtioFsWriter};
use vm_memory::ByteValued;

use super::book::Open;
use super::ledger::Ledger;
use super::tree::Tree;
use super::unnamed;

/// `FUSE_COPY_FILE_RANGE` (linux/fuse.h).
const COPY_FILE_RANGE: u32 = 47;
/// `FUSE_TMPFILE` (linux/fuse.h).
const TMPFILE: u32 = 51;

/// Most bytes that one request copies, so that others do not wait for long. Programs ask again.
const MAX_COPY_BYTES: u64 = 16 << 20;

/// A request that is answered here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extension {
    /// Copies from file to file.
    CopyFileRange,
    /// Makes a file without a name.
    TmpFile,
}

impl Extension {
    /// What a request of kind `opcode` is, if it is one of these.
    pub fn of(opcode: u32) -> Option<Extension> {
        match opcode {
            COPY_FILE_RANGE => Some(Extension::CopyFileRange),
            TMPFILE => Some(Extension::TmpFile),
            _ => None,
        }
    }

    /// Serves the request. Returns the size of the answer in bytes.
    pub fn serve(
        self,
        ledger: &Ledger,
        mut request: Reader<'_>,
        mut answer: VirtioFsWriter<'_>,
    ) -> io::Result<usize> {
        let header: InHeader = request.read_obj()?;
        let result = match self {
            Extension::CopyFileRange => copy(ledger, &header, &mut request),
            Extension::TmpFile => create(ledger, &header, &mut request),
        };
        let head = head_of_answer(header.unique, result.as_ref().map(Vec::len));
        answer.write_all(&[head.as_slice(), &result.unwrap_or_default()].concat())?;
        Ok(head.len as usize)
    }
}

/// What an answer to the request `unique` begins with: `result` has the length of its body, in bytes.
pub(super) fn head_of_answer(unique: u64, result: Result<usize, &io::Error>) -> OutHeader {
    let error = result.err().map_or(0, |error| -error.raw_os_error().unwrap_or(libc::EIO));
    let bytes = size_of::<OutHeader>() + result.unwrap_or(0);
    let len = u32::try_from(bytes).expect("no more than MAX_MESSAGE_BYTES");
    OutHeader { len, error, unique }
}

fn copy(ledger: &Ledger, header: &InHeader, request: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let args: CopyFileRangeIn = request.read_obj()?;
    let context = Context::from(header);
    let tree = &ledger.tree;
    tree.writable()?;
    let open =
        |node, flags: SetupmappingFlags| tree.file(&context, ledger.file(node)?, flags.bits());
    let from = open(header.nodeid, SetupmappingFlags::READ)?;
    let to = open(args.nodeid_out, SetupmappingFlags::WRITE)?;
    let offset =
        |value| i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let (mut offset_in, mut offset_out) = (offset(args.offset_in)?, offset(args.offset_out)?);
    let bytes = usize::try_from(args.len.min(MAX_COPY_BYTES)).expect("16 MiB fit");
    // No flags are defined (copy_file_range(2)); a guest's kernel has refused them.
    // SAFETY: both offsets outlive the call.
    let copied = unsafe {
        let (source, target) = (from.as_raw_fd(), to.as_raw_fd());
        libc::copy_file_range(source, &raw mut offset_in, target, &raw mut offset_out, bytes, 0)
    };
    let copied = u32::try_from(copied).map_err(|_| io::Error::last_os_error())?;
    Ok(WriteOut { size: copied, padding: 0 }.as_slice().to_vec())
}

fn create(ledger: &Ledger, header: &InHeader, request: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let args: CreateIn = request.read_obj()?;
    let parent = ledger.file(header.nodeid)?;
    let (entry, handle) = ledger.tree.create_unnamed(&Context::from(header), parent, args)?;
    let entry = ledger.tell(entry);
    let open = Open { file: entry.inode, flags: args.flags, is_directory: false };
    let handle = ledger.book().open(handle, open);
    let open = OpenOut { fh: handle, open_flags: 0, passthrough: 0 };
    Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
}

impl Tree {
    /// Makes a file without a name in the file system of the directory `parent`. Returns it and its
    /// handle.
    fn create_unnamed(
        &self,
        context: &Context,
        parent: u64,
        args: CreateIn,
    ) -> io::Result<(Entry, u64)> {
        let directory = self.file(context, parent, 0)?;
        let mode = args.mode & 0o7777 & !(args.umask & 0o777);
        let flags = args.flags as i32;
        let (inode, handle) =
            self.make(context, |_| self.unnamed.create(&directory, flags, mode))?;
        let (attr, attr_timeout) = self.getattr(context, inode, None)?;
        Ok((Entry { inode, attr, attr_timeout, ..Entry::default() }, handle))
    }

    /// Gives the file of the node `inode` a name. While the guest believes in that, the name stands for
    /// the node that it has open; later it is a file of the library's.
    pub(super) fn link_unnamed(
        &self,
        context: &Context,
        (inode, file): (u64, &File),
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        unnamed::link(file, &self.file(context, parent, 0)?, name)?;
        let mut entry = self.lookup(context, parent, name)?;
        self.forget(context, entry.inode, 1);
        self.unnamed.remember(inode);
        entry.inode = inode;
        entry.attr.st_ino = inode;
        Ok(entry)
    }

    /// Opens the file of a node for what `flags` say; those of SETUPMAPPING.
    pub(super) fn file(&self, context: &Context, node: u64, flags: u64) -> io::Result<File> {
        // The library gives its files out for mappings only.
        let mut opened = Opened(None);
        self.setupmapping(context, node, 0, 0, 0, flags, 0, &mut opened)?;
        Ok(File::from(opened.0.expect("the library maps what it opens")))
    }
}

/// Keeps what the library opens to map it.
struct Opened(Option<OwnedFd>);

impl FsCacheReqHandler for Opened {
    fn map(&mut self, _: u64, _: u64, _: u64, _: u64, file: RawFd) -> io::Result<()> {
        // SAFETY: the library keeps the file open during the call.
        let file = unsafe { BorrowedFd::borrow_raw(file) };
        self.0 = Some(file.try_clone_to_owned()?);
        Ok(())
    }

    fn unmap(&mut self, _: Vec<RemovemappingOne>) -> io::Result<()> {
        Ok(())
    }
}
