//! Moves bytes between the host's streams and the pipes or the terminal of a process. Nothing is
//! read that cannot be written on, so a slow reader slows its writer down and costs no memory.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};

use agent_protocol::{Failed, Process, StdioStream, WindowSize};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use nix::unistd::{pipe2, read, write};

use crate::container::terminal;
use crate::failure::{Context, failed};

/// Bytes moved at once: what a pipe holds.
pub const CHUNK_BYTES: usize = 64 << 10;

/// Chunks moved before other streams get their turn.
const CHUNKS_PER_TURN: usize = 16;

/// What a terminal can hold for its reader (the kernel's flip buffers), and a pipe at most unless
/// its process asks for more.
const TERMINAL_BYTES: usize = 128 << 10;

/// End of transmission, the character a terminal takes for end of file.
const END_OF_TRANSMISSION: u8 = 4;

/// The stdio of one process.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Ends of pipes and terminal whose stream the host has not opened yet...
    ends: Vec<(StdioStream, OwnedFd)>,
    /// ...and streams whose terminal the process has not opened yet.
    streams: Vec<(StdioStream, OwnedFd)>,
    pumps: Vec<Pump>,
    terminal: Weak<OwnedFd>,
    wanted: Vec<StdioStream>,
}

/// One direction of one stream.
#[derive(Debug)]
struct Pump {
    from: Rc<OwnedFd>,
    to: Rc<OwnedFd>,
    direction: Direction,
    /// Read, but not yet written.
    pending: Vec<u8>,
    ended: bool,
    /// Of an ended process: how many bytes more may be its output, rather than its children's.
    owed: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToPipe,
    ToTerminal,
    FromPipe,
    FromTerminal,
}

impl Stdio {
    /// Stdio as `process` wants it, and the descriptors that are its 0, 1 and 2. A terminal is
    /// opened by the process itself and given to [`set_terminal`](Self::set_terminal).
    pub fn open(process: &Process) -> Result<(Self, [OwnedFd; 3]), Failed> {
        let mut stdio = Self::default();
        let pipes = if process.terminal.is_some() {
            stdio.wanted.push(StdioStream::Terminal);
            [None; 3]
        } else {
            let wanted = process.stdio;
            [
                wanted.stdin.then_some(StdioStream::Stdin),
                wanted.stdout.then_some(StdioStream::Stdout),
                wanted.stderr.then_some(StdioStream::Stderr),
            ]
        };
        stdio.wanted.extend(pipes.iter().flatten());
        let [stdin, stdout, stderr] =
            pipes.map(|stream| stdio.descriptor(stream).context("open stdio"));
        Ok((stdio, [stdin?, stdout?, stderr?]))
    }

