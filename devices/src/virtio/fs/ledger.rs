//! The shared directory with a memory: all requests go to the tree, in the tree's numbers, and what the
//! guest knows and has open is written down, so that another machine can go on with it.
//!
//! Inodes have the guest's numbers: those of the host differ only within one of the file systems mounted
//! in the tree, which the guest sees as one. Without that `find` suspects loops and `tar` hard links.

use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::abi::virtio_fs::RemovemappingOne;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::transport::FsCacheReqHandler;

use super::book::{Book, Open};
use super::observer::Observer;
use super::tree::Tree;

/// A tree and what one guest knows of it.
pub(super) struct Ledger {
    pub(super) tree: Tree,
    /// Held for a moment only: never while the tree works.
    book: Mutex<Book>,
    /// What the guest's kernel said it can do, if it has mounted the tree.
    pub(super) capable: Mutex<Option<FsOptions>>,
    /// Who sees what others change, if anybody is told.
    pub(super) observer: Option<Observer>,
}

impl Ledger {
    /// A tree of which nobody knows anything yet.
    pub fn new(tree: Tree, observer: Option<Observer>) -> Self {
        Ledger { tree, book: Mutex::default(), capable: Mutex::default(), observer }
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("nothing panics while it holds the book")
    }

    pub(super) fn set_capable(&self, capable: Option<FsOptions>) {
        *self.capable.lock().expect("nothing panics while it holds this") = capable;
    }

    /// The tree's number of a file.
    pub(super) fn file(&self, inode: u64) -> io::Result<u64> {
        self.book().file(inode)
    }

    /// A file and a handle to it.
    fn both(&self, inode: u64, handle: u64) -> io::Result<(u64, u64)> {
        let book = self.book();
        Ok((book.file(inode)?, book.handle(handle)?))
    }

    /// A file, a handle to read or write it with, and the flags of that handle. What the guest says of
    /// them with each request is not passed on: the library would change the host's file to it, and
    /// closes the descriptor, which is not its own to close, where the host refuses (0.14). Neither of
    /// the flags that change needs the host: the guest's kernel finds the end that O_APPEND writes to,
    /// and passes its own cache by for O_DIRECT.
    fn for_data(&self, inode: u64, handle: u64) -> io::Result<(u64, u64, u32)> {
        let book = self.book();
        Ok((book.file(inode)?, book.handle(handle)?, book.flags(handle)?))
    }

    /// Tells the guest of a file.
    pub(super) fn tell(&self, entry: Entry) -> Entry {
        let inode = self.book().tell(entry.inode);
        named(entry, inode)
    }

    /// Shows attributes of a file that the guest calls `inode`.
    fn attributes(inode: u64, (mut attributes, belief): (stat64, Duration)) -> (stat64, Duration) {
        attributes.st_ino = inode;
        (attributes, belief)
    }
}

/// The entry of a file that the guest calls `inode`.
fn named(mut entry: Entry, inode: u64) -> Entry {
    entry.inode = inode;
    entry.attr.st_ino = inode;
    entry
}

