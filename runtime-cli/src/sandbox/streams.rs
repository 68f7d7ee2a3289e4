//! Joins the stdio of a process on the host with that of its process in the guest.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use agent_protocol::{ExitStatus, Process, STDIO_PORT, Stdio, StdioStream, StreamHello, frame};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use vmm::vsock::{Host, HostStream};

/// Whose streams they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner<'a> {
    pub(super) container: &'a str,
    pub(super) process: &'a str,
}

/// A process in the guest whose stdio is on the host.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) outputs: Outputs,
    /// How it ended, and when that was heard of.
    pub(super) exit: Option<(ExitStatus, Instant)>,
    /// The client that waits for its end; the first process's is the parent of this one.
    pub(super) peer: Option<u64>,
}

impl Running {
    pub(super) fn new(outputs: Outputs, peer: Option<u64>) -> Self {
        Self { outputs, exit: None, peer }
    }
}

/// Output streams of a process that may still have something to deliver.
#[derive(Debug, Default)]
pub(super) struct Outputs(Vec<OwnedFd>);

impl Outputs {
    /// Connects a terminal: `input` and `output` are the same one.
    pub(super) fn connect_terminal(
        host: &Host,
        owner: Owner<'_>,
        (input, output): (OwnedFd, OwnedFd),
    ) -> io::Result<Self> {
        let mut outputs = Self::default();
        outputs.connect(host, owner, StdioStream::Terminal, Some(input), Some(output))?;
        Ok(outputs)
    }

    /// Connects those of stdin, stdout and stderr that there are.
    pub(super) fn connect_streams(
        host: &Host,
        owner: Owner<'_>,
        [stdin, stdout, stderr]: [Option<OwnedFd>; 3],
    ) -> io::Result<Self> {
        let mut outputs = Self::default();
        if stdin.is_some() {
            outputs.connect(host, owner, StdioStream::Stdin, stdin, None)?;
        }
        if stdout.is_some() {
            outputs.connect(host, owner, StdioStream::Stdout, None, stdout)?;
        }
        if stderr.is_some() {
            outputs.connect(host, owner, StdioStream::Stderr, None, stderr)?;
        }
        Ok(outputs)
    }

    /// Connects what a client passed along with `process`: its terminal, or those of its streams
    /// that there are, in order. What was announced and did not come is `/dev/null` in the guest.
    pub(super) fn connect_passed(
        host: &Host,
        owner: Owner<'_>,
        process: &mut Process,
        fds: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let mut fds = fds.into_iter();
        if process.terminal.is_some() {
            let terminal = fds.next().ok_or(io::ErrorKind::InvalidInput)?;
            return Self::connect_terminal(host, owner, (terminal.try_clone()?, terminal));
        }
        let wanted = process.stdio;
        let streams = [wanted.stdin, wanted.stdout, wanted.stderr]
            .map(|wanted| wanted.then(|| fds.next()).flatten());
        let [stdin, stdout, stderr] = streams.each_ref().map(Option::is_some);
        process.stdio = Stdio { stdin, stdout, stderr };
        Self::connect_streams(host, owner, streams)
    }

    fn connect(
        &mut self,
        host: &Host,
        owner: Owner<'_>,
        stream: StdioStream,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> io::Result<()> {
        let hello = StreamHello {
            container: owner.container.into(),
            process: owner.process.into(),
            stream,
        };
        let greeting = frame::encode(&hello).map_err(io::Error::other)?;
        let mut on_close = None;
        if output.is_some() {
            let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
            self.0.push(ours);
            on_close = Some(theirs);
        }
        host.greet(STDIO_PORT, greeting, HostStream { input, output, on_close })
    }

    /// Forgets the streams that are over; whether all are.
    pub(super) fn delivered(&mut self) -> bool {
        self.0.retain(|stream| {
            let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            // Nothing is ever written to these pipes: an event is the end.
            !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
        });
        self.0.is_empty()
    }

    /// Descriptors that become readable as the streams end.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_delivered_once_every_stream_is_over() {
        let (first, first_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (second, second_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut outputs = Outputs(vec![first, second]);

        drop(first_end);
        assert!(!outputs.delivered());
        drop(second_end);
        assert!(outputs.delivered());
    }

    #[test]
    fn without_output_there_is_nothing_to_wait_for() {
        assert!(Outputs::default().delivered());
    }
}