    fn descriptor(&mut self, stream: Option<StdioStream>) -> io::Result<OwnedFd> {
        let Some(stream) = stream else {
            return Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?.into());
        };
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (ours, theirs) =
            if stream == StdioStream::Stdin { (writer, reader) } else { (reader, writer) };
        set_non_blocking(&ours)?;
        self.ends.push((stream, ours));
        Ok(theirs)
    }

    /// Whether a stream of this kind is still to come.
    pub fn wants(&self, stream: StdioStream) -> bool {
        self.wanted.contains(&stream)
    }

    /// Joins a stream of the host, in non-blocking mode, to its end.
    pub fn attach(&mut self, stream: StdioStream, descriptor: OwnedFd) {
        self.wanted.retain(|wanted| *wanted != stream);
        self.streams.push((stream, descriptor));
        self.join();
    }

    /// Takes the master side of the terminal.
    pub fn set_terminal(&mut self, master: OwnedFd) -> io::Result<()> {
        set_non_blocking(&master)?;
        self.ends.push((StdioStream::Terminal, master));
        self.join();
        Ok(())
    }

    fn join(&mut self) {
        while let Some(index) = self.streams.iter().position(|(stream, _)| self.has_end(*stream)) {
            let (stream, descriptor) = self.streams.swap_remove(index);
            let end = self.ends.iter().position(|(kind, _)| *kind == stream);
            let (_, end) = self.ends.swap_remove(end.expect("there is such an end"));
            let (host, guest) = (Rc::new(descriptor), Rc::new(end));
            match stream {
                StdioStream::Stdin => self.pumps.push(Pump::new(host, guest, Direction::ToPipe)),
                StdioStream::Stdout | StdioStream::Stderr => {
                    self.pumps.push(Pump::new(guest, host, Direction::FromPipe));
                }
                StdioStream::Terminal => {
                    self.terminal = Rc::downgrade(&guest);
                    let input =
                        Pump::new(Rc::clone(&host), Rc::clone(&guest), Direction::ToTerminal);
                    self.pumps.push(input);
                    self.pumps.push(Pump::new(guest, host, Direction::FromTerminal));
                }
            }
        }
    }

    fn has_end(&self, stream: StdioStream) -> bool {
        self.ends.iter().any(|(kind, _)| *kind == stream)
    }

    /// Sets the size of the terminal.
    pub fn resize(&self, size: WindowSize) -> Result<(), Failed> {
        let waiting = self.ends.iter().find(|(kind, _)| *kind == StdioStream::Terminal);
        let joined = self.terminal.upgrade();
        let master = match (&joined, waiting) {
            (Some(master), _) => master.as_fd(),
            (None, Some((_, master))) => master.as_fd(),
            (None, None) => return Err(failed("process has no terminal")),
        };
        terminal::resize(master, size).context("resize the terminal")
    }

    /// What has to happen before [`run`](Self::run) can move something.
    pub fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.pumps.iter().flat_map(Pump::interests)
    }

    /// Moves what can be moved; `scratch` is [`CHUNK_BYTES`] long.
    pub fn run(&mut self, scratch: &mut [u8]) {
        let terminal = self.has_terminal_output();
        self.pumps.retain_mut(|pump| pump.run(scratch));
        if terminal && !self.has_terminal_output() {
            // Nobody is left on one side; closing the master hangs up on the other.
            self.pumps.clear();
        }
    }

    fn has_terminal_output(&self) -> bool {
        self.pumps.iter().any(|pump| pump.direction == Direction::FromTerminal)
    }

    /// The process has ended: from now on only what is readable counts as its output.
    pub fn end_process(&mut self) {
        self.ends.retain(|(stream, _)| *stream != StdioStream::Stdin);
        for pump in self.pumps.iter_mut().filter(|pump| pump.direction.is_output()) {
            pump.owed = Some(pump.capacity() + pump.pending.len());
        }
    }

    /// Whether an ended process's own output has been sent.
    pub fn is_drained(&self) -> bool {
        let sent = |pump: &Pump| !pump.direction.is_output() || pump.owed == Some(0);
        !self.has_unclaimed_output() && self.pumps.iter().all(sent)
    }

    /// Whether there will never be anything to move again.
    pub fn is_finished(&self) -> bool {
        !self.has_unclaimed_output() && !self.pumps.iter().any(|pump| pump.direction.is_output())
    }

    /// Whether there is output for a stream that the host has not opened.
    fn has_unclaimed_output(&self) -> bool {
        self.ends.iter().any(|(_, end)| is_readable(end.as_fd()))
    }
}

impl Direction {
    fn is_output(self) -> bool {
        matches!(self, Direction::FromPipe | Direction::FromTerminal)
    }
}

impl Pump {
    fn new(from: Rc<OwnedFd>, to: Rc<OwnedFd>, direction: Direction) -> Self {
        Self { from, to, direction, pending: Vec::new(), ended: false, owed: None }
    }

    fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let read = PollFd::new(self.from.as_fd(), PollFlags::POLLIN);
        let write = PollFd::new(self.to.as_fd(), PollFlags::POLLOUT);
        // Without events only errors and hang-ups are told: the reader may go while it is quiet.
        let closed = PollFd::new(self.to.as_fd(), PollFlags::empty());
        if self.pending.is_empty() { vec![read, closed] } else { vec![write] }.into_iter()
    }

    /// Most bytes that can wait behind `from`.
    fn capacity(&self) -> usize {
        match self.direction {
            Direction::FromPipe => fcntl(&*self.from, FcntlArg::F_GETPIPE_SZ)
                .ok()
                .and_then(|bytes| usize::try_from(bytes).ok())
                .unwrap_or(CHUNK_BYTES),
            _ => TERMINAL_BYTES,
        }
    }

    /// Whether it shall be called again.
    fn run(&mut self, scratch: &mut [u8]) -> bool {
        for _ in 0..CHUNKS_PER_TURN {
            match self.flush() {
                Ok(true) => {}
                Ok(false) => return true,
                // The reader is gone.
                Err(_) => return false,
            }
            if self.ended {
                self.finish();
                return false;
            }
            match read(&*self.from, scratch) {
                Ok(0) => self.end(),
                Ok(count) => self.pending.extend_from_slice(&scratch[..count]),
                Err(Errno::EAGAIN) => {
                    self.owed = self.owed.map(|_| 0);
                    return !is_closed(self.to.as_fd());
                }
                Err(Errno::EINTR) => {}
                // EIO: all slaves of the terminal are closed. ECONNRESET: the host is gone.
                Err(_) => self.end(),
            }
        }
        true
    }

    /// Writes what is pending; whether all of it is gone.
    fn flush(&mut self) -> Result<bool, Errno> {
        while !self.pending.is_empty() {
            match write(&*self.to, &self.pending) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.owed = self.owed.map(|owed| owed.saturating_sub(count));
                }
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn end(&mut self) {
        self.ended = true;
        if self.direction == Direction::ToTerminal && !is_host_gone(self.from.as_fd()) {
            self.pending.push(END_OF_TRANSMISSION);
        }
    }

    /// Passes the end on. A pipe is closed by dropping it.
    fn finish(&self) {
        if self.direction.is_output() {
            // It fails only if the host closed the stream first.
            let _ = shutdown(self.to.as_raw_fd(), Shutdown::Write);
        }
    }
}

