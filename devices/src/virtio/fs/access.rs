//! Whether a guest may change anything, and whether it asks to.

use std::io;

/// Whether a guest may change what it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Every change fails with EROFS.
    ReadOnly,
    /// The guest's kernel decides.
    ReadWrite,
}

impl Access {
    /// EROFS unless the guest may change something.
    pub fn check(self) -> io::Result<()> {
        match self {
            Access::ReadOnly => Err(io::Error::from_raw_os_error(libc::EROFS)),
            Access::ReadWrite => Ok(()),
        }
    }
}

/// Whether an open with these flags changes nothing.
pub(super) fn is_read_only(flags: u32) -> bool {
    flags & (libc::O_ACCMODE | libc::O_TRUNC | libc::O_CREAT) as u32 == libc::O_RDONLY as u32
}
