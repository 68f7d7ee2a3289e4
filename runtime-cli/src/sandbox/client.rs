//! A verb's connection to the sandbox process of a container.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent_protocol::{ExitStatus, ProcessInfo, Stats, WindowSize, frame};

use super::Error;
use super::control::{self, Answer, Request};
use super::machine::{Change, Room};
use crate::state::ContainerDir;

/// How long an answer may take that only has to cross the guest and come back. Starting a program
/// may take longer: hooks have time-outs of their own.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// One connection; requests are answered in order.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the sandbox process of the container in `dir`.
    pub fn connect(dir: &ContainerDir) -> Result<Self, Error> {
        let stream = control::connect(dir)
            .map_err(|source| Error::NotRunning { id: dir.id().to_string(), source })?;
        Ok(Self { stream })
    }

    /// Runs the program of a created container.
    pub fn start(&self) -> Result<(), Error> {
        self.order(&Request::Start, None)
    }

    /// Sends `signal` to a process by the name it was started under, `INIT_PROCESS` for the first
    /// one, or to `all` processes of the container.
    pub fn signal(&self, process: &str, signal: i32, all: bool) -> Result<(), Error> {
        let process = process.to_owned();
        self.order(&Request::Signal { process, signal, all }, Some(ANSWER_TIMEOUT))
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, process: &str, size: WindowSize) -> Result<(), Error> {
        let process = process.to_owned();
        self.order(&Request::Resize { process, size }, Some(ANSWER_TIMEOUT))
    }

    /// Freezes the container.
    pub fn pause(&self) -> Result<(), Error> {
        self.order(&Request::Pause, Some(ANSWER_TIMEOUT))
    }

    /// Thaws the container.
    pub fn resume(&self) -> Result<(), Error> {
        self.order(&Request::Resume, Some(ANSWER_TIMEOUT))
    }

    /// Changes the machine, and writes cgroup files in the guest, as `translate::cgroup_files` gives
    /// them.
    pub fn update(&self, change: Change, files: Vec<(String, String)>) -> Result<(), Error> {
        self.order(&Request::Update { change, files }, Some(ANSWER_TIMEOUT))
    }

    /// What the machine can have.
    pub fn room(&self) -> Result<Room, Error> {
        match self.ask(&Request::Room, Some(ANSWER_TIMEOUT))? {
            Answer::Room(room) => Ok(room),
            _ => Err(Error::Unexpected),
        }
    }

    /// The container's processes, with pids of the guest.
    pub fn processes(&self) -> Result<Vec<ProcessInfo>, Error> {
        match self.ask(&Request::Processes, Some(ANSWER_TIMEOUT))? {
            Answer::Processes(processes) => Ok(processes),
            _ => Err(Error::Unexpected),
        }
    }

    /// The container's counters.
    pub fn stats(&self) -> Result<Stats, Error> {
        match self.ask(&Request::Stats, Some(ANSWER_TIMEOUT))? {
            Answer::Stats(stats) => Ok(*stats),
            _ => Err(Error::Unexpected),
        }
    }

    /// What the guest's kernel and agent printed last, at most 8 KiB.
    pub fn console(&self) -> Result<String, Error> {
        self.text(&Request::Console)
    }

    /// What the machine costs, in the Prometheus text format.
    pub fn metrics(&self) -> Result<String, Error> {
        self.text(&Request::Metrics)
    }

    fn text(&self, request: &Request) -> Result<String, Error> {
        match self.ask(request, Some(ANSWER_TIMEOUT))? {
            Answer::Text(text) => Ok(text),
            _ => Err(Error::Unexpected),
        }
    }

    /// Starts a process with `fds` as its stdio; [`Self::exit`] tells how it ends.
    pub(super) fn exec(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        control::send(&self.stream, request, fds).map_err(Error::Talk)?;
        done(self.answer(None)?)
    }

    /// Sends a request whose answer [`Self::exit`] will pass over.
    pub(super) fn post(&self, request: &Request) -> Result<(), Error> {
        control::send(&self.stream, request, &[]).map_err(Error::Talk)
    }

    /// Waits for a message of the sandbox process: how the process ended, or `None` for the
    /// answer to a [`Self::post`].
    pub(super) fn exit(&self) -> Result<Option<ExitStatus>, Error> {
        match self.answer(None)? {
            Answer::Exited(status) => Ok(Some(status)),
            _ => Ok(None),
        }
    }

    /// The connection, for poll.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn order(&self, request: &Request, timeout: Option<Duration>) -> Result<(), Error> {
        done(self.ask(request, timeout)?)
    }

    fn ask(&self, request: &Request, timeout: Option<Duration>) -> Result<Answer, Error> {
        control::send(&self.stream, request, &[]).map_err(Error::Talk)?;
        match self.answer(timeout)? {
            Answer::Failed(failed) => Err(Error::Refused(failed)),
            answer => Ok(answer),
        }
    }

    fn answer(&self, timeout: Option<Duration>) -> Result<Answer, Error> {
        self.stream.set_read_timeout(timeout).map_err(|error| Error::Talk(error.into()))?;
        match frame::read(&mut &self.stream) {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(Error::Ended),
            Err(frame::FrameError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err(Error::TimedOut(timeout.unwrap_or_default().as_secs()))
            }
            Err(error) => Err(Error::Talk(error)),
        }
    }
}

fn done(answer: Answer) -> Result<(), Error> {
    match answer {
        Answer::Done => Ok(()),
        Answer::Failed(failed) => Err(Error::Refused(failed)),
        _ => Err(Error::Unexpected),
    }
}
