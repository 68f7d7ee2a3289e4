//! `exec`: one more process in a running container, and the host process that stands for it.
//!
//! The carrier hands its stdio to the sandbox process, which joins it with the guest; then it only
//! passes signals and sizes on, and exits as the process did. No byte goes through it.

use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::path::PathBuf;

use agent_protocol::{ExitStatus, Process};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::console::Console;
use super::control::Request;
use super::launch::{Launched, Starter};
use super::signals::Signals;
use super::stdio::{self, Stdio};
use super::{EXEC_VERB, Error, absolute, write_pid_file};
use crate::logging::{LogOptions, chain};
use crate::state::{ContainerDir, ContainerId, StateRoot};

/// Exit code of a carrier that lost its sandbox: the container was killed with everything in it.
const LOST: i32 = 137;

/// What to run, and how to stand for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecOptions {
    /// Name of the process in the container; unique and not empty.
    pub name: String,
    /// The process.
    pub process: Process,
    /// Where the master of a new terminal is sent.
    pub console_socket: Option<PathBuf>,
    /// Where the carrier's pid is written.
    pub pid_file: Option<PathBuf>,
    /// Return once the process runs, and leave a carrier behind.
    pub detach: bool,
    /// Where the carrier logs.
    pub log: LogOptions,
}

/// What became of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecOutcome {
    /// It ended with this exit code.
    Exited(i32),
    /// It runs, and the process with this pid stands for it.
    Detached(i32),
}

/// What a detached carrier is told.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    root: PathBuf,
    id: String,
    options: ExecOptions,
}

/// Runs one more process in the container of `dir`.
pub fn exec(dir: &ContainerDir, options: &ExecOptions) -> Result<ExecOutcome, Error> {
    if options.detach {
        return detached(dir, options);
    }
    let carrier = Carrier::start(dir, options)?;
    if let Some(path) = &options.pid_file {
        write_pid_file(path, nix::unistd::getpid().as_raw())?;
    }
    Ok(ExecOutcome::Exited(carrier.stand()))
}

fn detached(dir: &ContainerDir, options: &ExecOptions) -> Result<ExecOutcome, Error> {
    let mut options = options.clone();
    options.console_socket = options.console_socket.as_deref().map(absolute);
    options.log.path = options.log.path.as_deref().map(absolute);
    let pid_file = options.pid_file.take();
    let root = dir.path().parent().map(absolute).unwrap_or_default();
    let order = Order { root, id: dir.id().to_string(), options };
    let mut launched = Launched::start(EXEC_VERB, dir.id().as_str(), &order)?;
    launched.wait_ready()?;
    let pid = launched.pid();
    if let Some(path) = pid_file {
        if let Err(error) = write_pid_file(&path, pid) {
            launched.abandon();
            return Err(error);
        }
    }
    launched.commit()?;
    Ok(ExecOutcome::Detached(pid))
}

/// Body of the hidden verb; the result is the exit code.
pub(super) fn main(fd: RawFd) -> i32 {
    let (mut starter, order) = match Starter::meet::<Order>(fd) {
        Ok(met) => met,
        Err(error) => {
            eprintln!("this verb is for coracle's own use: {}", chain(&error));
            return 1;
        }
    };
    let started = || {
        // Without a log of its own it has nowhere to say anything, and nothing to say either.
        let _ = order.options.log.install();
        let dir = StateRoot::new(&order.root).open(&ContainerId::parse(&order.id)?)?;
        Carrier::start(&dir, &order.options)
    };
    let carrier = match started().and_then(|carrier| Ok(stdio::let_go().map(|()| carrier)?)) {
        Ok(carrier) => carrier,
        Err(error) => {
            starter.failed(chain(&error));
            return 1;
        }
    };
    // When the caller is gone, so is the connection in a moment, and with it the process.
    if starter.ready().is_err() || !starter.committed() {
        return 1;
    }
    carrier.stand()
}

/// A process in the guest that this process stands for.
struct Carrier {
    client: Client,
    signals: Signals,
    console: Option<Console>,
    name: String,
}

impl Carrier {
    /// Starts the process with this process's stdio.
    fn start(dir: &ContainerDir, options: &ExecOptions) -> Result<Self, Error> {
        let client = Client::connect(dir)?;
        let signals = Signals::collect().map_err(|error| Error::Wait(error.into()))?;
        let mut process = Box::new(options.process.clone());
        let terminal = process.terminal.is_some();
        let stdio = Stdio::take(terminal, options.console_socket.as_deref())?;
        process.stdio = stdio.streams();
        if terminal {
            process.terminal = stdio.window_size().or(process.terminal);
        }
        let request = Request::Exec { name: options.name.clone(), process };
        let console = match stdio {
            Stdio::Terminal(console) => {
                client.exec(&request, &[console.fd()])?;
                Some(console)
            }
            Stdio::Streams(streams) => {
                let fds: Vec<BorrowedFd<'_>> = streams.iter().flatten().map(AsFd::as_fd).collect();
                client.exec(&request, &fds)?;
                None
            }
        };
        Ok(Self { client, signals, console, name: options.name.clone() })
    }

    /// Passes signals on until the process ends; its exit code.
    fn stand(mut self) -> i32 {
        loop {
            match self.wait() {
                Ok(Some(status)) => return status.shell_code().into(),
                Ok(None) => {}
                Err(error) => {
                    log::debug!("{}", chain(&error));
                    return LOST;
                }
            }
        }
    }

    fn wait(&mut self) -> Result<Option<ExitStatus>, Error> {
        let mut fds = [
            PollFd::new(self.client.stream().as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(None),
            Err(error) => return Err(Error::Wait(error.into())),
        }
        let [said, signalled] = fds.each_ref().map(|fd| fd.any().unwrap_or_default());
        if signalled {
            while let Some(signal) = self.signals.next() {
                self.client.post(&self.passed_on(signal))?;
            }
        }
        if said { self.client.exit() } else { Ok(None) }
    }

    /// What a signal to this process means to the one it stands for.
    fn passed_on(&self, signal: i32) -> Request {
        let process = self.name.clone();
        let size = self.console.as_ref().and_then(Console::window_size);
        match size.filter(|_| signal == libc::SIGWINCH) {
            Some(size) => Request::Resize { process, size },
            None => Request::Signal { process, signal, all: false },
        }
    }
}
