//! A pseudo-terminal of the container's own devpts as stdio and controlling terminal.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use agent_protocol::WindowSize;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::root::Root;

/// Both sides of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The side the agent pumps.
    pub master: OwnedFd,
    /// The side the process uses.
    pub slave: OwnedFd,
}

impl Terminal {
    /// A new terminal of the devpts mounted in `root`, so that its name means something there.
    pub fn open(root: &Root, size: WindowSize) -> nix::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
        let master = root.open_at(Path::new("/dev/ptmx"), flags)?;
        let unlock: libc::c_int = 0;
        // SAFETY: TIOCSPTLCK reads one int, which outlives the call.
        Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock) })?;
        let how = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor that nobody else owns.
        let slave = unsafe {
            let slave = Errno::result(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, how))?;
            OwnedFd::from_raw_fd(slave)
        };
        resize(master.as_fd(), size)?;
        Ok(Self { master, slave })
    }

    /// Makes the terminal stdin, stdout, stderr and the controlling terminal of this session leader.
    pub fn take_over(&self) -> nix::Result<()> {
        // SAFETY: TIOCSCTTY takes an integer.
        Errno::result(unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
        dup2_stdin(&self.slave)?;
        dup2_stdout(&self.slave)?;
        dup2_stderr(&self.slave)
    }
}

/// Sets the size, of which the foreground processes learn by SIGWINCH.
pub fn resize(master: BorrowedFd<'_>, size: WindowSize) -> nix::Result<()> {
    let size =
        libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) })?;
    Ok(())
}
