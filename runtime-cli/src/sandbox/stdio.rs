//! The descriptors 0, 1 and 2 of an engine, as the host ends of vsock streams.
//!
//! The virtual machine's event loop reads and writes them itself, so they must not block; but
//! `O_NONBLOCK` belongs to the open file description, which the engine and other processes share.
//! Pipes and terminals are therefore opened anew through `/proc/self/fd`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use agent_protocol::WindowSize;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{major, minor};

use super::console::{self, Console};

/// `/dev/null`, as (major, minor) (Documentation/admin-guide/devices.txt).
const NULL_DEVICE: (u64, u64) = (1, 3);

/// Why stdio cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A descriptor cannot be examined or opened anew.
    #[error("take over {name}")]
    TakeOver {
        /// stdin, stdout or stderr.
        name: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `/dev/null` cannot be put in the place of stdio.
    #[error("put /dev/null in the place of stdio")]
    Null(#[source] io::Error),
    /// No terminal to use.
    #[error(
        "cannot allocate tty if coracle will detach without setting console socket: give \
         --console-socket, or run in a terminal, or set process.terminal to false"
    )]
    NoTerminal,
    /// The console socket or the terminal.
    #[error(transparent)]
    Console(#[from] console::Error),
}

/// What a process reads and writes on the host.
#[derive(Debug)]
pub(super) enum Stdio {
    /// A terminal: both ways over one stream.
    Terminal(Console),
    /// Up to three streams; what is missing is `/dev/null`.
    Streams([Option<OwnedFd>; 3]),
}

impl Stdio {
    /// What a process in the guest is to have as its stdio: a new terminal whose master goes to
    /// `console_socket`, or this process's own.
    pub(super) fn take(terminal: bool, console_socket: Option<&Path>) -> Result<Self, Error> {
        Ok(match (terminal, console_socket) {
            (true, Some(socket)) => Self::Terminal(Console::offer(socket)?),
            (true, None) => Self::Terminal(inherited_terminal()?),
            (false, _) => Self::Streams([
                reopen(io::stdin().as_fd(), Direction::In, "stdin")?,
                reopen(io::stdout().as_fd(), Direction::Out, "stdout")?,
                reopen(io::stderr().as_fd(), Direction::Out, "stderr")?,
            ]),
        })
    }

    /// Size of the terminal, if it is one.
    pub(super) fn window_size(&self) -> Option<WindowSize> {
        match self {
            Self::Terminal(console) => console.window_size(),
            Self::Streams(_) => None,
        }
    }

    /// Which streams there are.
    pub(super) fn streams(&self) -> agent_protocol::Stdio {
        match self {
            Self::Terminal(_) => agent_protocol::Stdio::default(),
            Self::Streams([stdin, stdout, stderr]) => agent_protocol::Stdio {
                stdin: stdin.is_some(),
                stdout: stdout.is_some(),
                stderr: stderr.is_some(),
            },
        }
    }
}

/// The terminal that stdin or stdout is.
fn inherited_terminal() -> Result<Console, Error> {
    let stdin = io::stdin();
    let stdout = io::stdout();
    let terminal = [stdin.as_fd(), stdout.as_fd()]
        .into_iter()
        .find(|fd| nix::unistd::isatty(fd).unwrap_or(false))
        .ok_or(Error::NoTerminal)?;
    let terminal = reopen(terminal, Direction::Both, "the terminal")?.ok_or(Error::NoTerminal)?;
    Ok(Console::adopt(terminal)?)
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
    Both,
}

/// A descriptor that does not block for the file that `fd` refers to; `None` for `/dev/null` and
/// for a FIFO that nobody reads, which come to the same.
fn reopen(
    fd: BorrowedFd<'_>,
    direction: Direction,
    name: &'static str,
) -> Result<Option<OwnedFd>, Error> {
    reopened(fd, direction).map_err(|source| Error::TakeOver { name, source })
}

fn reopened(fd: BorrowedFd<'_>, direction: Direction) -> io::Result<Option<OwnedFd>> {
    let copy = File::from(fd.try_clone_to_owned()?);
    let metadata = copy.metadata()?;
    let kind = metadata.file_type();
    if kind.is_char_device() {
        let device = metadata.rdev();
        if (major(device), minor(device)) == NULL_DEVICE {
            return Ok(None);
        }
    }
    if kind.is_fifo() || nix::unistd::isatty(&copy).unwrap_or(false) {
        let opened = OpenOptions::new()
            .read(direction != Direction::Out)
            .write(direction != Direction::In)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        return match opened {
            Ok(file) => Ok(Some(file.into())),
            // No reader is left: writing would only give EPIPE.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            // A pipe of another user, or a terminal that hung up: share its description instead.
            Err(_) => set_nonblocking(copy).map(Some),
        };
    }
    if kind.is_socket() {
        return set_nonblocking(copy).map(Some);
    }
    // A regular file keeps its offset and O_APPEND in the description, and never blocks.
    Ok(Some(copy.into()))
}

/// Makes the description of `file` non-blocking, for all who share it: a socket cannot be opened
/// anew.
fn set_nonblocking(file: File) -> io::Result<OwnedFd> {
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(file.into())
}

/// Puts `/dev/null` in the place of this process's stdio, so that whoever waits for the other ends
/// to close waits for the guest's process only.
pub(super) fn let_go() -> Result<(), Error> {
    let replaced = || {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        nix::unistd::dup2_stderr(&null)?;
        io::Result::Ok(())
    };
    replaced().map_err(Error::Null)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use nix::unistd::pipe2;

    use super::*;

    fn nonblocking(fd: impl AsFd) -> bool {
        let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap();
        OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK)
    }

    #[test]
    fn a_pipe_does_not_block_and_its_other_holders_still_do() {
        let (reader, _writer) = pipe2(OFlag::O_CLOEXEC).unwrap();

        let taken = reopened(reader.as_fd(), Direction::In).unwrap().unwrap();

        assert!(nonblocking(&taken));
        assert!(!nonblocking(&reader));
    }

    #[test]
    fn both_ends_of_a_pipe_carry_bytes() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();

        let taken = reopened(writer.as_fd(), Direction::Out).unwrap().unwrap();
        drop(writer);
        File::from(taken).write_all(b"out").unwrap();

        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "out");
    }

    #[test]
    fn dev_null_is_no_stream() {
        let null = File::open("/dev/null").unwrap();

        assert!(reopened(null.as_fd(), Direction::In).unwrap().is_none());
    }

    #[test]
    fn a_fifo_that_nobody_reads_is_no_stream() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let both = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        drop(both);

        assert!(reopened(writer.as_fd(), Direction::Out).unwrap().is_none());
    }

    #[test]
    fn a_regular_file_keeps_its_offset() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before").unwrap();

        let taken = reopened(file.as_fd(), Direction::Out).unwrap().unwrap();

        assert_eq!(File::from(taken).stream_position().unwrap(), 6);
    }
}