impl FileSystem for Ledger {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let wanted = self.tree.init(capable)?;
        self.set_capable(Some(capable));
        Ok(wanted)
    }

    fn destroy(&self) {
        *self.book() = Book::default();
        self.set_capable(None);
        self.observer.iter().for_each(Observer::clear);
        self.tree.destroy();
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
        let inode = self.file(inode)?;
        self.tree.setupmapping(context, inode, handle, offset, length, flags, place, mapper)
    }

    fn removemapping(
        &self,
        context: &Context,
        inode: u64,
        requests: Vec<RemovemappingOne>,
        mapper: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        self.tree.removemapping(context, inode, requests, mapper)
    }

    fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.file(parent)?;
        let found =
            || self.tree.lookup(context, parent, name).map(|entry| self.tell_in(parent, entry));
        self.echo(context).map_or_else(found, |echo| echo.lookup(parent, name, found))
    }

    fn forget(&self, context: &Context, inode: u64, count: u64) {
        let forgotten = self.book().forget(inode, count);
        if let Some(inode) = forgotten {
            self.ignore(inode);
            self.tree.forget(context, inode, u64::MAX);
        }
    }

    fn batch_forget(&self, context: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.forget(context, inode, count);
        }
    }

    fn getattr(
        &self,
        context: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let handle = handle.map(|handle| self.book().handle(handle)).transpose()?;
        let attributes = self.tree.getattr(context, self.file(inode)?, handle)?;
        Ok(Self::attributes(inode, attributes))
    }

    fn setattr(
        &self,
        context: &Context,
        inode: u64,
        attributes: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        if self.echo(context).is_some() {
            return self.getattr(context, inode, handle);
        }
        let handle = handle.map(|handle| self.book().handle(handle)).transpose()?;
        let attributes =
            self.tree.setattr(context, self.file(inode)?, attributes, handle, valid)?;
        Ok(Self::attributes(inode, attributes))
    }

    fn readlink(&self, context: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.tree.readlink(context, self.file(inode)?)
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, false, |parent| {
            self.tree.symlink(context, target, parent, name)
        })
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
        self.make(context, parent, name, false, |parent| {
            self.tree.mknod(context, parent, name, mode, device, umask)
        })
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, true, |parent| {
            self.tree.mkdir(context, parent, name, mode, umask)
        })
    }

    fn unlink(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        match self.echo(context) {
            Some(_) => Ok(()),
            None => self.tree.unlink(context, self.file(parent)?, name),
        }
    }

    fn rmdir(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        match self.echo(context) {
            Some(_) => self.gone(context, parent, name),
            None => self.tree.rmdir(context, self.file(parent)?, name),
        }
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
        if self.echo(context).is_some() {
            return Ok(());
        }
        let (parent, new_parent) = (self.file(parent)?, self.file(new_parent)?);
        self.tree.rename(context, parent, name, new_parent, new_name, flags)
    }

    fn link(&self, context: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.tree.link(context, self.file(inode)?, self.file(parent)?, name)?;
        Ok(self.tell(entry))
    }

    fn open(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = self.echo(context).map_or(flags, |_| libc::O_RDONLY as u32);
        let (handle, options, passthrough) =
            self.tree.open(context, self.file(inode)?, flags, fuse_flags)?;
        let open = Open { file: inode, flags, is_directory: false };
        Ok((handle.map(|handle| self.book().open(handle, open)), options, passthrough))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (entry, handle, options, passthrough) =
            self.tree.create(context, self.file(parent)?, name, args)?;
        let entry = self.tell(entry);
        let open = Open { file: entry.inode, flags: args.flags, is_directory: false };
        let handle = handle.map(|handle| self.book().open(handle, open));
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
        _flags: u32,
    ) -> io::Result<usize> {
        let (inode, handle, flags) = self.for_data(inode, handle)?;
        self.tree.read(context, inode, handle, writer, size, offset, lock_owner, flags)
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
        _flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (inode, handle, flags) = self.for_data(inode, handle)?;
        self.tree.write(
            context, inode, handle, reader, size, offset, lock_owner, is_delayed, flags, fuse_flags,
        )
    }

    fn flush(&self, context: &Context, inode: u64, handle: u64, owner: u64) -> io::Result<()> {
        let (inode, handle) = self.both(inode, handle)?;
        self.tree.flush(context, inode, handle, owner)
    }

    fn fsync(&self, context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let (inode, handle) = self.both(inode, handle)?;
        self.tree.fsync(context, inode, data_only, handle)
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
        let (inode, handle) = self.both(inode, handle)?;
        self.tree.fallocate(context, inode, handle, mode, offset, length)
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
        let both = self.both(inode, handle);
        self.book().close(handle);
        let (inode, handle) = both?;
        self.tree.release(context, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, context: &Context, inode: u64) -> io::Result<statvfs64> {
        self.tree.statfs(context, self.file(inode)?)
    }

    fn setxattr(
        &self,
        context: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.tree.setxattr(context, self.file(inode)?, name, value, flags)
    }

    fn getxattr(
        &self,
        context: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.tree.getxattr(context, self.file(inode)?, name, size)
    }

    fn listxattr(&self, context: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.tree.listxattr(context, self.file(inode)?, size)
    }

    fn removexattr(&self, context: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.tree.removexattr(context, self.file(inode)?, name)
    }

    fn opendir(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.tree.opendir(context, self.file(inode)?, flags)?;
        let open = Open { file: inode, flags, is_directory: true };
        Ok((handle.map(|handle| self.book().open(handle, open)), options))
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
        let (inode, handle) = self.both(inode, handle)?;
        self.tree.readdir(context, inode, handle, size, offset, add)
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
        let (parent, handle) = self.both(inode, handle)?;
        let add = &mut |mut name: DirEntry, entry: Entry| {
            let own = entry.inode;
            let inode = self.book().name(own);
            name.ino = inode;
            let mode = entry.attr.st_mode;
            let added = add(name, named(entry, inode))?;
            // Where it does not fit any more, the guest has not heard of it.
            if added > 0 {
                self.book().tell(own);
                self.observe(parent, own, mode);
            }
            Ok(added)
        };
        self.tree.readdirplus(context, parent, handle, size, offset, add)
    }

    fn fsyncdir(
        &self,
        context: &Context,
        inode: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        let (inode, handle) = self.both(inode, handle)?;
        self.tree.fsyncdir(context, inode, data_only, handle)
    }

    fn releasedir(&self, context: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        let both = self.both(inode, handle);
        self.book().close(handle);
        let (inode, handle) = both?;
        self.tree.releasedir(context, inode, flags, handle)
    }

    fn access(&self, context: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.tree.access(context, self.file(inode)?, mask)
    }

    fn lseek(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let (inode, handle) = self.both(inode, handle)?;
        self.tree.lseek(context, inode, handle, offset, whence)
    }
}