/// Whether bytes wait behind `descriptor`.
fn is_readable(descriptor: BorrowedFd<'_>) -> bool {
    let mut state = [PollFd::new(descriptor, PollFlags::POLLIN)];
    let found = poll(&mut state, PollTimeout::ZERO);
    let readable = state[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
    matches!(found, Ok(1..)) && readable
}

/// Whether nobody reads what is written to `descriptor`.
fn is_closed(descriptor: BorrowedFd<'_>) -> bool {
    let mut state = [PollFd::new(descriptor, PollFlags::empty())];
    matches!(poll(&mut state, PollTimeout::ZERO), Ok(1..))
}

/// Whether the host closed a stream altogether, rather than its sending side alone.
fn is_host_gone(stream: BorrowedFd<'_>) -> bool {
    send(stream.as_raw_fd(), &[], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT).is_err()
        || is_closed(stream)
}

/// Makes reads and writes return instead of waiting.
pub fn set_non_blocking(descriptor: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn process(stdin: bool, stdout: bool) -> Process {
        Process {
            args: vec![],
            env: vec![],
            cwd: "/".into(),
            uid: 0,
            gid: 0,
            additional_gids: vec![],
            umask: None,
            capabilities: agent_protocol::Capabilities::default(),
            rlimits: vec![],
            no_new_privs: false,
            oom_score_adj: None,
            seccomp: None,
            terminal: None,
            stdio: agent_protocol::Stdio { stdin, stdout, stderr: false },
        }
    }

    fn stream() -> (UnixStream, OwnedFd) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        (host, guest.into())
    }

    fn run(stdio: &mut Stdio) {
        stdio.run(&mut vec![0; CHUNK_BYTES]);
    }

    #[test]
    fn half_close_of_the_host_ends_the_pipe_after_its_bytes() {
        let (mut stdio, [stdin, ..]) = Stdio::open(&process(true, false)).unwrap();
        let (mut host, guest) = stream();
        stdio.attach(StdioStream::Stdin, guest);

        host.write_all(b"bytes").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        run(&mut stdio);

        let mut text = String::new();
        std::fs::File::from(stdin).read_to_string(&mut text).unwrap();
        assert_eq!(text, "bytes");
    }

    #[test]
    fn output_waits_for_its_stream_and_counts_as_owed_until_sent() {
        let (mut stdio, [_, stdout, _]) = Stdio::open(&process(false, true)).unwrap();
        write(&stdout, b"late").unwrap();
        stdio.end_process();
        assert!(!stdio.is_drained());

        let (mut host, guest) = stream();
        stdio.attach(StdioStream::Stdout, guest);
        stdio.end_process();
        run(&mut stdio);

        let mut bytes = [0; 4];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"late");
        assert!(stdio.is_drained());
        // A child may still hold the pipe.
        assert!(!stdio.is_finished());
    }

    #[test]
    fn end_of_output_half_closes_the_stream() {
        let (mut stdio, [_, stdout, _]) = Stdio::open(&process(false, true)).unwrap();
        let (mut host, guest) = stream();
        stdio.attach(StdioStream::Stdout, guest);

        drop(stdout);
        run(&mut stdio);

        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
        assert!(stdio.is_finished());
    }

    #[test]
    fn a_closed_output_stream_breaks_the_pipe() {
        let (mut stdio, [_, stdout, _]) = Stdio::open(&process(false, true)).unwrap();
        let (host, guest) = stream();
        stdio.attach(StdioStream::Stdout, guest);

        drop(host);
        run(&mut stdio);

        let error = std::fs::File::from(stdout).write(b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_full_pipe_holds_at_most_one_chunk_back() {
        let (mut stdio, [_stdin, ..]) = Stdio::open(&process(true, false)).unwrap();
        let (host, guest) = stream();
        stdio.attach(StdioStream::Stdin, guest);
        host.set_nonblocking(true).unwrap();

        while (&host).write(&[0; CHUNK_BYTES]).is_ok() {
            run(&mut stdio);
        }

        assert!(stdio.pumps[0].pending.len() <= CHUNK_BYTES);
    }
}
