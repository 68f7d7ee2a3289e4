//! Serves one host: a loop around poll(2) and one arm per request.
//!
//! Which descriptors matter changes with every chunk a stream moves, so the loop states them afresh
//! each time instead of keeping a registered copy in step.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::frame::FrameError;
use agent_protocol::{
    Event, ExitStatus, Failed, INIT_PROCESS, Message, Request, Response, StdioStream, StreamHello,
    WindowSize,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, VsockAddr, accept4, getpeername};
use nix::unistd::Pid;

use crate::container::cgroup::send_signal;
use crate::container::{Container, Status, listing, stats};
use crate::control::Control;
use crate::devices::Devices;
use crate::failure::{Context, failed, failed_with};
use crate::greeting::{Greeting, Progress};
use crate::growth::Growth;
use crate::lifecycle::Pending;
use crate::repeating::Repeating;
use crate::resolver::Resolver;
use crate::stdio::{CHUNK_BYTES, Stdio, set_non_blocking};
use crate::{HOST_CID, processors, reaper};

/// Streams that may wait for their hello or their process. The host opens three per process before
/// it asks for that, and processes are made one by one: this many it may ask for at once.
const MAX_WAITING_STREAMS: usize = 3 * 512;

/// How long the output of an ended process may keep its end untold, if the host does not read it.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Why serving ended before the host was done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The loop itself cannot go on.
    #[error("event loop: {0}")]
    Loop(#[from] io::Error),
    /// The control stream failed or made no sense.
    #[error("control stream: {0}")]
    Control(#[from] FrameError),
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Error::Loop(errno.into())
    }
}

/// The answer to a request, or nothing yet.
pub type Answer = Result<Option<Response>, Failed>;

/// A process of a container, until its end was told and its output has ended.
#[derive(Debug)]
pub struct Process {
    pub(crate) container: String,
    pub(crate) name: String,
    pub(crate) pid: Pid,
    pub(crate) stdio: Stdio,
    pub(crate) end: Option<End>,
}

/// The end of a process.
#[derive(Debug)]
pub struct End {
    status: ExitStatus,
    deadline: Instant,
    told: bool,
}

/// All the agent knows.
#[derive(Debug)]
pub struct Server {
    control: Control,
    listener: OwnedFd,
    signals: SignalFd,
    pub(crate) cgroups: PathBuf,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) processes: Vec<Process>,
    greetings: Vec<Greeting>,
    pub(crate) unclaimed: Vec<(StreamHello, OwnedFd)>,
    pub(crate) pending: Option<Pending>,
    pub(crate) devices: Devices,
    pub(crate) resolver: Option<Resolver>,
    pub(crate) growth: Option<Growth>,
    repeating: Repeating,
    over: bool,
    started_us: u64,
}

