//! The terminal of a process on the host: a new one handed to the engine, or the one inherited.
//!
//! The guest has a pseudo-terminal of its own that does what terminals do; the host's is a mere
//! wire and therefore raw.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use agent_protocol::WindowSize;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// What runc sends along with the descriptor: the name of the file it opened.
const MASTER_NAME: &[u8] = b"/dev/ptmx";

nix::ioctl_read_bad!(tiocgwinsz, libc::TIOCGWINSZ, libc::winsize);
nix::ioctl_write_int_bad!(tiocsctty, libc::TIOCSCTTY);

/// Why there is no terminal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No pseudo-terminal.
    #[error("make a pseudo-terminal: is /dev/pts mounted, and kernel.pty.max not reached?")]
    Open(#[source] io::Error),
    /// The terminal cannot be set up.
    #[error("make the terminal a raw one")]
    Raw(#[source] io::Error),
    /// Nobody takes the terminal.
    #[error("send the terminal to console socket {path}: is anyone listening there?")]
    Send {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A raw terminal; an inherited one gets its settings back when this is dropped.
#[derive(Debug)]
pub(super) struct Console {
    terminal: OwnedFd,
    restore: Option<Termios>,
}

impl Console {
    /// Makes a terminal, gives its master to whoever listens on `socket`, and makes its slave the
    /// controlling terminal of this process, which leads a session.
    pub(super) fn offer(socket: &Path) -> Result<Self, Error> {
        let pair = nix::pty::openpty(None, None).map_err(|error| Error::Open(error.into()))?;
        // SAFETY: the slave is open; the argument 0 says not to steal another session's terminal.
        let controlling = unsafe { tiocsctty(pair.slave.as_raw_fd(), 0) };
        controlling.map_err(|error| Error::Open(error.into()))?;
        let console = Self { terminal: pair.slave, restore: None };
        console.set_up().map_err(Error::Raw)?;
        send(&pair.master, socket).map_err(|source| Error::Send { path: socket.into(), source })?;
        Ok(console)
    }

    /// Uses a terminal that is there already and does not block.
    pub(super) fn adopt(terminal: OwnedFd) -> Result<Self, Error> {
        let settings = tcgetattr(&terminal).map_err(|error| Error::Raw(error.into()))?;
        let console = Self { terminal, restore: Some(settings) };
        console.set_up().map_err(Error::Raw)?;
        Ok(console)
    }

    /// The terminal as descriptors for a stream: one to read, one to write.
    pub(super) fn ends(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        Ok((self.terminal.try_clone()?, self.terminal.try_clone()?))
    }

    /// The terminal itself.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.terminal.as_fd()
    }

    /// Its present size; `None` if it has none yet, as a new one.
    pub(super) fn window_size(&self) -> Option<WindowSize> {
        window_size(self.terminal.as_fd())
    }

    fn set_up(&self) -> io::Result<()> {
        let mut settings = tcgetattr(&self.terminal)?;
        cfmakeraw(&mut settings);
        tcsetattr(&self.terminal, SetArg::TCSANOW, &settings)?;
        let flags = OFlag::from_bits_retain(fcntl(&self.terminal, FcntlArg::F_GETFL)?);
        fcntl(&self.terminal, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(settings) = &self.restore {
            // The terminal may be gone by now; then there is nothing to restore.
            let _ = tcsetattr(&self.terminal, SetArg::TCSADRAIN, settings);
        }
    }
}

/// Size of the terminal `fd`.
fn window_size(fd: BorrowedFd<'_>) -> Option<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `fd` is open and the kernel writes one `winsize` to the address.
    unsafe { tiocgwinsz(fd.as_raw_fd(), &raw mut size) }.ok()?;
    (size.ws_row > 0 && size.ws_col > 0)
        .then_some(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

fn send(master: &OwnedFd, socket: &Path) -> io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    let fds = [master.as_raw_fd()];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(MASTER_NAME)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use nix::sys::termios::LocalFlags;

    use super::*;

    #[test]
    fn an_adopted_terminal_is_raw_until_dropped() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let console = Console::adopt(pair.slave.try_clone().unwrap()).unwrap();

        assert!(!tcgetattr(&pair.slave).unwrap().local_flags.contains(LocalFlags::ICANON));
        drop(console);
        assert!(tcgetattr(&pair.slave).unwrap().local_flags.contains(LocalFlags::ICANON));
    }

    #[test]
    fn bytes_pass_a_raw_terminal_unchanged() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let console = Console::adopt(pair.slave).unwrap();
        let (_, output) = console.ends().unwrap();

        File::from(output).write_all(b"a\nb").unwrap();

        let mut bytes = [0; 8];
        let count = File::from(pair.master).read(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"a\nb");
    }

    #[test]
    fn a_terminal_without_a_size_says_so() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let sized = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let other = nix::pty::openpty(Some(&sized), None).unwrap();

        assert_eq!(window_size(pair.slave.as_fd()), None);
        assert_eq!(window_size(other.slave.as_fd()), Some(WindowSize { rows: 24, columns: 80 }));
    }
}
