//! Requests that make processes. Such a process takes a while and reports over a channel; until
//! then the streams of the others go on, and further requests wait.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent_protocol::frame::{Decoder, FrameError};
use agent_protocol::{
    Container as Configuration, Failed, INIT_PROCESS, Process as Program, Response,
};
use nix::errno::Errno;
use nix::unistd::Pid;

use crate::container::report::{Report, go_on};
use crate::container::{Container, Spawned, Status, fetch_descriptor, kill};
use crate::failure::{Context, failed, failed_with};
use crate::reaper;
use crate::server::{Answer, Process, Server};

/// Bytes read at once; reports are short.
const CHUNK_BYTES: usize = 1024;

/// How long an `exec`ed process may take to its program. The processes of the container see it
/// before that and can stop it, and all other requests wait for it.
const EXEC_LIMIT: Duration = Duration::from_secs(10);

/// A process that is being made or started, and the request that waits for it.
#[derive(Debug)]
pub struct Pending {
    container: String,
    pid: Pid,
    channel: UnixStream,
    reports: Decoder,
    goal: Goal,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum Goal {
    Create(OwnedFd),
    Start,
    Exec(OwnedFd),
}

/// What was heard from the process.
enum News {
    None,
    Report(Report),
    /// The channel is closed: the program runs, or the process is gone.
    Closed,
}

impl AsFd for Pending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Pending {
    fn new(container: &str, pid: Pid, channel: UnixStream, goal: Goal) -> Self {
        let deadline = matches!(goal, Goal::Exec(_)).then(|| Instant::now() + EXEC_LIMIT);
        let (container, reports) = (container.to_owned(), Decoder::default());
        Self { container, pid, channel, reports, goal, deadline }
    }

    /// When to wait no longer.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// The process that is being made or started.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    fn listen(&mut self) -> Result<News, FrameError> {
        let mut bytes = [0; CHUNK_BYTES];
        loop {
            if let Some(report) = self.reports.take()? {
                return Ok(News::Report(report));
            }
            match (&self.channel).read(&mut bytes) {
                Ok(0) => return Ok(News::Closed),
                Ok(count) => self.reports.push(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(News::None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Ok(News::Closed),
            }
        }
    }
}

impl Server {
    pub(crate) fn create(&mut self, configuration: &Configuration) -> Answer {
        let id = &configuration.id;
        if self.containers.contains_key(id) {
            let message = format!("container {id:?} exists already");
            return Err(failed_with(message, Errno::EEXIST));
        }
        let (container, spawned) = Container::create(configuration, &self.cgroups)?;
        self.containers.insert(id.clone(), container);
        self.follow(id, INIT_PROCESS, spawned, Goal::Create);
        Ok(None)
    }

    pub(crate) fn start(&mut self, id: &str) -> Answer {
        let container = self.container(id)?;
        let Status::Created(channel) = &container.status else {
            return Err(failed("cannot start a container that is not in state created"));
        };
        let channel = channel.try_clone().context("duplicate the channel")?;
        go_on(&channel).context("start the container")?;
        container.status = Status::Running;
        let init = container.init;
        self.pending = Some(Pending::new(id, init, channel, Goal::Start));
        Ok(None)
    }

    pub(crate) fn exec(&mut self, id: &str, name: &str, program: &Program) -> Answer {
        if name == INIT_PROCESS || self.process(id, name).is_some() {
            let message = format!("process name {name:?} is in use");
            return Err(failed_with(message, Errno::EEXIST));
        }
        let spawned = self.container(id)?.exec(program)?;
        self.follow(id, name, spawned, Goal::Exec);
        Ok(None)
    }

    fn follow(&mut self, id: &str, name: &str, spawned: Spawned, goal: fn(OwnedFd) -> Goal) {
        let Spawned { pid, stdio, channel, pidfd } = spawned;
        let (container, name) = (id.to_owned(), name.to_owned());
        self.processes.push(Process { container, name, pid, stdio, end: None });
        self.join_streams();
        self.pending = Some(Pending::new(id, pid, channel, goal(pidfd)));
    }

    /// Hears what the process that is being made has to tell.
    pub(crate) fn advance_pending(&mut self) -> Result<(), FrameError> {
        while let Some(mut pending) = self.pending.take() {
            let news = pending.listen().unwrap_or_else(|error| {
                News::Report(Report::Failed(failed(format!("broken report: {error}"))))
            });
            match news {
                News::None if pending.is_late() => {
                    let failure = failed("the process does not get to its program: it was killed");
                    self.give_up(&pending, failure)?;
                }
                News::None => {
                    self.pending = Some(pending);
                    break;
                }
                News::Report(Report::Terminal(number)) => {
                    match self.take_terminal(&pending, number) {
                        Ok(()) => self.pending = Some(pending),
                        Err(failure) => self.give_up(&pending, failure)?,
                    }
                }
                News::Report(Report::Created) => self.created(pending)?,
                News::Report(Report::Failed(failure)) => self.give_up(&pending, failure)?,
                News::Closed => self.closed(&pending)?,
            }
        }
        Ok(())
    }

    fn take_terminal(&mut self, pending: &Pending, number: i32) -> Result<(), Failed> {
        let (Goal::Create(pidfd) | Goal::Exec(pidfd)) = &pending.goal else {
            return Err(failed("a started process opened a terminal"));
        };
        let step = "take over the terminal";
        let master = fetch_descriptor(pidfd, number).context(step)?;
        let process = self.processes.iter_mut().find(|process| process.pid == pending.pid);
        let process = process.ok_or_else(|| failed("the process has ended"))?;
        process.stdio.set_terminal(master).context(step)?;
        go_on(&pending.channel).context(step)
    }

    fn created(&mut self, pending: Pending) -> Result<(), FrameError> {
        let pid = pending.pid.as_raw();
        if let Some(container) = self.containers.get_mut(&pending.container) {
            container.status = Status::Created(pending.channel);
        }
        self.respond(Ok(Response::Created { pid }))
    }

    fn closed(&mut self, pending: &Pending) -> Result<(), FrameError> {
        match pending.goal {
            Goal::Create(_) => {
                let failure = failed("the first process ended before it was ready");
                self.give_up(pending, failure)
            }
            Goal::Start => self.respond(Ok(Response::Done)),
            Goal::Exec(_) => self.respond(Ok(Response::Created { pid: pending.pid.as_raw() })),
        }
    }

    /// Answers with a failure and leaves nothing behind. A container that failed to start is left
    /// as stopped: its end is told when its process has gone, a moment later.
    fn give_up(&mut self, pending: &Pending, failure: Failed) -> Result<(), FrameError> {
        let mut failure = failure;
        match &pending.goal {
            Goal::Start => {}
            Goal::Exec(pidfd) => {
                // It may be gone already.
                let _ = kill(pidfd);
                self.processes.retain(|process| process.pid != pending.pid);
            }
            Goal::Create(_) => {
                if let Some(container) = self.containers.get(&pending.container) {
                    // It may be gone already.
                    let _ = container.cgroup.kill();
                    reaper::wait(pending.pid);
                    if let Err(error) = container.cgroup.remove() {
                        failure.message = format!("{}; {}", failure.message, error.message);
                    }
                }
                self.forget(&pending.container);
            }
        }
        self.respond(Err(failure))
    }
}
