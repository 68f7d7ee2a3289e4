//! What guest RAM is made of: anonymous memory, or a file that outlives the machine.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{FLAGS, HUGE_PAGE, MemoryError, PROTECTION, map_aligned};
use crate::config::MemoryBacking;

/// The memory of a machine that was saved, for one that goes on with it.
#[derive(Debug)]
pub struct SavedMemory {
    /// The file that it is kept in.
    pub file: File,
    /// What becomes of the file.
    pub sharing: Sharing,
}

/// What becomes of the file with the memory of a saved machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// The new machine goes on writing to it, and can be saved again. It must be the only one.
    Shared,
    /// It stays as it is: what the new machine writes is its own. Any number of machines can go on
    /// from there, and share what none of them writes.
    Private,
}

/// Where the RAM of one machine comes from, region after region.
#[derive(Debug)]
pub struct Store {
    file: Option<File>,
    flags: i32,
    /// Whether the file grows with what is mapped.
    is_new: bool,
    /// Where the next region starts in the file, in bytes.
    next: u64,
}

impl Store {
    /// A fresh store of the kind that a configuration asks for.
    pub fn create(backing: &MemoryBacking) -> Result<Self, MemoryError> {
        let create = |source| MemoryError::CreateFile { source };
        let file = match backing {
            MemoryBacking::Anonymous => return Ok(Store::anonymous()),
            MemoryBacking::Memfd => memfd(),
            // A file that is there may be the memory of another machine.
            MemoryBacking::File(path) => {
                OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
            }
        };
        let file = Some(file.map_err(create)?);
        Ok(Store { file, flags: libc::MAP_SHARED, is_new: true, next: 0 })
    }

    /// A fresh store of memory that goes with the machine.
    pub fn anonymous() -> Self {
        Store { file: None, flags: FLAGS, is_new: true, next: 0 }
    }

    /// The store that another machine left.
    pub fn of_saved(memory: SavedMemory) -> Self {
        let flags = match memory.sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        };
        Store { file: Some(memory.file), flags, is_new: false, next: 0 }
    }

    /// The flags of mmap(2) of what is mapped here.
    pub fn flags(&self) -> i32 {
        self.flags
    }

    /// The file, if all that the guest writes reaches it.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref().filter(|_| self.flags & libc::MAP_SHARED != 0)
    }

    /// Maps the next `bytes` bytes at a multiple of [`HUGE_PAGE`].
    pub fn map(&mut self, bytes: usize) -> Result<*mut u8, MemoryError> {
        let map = |source| MemoryError::Map { bytes, source };
        let start = map_aligned(bytes).map_err(map)?;
        let Some(file) = &self.file else { return Ok(start) };
        let offset = self.next;
        let end = offset + bytes as u64;
        if self.is_new {
            file.set_len(end).map_err(|source| MemoryError::CreateFile { source })?;
        }
        let found = file.metadata().map_err(map)?.len();
        if found < end {
            return Err(MemoryError::ShortFile { found, needed: end });
        }
        self.next = end.next_multiple_of(HUGE_PAGE as u64);
        let offset = i64::try_from(offset).expect("a file is shorter than 2^63 bytes");
        // SAFETY: the new mapping replaces one that was just made, has the same length, and is known
        // to nobody else; the file was found to be long enough for it.
        let mapped = unsafe {
            libc::mmap(
                start.cast(),
                bytes,
                PROTECTION,
                self.flags | libc::MAP_FIXED,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(map(io::Error::last_os_error()));
        }
        Ok(start)
    }
}

fn memfd() -> io::Result<File> {
    // SAFETY: the name is a string that the call only reads.
    let fd = unsafe { libc::memfd_create(c"guest memory".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(fd) })
}
