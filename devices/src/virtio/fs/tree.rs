//! The shared directory as a FUSE file system: the library's, with what a container needs on top.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, WRITE_KILL_PRIV, stat64, statvfs64};
use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingFlags};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::FsCacheReqHandler;

use super::access::{Access, is_read_only};
use super::listing::{Listings, Take};
use super::opening::Opening;
use super::server::{Cache, Options};
use super::unnamed::{self, Unnamed};
use super::window::Window;

/// Longest value of an extended attribute, and longest list of them, in bytes (Linux, limits.h).
const MAX_XATTR_BYTES: u32 = 64 << 10;

/// What is wanted of a guest beyond what the library asks for. Locks are not: the guest's kernel
/// keeps them, as it alone knows all who share a file of the container.
const WANTED: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::PARALLEL_DIROPS);

/// Least that is read of a directory at once, in bytes: the longest name has room in it.
const LISTING_BYTES: u32 = 1 << 10;

/// What needs a DAX window.
const OF_WINDOW: FsOptions = FsOptions::PERFILE_DAX;

/// A directory tree of the host, with everything mounted in it.
///
/// To the library's file system this adds: a read-only variant; files without a name; owners that do
/// not depend on the guest's groups; and what a guest may spare itself.
pub(super) struct Tree {
    pub(super) files: PassthroughFs,
    access: Access,
    pub(super) cache: Cache,
    window: Option<Arc<Window>>,
    pub(super) opening: Opening,
    /// Files that the library does not know.
    pub unnamed: Unnamed,
    listings: Listings,
    /// User and group of the thread that serves.
    pub(super) owner: OnceLock<(u32, u32)>,
}

impl Tree {
    /// A tree over `files`, which use host inode numbers for nodes, mapped in the window of `options`.
    pub fn new(files: PassthroughFs, options: &Options) -> Self {
        let Options { read_only, cache, window, .. } = options;
        let access = if *read_only { Access::ReadOnly } else { Access::ReadWrite };
        let (cache, window) = (*cache, window.clone());
        let (opening, unnamed, listings, owner) = Default::default();
        Tree { files, access, cache, window, opening, unnamed, listings, owner }
    }

    /// EROFS unless the guest may change something.
    pub fn writable(&self) -> io::Result<()> {
        self.access.check()
    }
}

impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let refused = if self.window.is_some() { FsOptions::empty() } else { OF_WINDOW };
        Ok(self.files.init(capable.difference(refused))? | WANTED)
    }

    fn destroy(&self) {
        if let Some(window) = &self.window {
            window.clear();
        }
        self.unnamed.clear();
        self.opening.clear();
        self.listings.clear();
        self.files.destroy();
    }

    fn setupmapping(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        length: u64,
        flags: u64,
        place: u64,
        mapper: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        if flags & SetupmappingFlags::WRITE.bits() != 0 {
            self.writable()?;
        }
        if let Some(file) = self.unnamed.of_node(inode) {
            return mapper.map(offset, place, length, flags, file?.as_raw_fd());
        }
        self.files.setupmapping(context, inode, handle, offset, length, flags, place, mapper)
    }

    fn removemapping(
        &self,
        context: &Context,
        inode: u64,
        requests: Vec<RemovemappingOne>,
        mapper: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        self.files.removemapping(context, inode, requests, mapper)
    }

    fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        // Only a server of NFS asks for it; a directory that was moved would lead out of the tree.
        if name == c".." {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        self.files.lookup(context, parent, name)
    }

    fn forget(&self, context: &Context, inode: u64, count: u64) {
        if !self.unnamed.forget(inode, count) {
            self.opening.forget(inode);
            self.files.forget(context, inode, count);
        }
    }

    fn batch_forget(&self, context: &Context, mut requests: Vec<(u64, u64)>) {
        requests.retain(|&(inode, count)| !self.unnamed.forget(inode, count));
        requests.iter().for_each(|&(inode, _)| self.opening.forget(inode));
        self.files.batch_forget(context, requests);
    }

    fn getattr(
        &self,
        context: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        match self.unnamed.of(inode, handle) {
            Some(file) => Ok((unnamed::attributes(&*file?)?, Duration::ZERO)),
            None => self.files.getattr(context, inode, handle),
        }
    }

    fn setattr(
        &self,
        context: &Context,
        inode: u64,
        attributes: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.writable()?;
        if let Some(file) = self.unnamed.of(inode, handle) {
            unnamed::set_attributes(&*file?, &attributes, valid)?;
            return self.getattr(context, inode, handle);
        }
        self.files.setattr(context, inode, attributes, handle, valid)
    }

    fn readlink(&self, context: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.files.readlink(context, inode)
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make(context, |root| self.files.symlink(root, target, parent, name))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, |root| self.files.mknod(root, parent, name, mode, device, umask))
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, |root| self.files.mkdir(root, parent, name, mode, umask))
    }

    fn unlink(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        self.files.unlink(context, parent, name)
    }

    fn rmdir(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        self.files.rmdir(context, parent, name)
    }

    fn rename(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        self.files.rename(context, parent, name, new_parent, new_name, flags)
    }

    fn link(&self, context: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.writable()?;
        if let Some(file) = self.unnamed.of_node(inode) {
            return self.link_unnamed(context, (inode, &*file?), parent, name);
        }
        self.files.link(context, inode, parent, name)
    }

    fn open(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        if !is_read_only(flags) {
            self.writable()?;
        }
        if let Some(file) = self.unnamed.of_node(inode) {
            let handle = self.unnamed.open(&*file?, flags)?;
            return Ok((Some(handle), OpenOptions::empty(), None));
        }
        let (handle, options, passthrough) = self.files.open(context, inode, flags, fuse_flags)?;
        Ok((handle, options | self.spared(context, inode, handle), passthrough))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (entry, handle, options, passthrough) =
            self.make(context, |root| self.files.create(root, parent, name, args))?;
        let options = options | self.close_options(entry.inode);
        Ok((entry, handle, options, passthrough))
    }

    fn read(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        if let Some(file) = self.unnamed.of_handle(handle) {
            return writer.write_from(&mut file?.try_clone()?, size as usize, offset);
        }
        self.files.read(context, inode, handle, writer, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        is_delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.writable()?;
        if let Some(file) = self.unnamed.of_handle(handle) {
            let file = file?;
            if fuse_flags & WRITE_KILL_PRIV != 0 {
                unnamed::drop_privileges(&file)?;
            }
            return reader.read_to(&mut file.try_clone()?, size as usize, offset);
        }
        self.files.write(
            context, inode, handle, reader, size, offset, lock_owner, is_delayed, flags, fuse_flags,
        )
    }

    fn flush(&self, context: &Context, inode: u64, handle: u64, owner: u64) -> io::Result<()> {
        match self.unnamed.of_handle(handle) {
            Some(file) => file.map(drop),
            None => self.files.flush(context, inode, handle, owner),
        }
    }

    fn fsync(&self, context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        match self.unnamed.of_handle(handle) {
            Some(file) if data_only => file?.sync_data(),
            Some(file) => file?.sync_all(),
            None => self.files.fsync(context, inode, data_only, handle),
        }
    }

    fn fallocate(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.writable()?;
        if let Some(file) = self.unnamed.of_handle(handle) {
            return unnamed::allocate(&*file?, mode, offset, length);
        }
        self.files.fallocate(context, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.listings.close(handle); // a hostile guest's way to close a directory
        self.unnamed.release(handle).unwrap_or_else(|| {
            self.files.release(context, inode, flags, handle, flush, flock_release, lock_owner)
        })
    }

    fn statfs(&self, context: &Context, inode: u64) -> io::Result<statvfs64> {
        match self.unnamed.of_node(inode) {
            Some(file) => unnamed::file_system(&*file?),
            None => self.files.statfs(context, inode),
        }
    }

    fn setxattr(
        &self,
        context: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        match self.unnamed.of_node(inode) {
            Some(file) => unnamed::set_xattr(&*file?, name, value, flags),
            None => self.files.setxattr(context, inode, name, value, flags),
        }
    }

    fn getxattr(
        &self,
        context: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        // Room is made for what the guest asks for; no more than this is ever needed.
        let size = size.min(MAX_XATTR_BYTES);
        match self.unnamed.of_node(inode) {
            Some(file) => unnamed::xattr(&*file?, name, size),
            None => self.files.getxattr(context, inode, name, size),
        }
    }

    fn listxattr(&self, context: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let size = size.min(MAX_XATTR_BYTES);
        match self.unnamed.of_node(inode) {
            Some(file) => unnamed::xattrs(&*file?, size),
            None => self.files.listxattr(context, inode, size),
        }
    }

    fn removexattr(&self, context: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        match self.unnamed.of_node(inode) {
            Some(file) => unnamed::remove_xattr(&*file?, name),
            None => self.files.removexattr(context, inode, name),
        }
    }

    fn opendir(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        if !is_read_only(flags) {
            self.writable()?;
        }
        self.files.opendir(context, inode, flags)
    }

    fn readdir(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let read = |from, take: Take| self.files.readdir(context, inode, handle, size, from, take);
        self.listings.list(handle, offset, read, |entry, _| add(entry))
    }

    fn readdirplus(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        // An entry takes about four times the room in the answer than it takes here.
        let read = |from, take: Take| {
            self.files.readdir(context, inode, handle, (size / 4).max(LISTING_BYTES), from, take)
        };
        self.listings.list(handle, offset, read, |mut name, text| {
            let entry = self.lookup(context, inode, text)?;
            let node = entry.inode;
            name.ino = entry.attr.st_ino;
            let added = add(name, entry)?;
            // Where it does not fit any more, the guest has not heard of it.
            if added == 0 {
                self.forget(context, node, 1);
            }
            Ok(added)
        })
    }

    fn fsyncdir(
        &self,
        context: &Context,
        inode: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.files.fsyncdir(context, inode, data_only, handle)
    }

    fn releasedir(&self, context: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.listings.close(handle);
        self.files.releasedir(context, inode, flags, handle)
    }

    fn access(&self, context: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.files.access(context, inode, mask)
    }

    fn lseek(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        if let Some(file) = self.unnamed.of_handle(handle) {
            return unnamed::seek(&*file?, offset, whence);
        }
        self.files.lseek(context, inode, handle, offset, whence)
    }
}