impl Server {
    /// Serves the host behind `control`, with stdio streams from `listener` and containers below
    /// the cgroup v2 hierarchy at `cgroups`; the agent began at `started_us` of the guest's uptime. From
    /// here on SIGCHLD is blocked.
    pub fn new(
        control: OwnedFd,
        listener: OwnedFd,
        cgroups: PathBuf,
        started_us: u64,
    ) -> io::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block()?;
        let signals =
            SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        set_non_blocking(&control)?;
        set_non_blocking(&listener)?;
        Ok(Self {
            control: Control::new(control),
            listener,
            signals,
            cgroups,
            containers: BTreeMap::new(),
            processes: Vec::new(),
            greetings: Vec::new(),
            unclaimed: Vec::new(),
            pending: None,
            devices: Devices::default(),
            resolver: None,
            growth: None,
            repeating: Repeating::default(),
            over: false,
            started_us,
        })
    }

    /// Says that the agent is ready and serves until the host is done or gone.
    pub fn run(&mut self) -> Result<(), Error> {
        self.tell(Event::Ready {
            version: agent_protocol::VERSION,
            kernel: kernel_release(),
            started_us: self.started_us,
            uptime_us: uptime_us()?,
        })?;
        let mut scratch = vec![0; CHUNK_BYTES];
        while !self.is_done() {
            self.wait()?;
            self.control.flush()?;
            self.accept();
            self.greet();
            self.advance_pending()?;
            self.reap();
            self.tell_memory()?;
            self.tell_queries()?;
            self.processes.iter_mut().for_each(|process| process.stdio.run(&mut scratch));
            self.tell_ends()?;
            self.serve()?;
        }
        Ok(())
    }

    /// Whether the host has asked for anything yet.
    pub fn was_asked(&self) -> bool {
        self.control.was_asked()
    }

    /// Whether the host is gone, or has its answer to the last request.
    fn is_done(&self) -> bool {
        self.control.is_over() || (self.over && self.control.is_flushed())
    }

    /// Waits until something can be done.
    fn wait(&self) -> io::Result<()> {
        let idle = self.pending.is_none() && !self.over;
        let mut waiting = vec![
            PollFd::new(self.control.as_fd(), self.control.interest(idle)),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        waiting.extend(self.greetings.iter().map(|greeting| readable(greeting.as_fd())));
        waiting.extend(self.pending.iter().map(|pending| readable(pending.as_fd())));
        let memory = self.containers.values().filter_map(|container| container.memory.as_ref());
        waiting.extend(memory.map(|watch| PollFd::new(watch.as_fd(), PollFlags::POLLPRI)));
        waiting.extend(self.growth.iter().map(|it| PollFd::new(it.as_fd(), PollFlags::POLLPRI)));
        waiting.extend(self.resolver.iter().flat_map(Resolver::fds).map(readable));
        waiting.extend(self.processes.iter().flat_map(|process| process.stdio.interests()));
        match poll(&mut waiting, self.timeout()) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Until the first end that has to be told, or process that has to be given up, in any case.
    fn timeout(&self) -> PollTimeout {
        let untold = self.processes.iter().filter_map(|process| process.end.as_ref());
        let ends = untold.filter(|end| !end.told).map(|end| end.deadline);
        let deadline = ends.chain(self.pending.as_ref().and_then(Pending::deadline)).min();
        deadline.map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: waking too early would mean waking again at once.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        })
    }

    pub(crate) fn tell(&mut self, event: Event) -> Result<(), FrameError> {
        self.control.send(&Message::Event(event))
    }

    pub(crate) fn respond(&mut self, answer: Result<Response, Failed>) -> Result<(), FrameError> {
        let response = answer.unwrap_or_else(Response::Failed);
        match self.control.send(&Message::Response(response)) {
            // What a container makes this large must not end the guest, which an error here does.
            Err(FrameError::TooLarge(bytes)) => {
                let failure = failed(format!("the answer is too large: {bytes} bytes"));
                self.control.send(&Message::Response(Response::Failed(failure)))
            }
            result => result,
        }
    }

    fn serve(&mut self) -> Result<(), FrameError> {
        while self.pending.is_none() && !self.over {
            let Some(request) = self.control.take()? else { break };
            match self.answer(request).transpose() {
                Some(answer) => self.respond(answer)?,
                None => break,
            }
        }
        Ok(())
    }

    fn answer(&mut self, request: Request) -> Answer {
        let done = match request {
            Request::ConfigureSandbox(sandbox) => self.configure(&sandbox),
            Request::MemoryAdded { more } => self.memory_added(more),
            Request::ChangeNetwork(change) => self.change_network(&change),
            Request::NameAnswer { number, answer } => {
                if let Some(resolver) = &mut self.resolver {
                    resolver.answer(number, answer.as_deref());
                }
                Ok(())
            }
            Request::Repeat(changes) => {
                self.repeating.add(changes);
                Ok(())
            }
            Request::CreateContainer(container) => return self.create(&container),
            Request::StartContainer { container } => return self.start(&container),
            Request::Exec { container, name, process } => {
                let answer = self.exec(&container, &name, &process);
                if answer.is_err() {
                    self.drop_streams(&container, &name);
                }
                return answer;
            }
            Request::Signal { container, process, signal, all } => {
                self.signal(&container, &process, signal, all)
            }
            Request::Resize { container, process, size } => self.resize(&container, &process, size),
            Request::Pause { container } => self.freeze(&container, true),
            Request::Resume { container } => self.freeze(&container, false),
            Request::Update { container, files } => {
                self.container(&container)?.cgroup.write_files(&files)
            }
            Request::SetProcessors { online } => {
                processors::set_online(Path::new(processors::PROCESSORS), online)
            }
            Request::Processes { container } => return self.list(&container),
            Request::Stats { container } => {
                let stats = stats::read(&self.container(&container)?.cgroup);
                return Ok(Some(Response::Stats(Box::new(stats))));
            }
            Request::RemoveContainer { container } => self.remove(&container),
            Request::Shutdown => {
                self.over = true;
                Ok(())
            }
        };
        done.map(|()| Some(Response::Done))
    }

    /// Drops the streams of a process that will not come, with those that came along with its request.
    fn drop_streams(&mut self, container: &str, name: &str) {
        self.accept();
        self.greet();
        let is_its = |hello: &StreamHello| hello.container == container && hello.process == name;
        self.unclaimed.retain(|(hello, _)| !is_its(hello));
    }

    pub(crate) fn container(&mut self, id: &str) -> Result<&mut Container, Failed> {
        let missing = || failed_with(format!("container {id:?} does not exist"), Errno::ENOENT);
        self.containers.get_mut(id).ok_or_else(missing)
    }

    /// The process of this name that has not ended.
    pub(crate) fn process(&self, container: &str, name: &str) -> Option<&Process> {
        let is_it = |process: &&Process| {
            process.end.is_none() && process.container == container && process.name == name
        };
        self.processes.iter().find(is_it)
    }

    fn signal(&mut self, id: &str, name: &str, signal: i32, all: bool) -> Result<(), Failed> {
        let step = format!("send signal {signal}");
        let cgroup = &self.container(id)?.cgroup;
        if all {
            let result =
                if signal == libc::SIGKILL { cgroup.kill() } else { cgroup.signal(signal) };
            return result.context(step);
        }
        let process = self.process(id, name).ok_or_else(|| not_running(name))?;
        send_signal(process.pid, signal).context(step)
    }

    fn resize(&mut self, id: &str, name: &str, size: WindowSize) -> Result<(), Failed> {
        self.container(id)?;
        self.process(id, name).ok_or_else(|| not_running(name))?.stdio.resize(size)
    }

    fn freeze(&mut self, id: &str, frozen: bool) -> Result<(), Failed> {
        let container = self.container(id)?;
        let next = match (&container.status, frozen) {
            (Status::Running, true) => Status::Paused,
            (Status::Paused, false) => Status::Running,
            (_, true) => return Err(failed("cannot pause a container that is not running")),
            (_, false) => return Err(failed("cannot resume a container that is not paused")),
        };
        container.cgroup.freeze(frozen)?;
        container.status = next;
        Ok(())
    }

    fn list(&mut self, id: &str) -> Answer {
        let pids = self.container(id)?.cgroup.processes().context("list processes")?;
        Ok(Some(Response::Processes(listing::describe(&pids))))
    }

    fn remove(&mut self, id: &str) -> Result<(), Failed> {
        let container = self.container(id)?;
        if container.is_alive() {
            return Err(failed(format!("cannot remove container {id:?}: it is not stopped")));
        }
        container.cgroup.remove()?;
        self.forget(id);
        Ok(())
    }

    /// Drops everything that belongs to a container whose cgroup is gone.
    pub(crate) fn forget(&mut self, id: &str) {
        self.containers.remove(id);
        self.processes.retain(|process| process.container != id);
        self.unclaimed.retain(|(hello, _)| hello.container != id);
    }

    fn accept(&mut self) {
        for _ in 0..MAX_WAITING_STREAMS {
            // The kernel sleeps until the next tick of its clock before it says that there is none.
            let mut waiting = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut waiting, PollTimeout::ZERO), Ok(1..)) {
                return;
            }
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let Ok(stream) = accept4(self.listener.as_raw_fd(), flags) else { return };
            // SAFETY: accept4 returned a new descriptor that nobody else owns.
            let stream = unsafe { OwnedFd::from_raw_fd(stream) };
            if !is_from_host(&stream) {
                continue;
            }
            self.greetings.push(Greeting::new(stream));
            if self.greetings.len() + self.unclaimed.len() > MAX_WAITING_STREAMS {
                self.drop_oldest_stream();
            }
        }
    }

    /// The process of the oldest stream that waits is the least likely to come.
    fn drop_oldest_stream(&mut self) {
        if self.unclaimed.is_empty() {
            self.greetings.remove(0);
        } else {
            self.unclaimed.remove(0);
        }
    }

    fn greet(&mut self) {
        for greeting in std::mem::take(&mut self.greetings) {
            match greeting.advance() {
                Progress::Waiting(greeting) => self.greetings.push(greeting),
                Progress::Done(hello, stream) => self.unclaimed.push((hello, stream)),
                Progress::Refused => log::warn!("a stdio stream without a hello was closed"),
            }
        }
        self.join_streams();
    }

    /// Gives each stream that waits to its process, if that has come.
    pub(crate) fn join_streams(&mut self) {
        for (hello, stream) in std::mem::take(&mut self.unclaimed) {
            let kind: StdioStream = hello.stream;
            let owner = self.processes.iter_mut().find(|process| {
                process.container == hello.container
                    && process.name == hello.process
                    && process.stdio.wants(kind)
            });
            match owner {
                Some(process) => process.stdio.attach(kind, stream),
                None => self.unclaimed.push((hello, stream)),
            }
        }
    }

    fn reap(&mut self) {
        while matches!(self.signals.read_signal(), Ok(Some(_))) {}
        while let Some((pid, status)) = reaper::next() {
            self.end(pid, status);
        }
    }

    fn end(&mut self, pid: Pid, status: ExitStatus) {
        self.repeating.ended(pid);
        let is_it = |process: &&mut Process| process.pid == pid && process.end.is_none();
        // Any other child is an orphan, of which nobody wants to hear.
        let Some(process) = self.processes.iter_mut().find(is_it) else { return };
        let deadline = Instant::now() + DRAIN_LIMIT;
        process.end = Some(End { status, deadline, told: false });
        process.stdio.end_process();
        if process.name != INIT_PROCESS {
            return;
        }
        if let Some(container) = self.containers.get_mut(&process.container) {
            container.status = Status::Stopped;
            // Without a pid namespace of its own the rest would live on and keep the streams open.
            if let Err(error) = container.cgroup.kill() {
                log::warn!("kill what is left of {}: {error}", process.container);
            }
        }
    }

    fn tell_memory(&mut self) -> Result<(), FrameError> {
        if self.growth.as_mut().is_some_and(Growth::is_short) {
            self.tell(Event::MemoryShort)?;
        }
        let killed = self
            .containers
            .iter_mut()
            .filter_map(|(id, container)| container.memory.as_mut()?.killed().then(|| id.clone()));
        for container in killed.collect::<Vec<_>>() {
            self.tell(Event::OutOfMemory { container })?;
        }
        Ok(())
    }

    /// Tells the ends of processes whose output has been sent, and lets go of those that are done.
    fn tell_ends(&mut self) -> Result<(), FrameError> {
        let now = Instant::now();
        // Whoever asked for a process hears that it runs, or why not, before hearing of its end.
        let unanswered = self.pending.as_ref().map(Pending::pid);
        let mut ended = Vec::new();
        for process in &mut self.processes {
            let Some(end) = process.end.as_mut().filter(|_| Some(process.pid) != unanswered) else {
                continue;
            };
            if !end.told && (process.stdio.is_drained() || now >= end.deadline) {
                end.told = true;
                let (container, process) = (process.container.clone(), process.name.clone());
                ended.push(Event::Exited { container, process, status: end.status });
            }
        }
        self.processes.retain(|process| {
            !process.stdio.is_finished() || process.end.as_ref().is_none_or(|end| !end.told)
        });
        ended.into_iter().try_for_each(|event| self.tell(event))
    }
}

fn not_running(name: &str) -> Failed {
    let what = if name == INIT_PROCESS { "container" } else { "process" };
    failed_with(format!("{what} not running"), Errno::ESRCH)
}

/// Whether the peer is the host: a process of a container can make vsock connections, too, and must
/// not pass for the owner of another one's stdio. Streams of other kinds come from tests.
fn is_from_host(stream: &OwnedFd) -> bool {
    getpeername::<VsockAddr>(stream.as_raw_fd()).map_or(true, |peer| peer.cid() == HOST_CID)
}

fn kernel_release() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim_end().to_owned()
}

/// Microseconds since the guest started.
pub fn uptime_us() -> nix::Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    Ok(u64::try_from(Duration::from(now).as_micros()).unwrap_or(u64::MAX))
}
