//! The life of a container after `create`: requests in, signals in, and the end.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use agent_protocol::{Event, ExitStatus, Failed, INIT_PROCESS, Request as Order, Response};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm::VmHandle;

use super::agent::{self, Agent, Asker, Said};
use super::boot;
use super::console::Console;
use super::control::{Answer, Peer};
use super::growth::Growing;
use super::machine::Room;
use super::oom;
use super::resolver::Resolver;
use super::rewire::{Rewiring, Wiring};
use super::signals::Signals;
use super::streams::Running;
use super::telling::Untold;
use crate::logging::chain;
use crate::phases::Phases;
use crate::state::{ContainerDir, State, Status};

/// Exit code when the virtual machine ended before the workload.
const VM_FAILED: u8 = 255;

/// Most verbs connected at the same time.
const MAX_PEERS: usize = 256;

/// How long the guest may take to kill the container's first process; then it is stopped itself.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the end of an `exec` waits for output that something it left behind holds open.
const EXEC_OUTPUT_TIMEOUT: Duration = Duration::from_millis(500);

/// How long a guest whose agent ended may take to end.
const GUEST_END_TIMEOUT: Duration = Duration::from_secs(2);

/// What `create` made.
pub(super) struct Parts {
    pub(super) vm: VmHandle,
    pub(super) room: Room,
    pub(super) agent: Agent<Asker>,
    pub(super) listener: UnixListener,
    pub(super) signals: Signals,
    pub(super) console: Option<Console>,
    pub(super) init: Running,
    pub(super) state: State,
    pub(super) phases: Phases,
    pub(super) wiring: Wiring,
}

/// A container between `create` and its end.
pub(super) struct Serving<'a> {
    pub(super) dir: &'a ContainerDir,
    pub(super) parts: Parts,
    pub(super) container: String,
    pub(super) peers: BTreeMap<u64, Peer>,
    next_peer: u64,
    pub(super) execs: BTreeMap<String, Running>,
    // When the guest is stopped because it did not kill the first process, or lost its agent.
    kill_deadline: Option<Instant>,
    agent_deadline: Option<Instant>,
    /// The exit code, once nothing more is to be done.
    pub(super) code: Option<u8>,
    out_of_memory_told: bool,
    pub(super) program_started: bool,
    pub(super) growing: Option<Growing>,
    pub(super) rewiring: Rewiring,
    pub(super) resolver: Resolver,
    pub(super) untold: Untold,
}

/// What an event came from.
enum Source {
    Agent,
    VmEnded,
    Signals,
    Listener,
    Peer(u64),
    Output,
    Network,
    Resolver,
    Changes,
}

impl<'a> Serving<'a> {
    pub(super) fn new(dir: &'a ContainerDir, parts: Parts) -> Self {
        Self {
            dir,
            parts,
            container: dir.id().to_string(),
            peers: BTreeMap::new(),
            next_peer: 0,
            execs: BTreeMap::new(),
            kill_deadline: None,
            agent_deadline: None,
            code: None,
            out_of_memory_told: false,
            program_started: false,
            growing: None,
            rewiring: Rewiring::default(),
            resolver: Resolver::default(),
            untold: Untold::default(),
        }
    }

    /// Serves until the container is over; the exit code of this process.
    pub(super) fn run(mut self) -> u8 {
        // What came while the guest booted woke nobody up.
        self.serve(&Source::Signals);
        loop {
            self.settle();
            if let Some(code) = self.code {
                self.end();
                return code;
            }
            match self.wait() {
                Ok(sources) => sources.into_iter().for_each(|source| self.serve(&source)),
                Err(error) => self.fail(&format!("wait for events: {error}")),
            }
        }
    }

    /// Waits for the next events, or until a deadline has passed.
    fn wait(&self) -> Result<Vec<Source>, Errno> {
        let mut sources = Vec::new();
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        let mut watch = |source, fd, flags| {
            sources.push(source);
            fds.push(PollFd::new(fd, flags));
        };
        let mut agent_flags = PollFlags::POLLIN;
        agent_flags.set(PollFlags::POLLOUT, self.parts.agent.wants_to_send());
        if self.agent_deadline.is_none() {
            watch(Source::Agent, self.parts.agent.as_fd(), agent_flags);
        }
        watch(Source::VmEnded, self.parts.vm.ended(), PollFlags::POLLIN);
        watch(Source::Signals, self.parts.signals.as_fd(), PollFlags::POLLIN);
        if self.peers.len() < MAX_PEERS {
            watch(Source::Listener, self.parts.listener.as_fd(), PollFlags::POLLIN);
        }
        watch(Source::Network, self.parts.wiring.watch.as_fd(), PollFlags::POLLIN);
        if let Some(changes) = self.parts.vm.changes() {
            watch(Source::Changes, changes.as_fd(), PollFlags::POLLIN);
        }
        self.resolver.fds().for_each(|fd| watch(Source::Resolver, fd, PollFlags::POLLIN));
        for (number, peer) in &self.peers {
            watch(Source::Peer(*number), peer.as_fd(), PollFlags::POLLIN);
        }
        // Output matters only once the process is over: before, it comes and goes without notice.
        for process in self.execs.values().chain([&self.parts.init]) {
            if process.exit.is_some() {
                process.outputs.fds().for_each(|fd| watch(Source::Output, fd, PollFlags::POLLIN));
            }
        }
        match poll(&mut fds, self.timeout()) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let mut fired = fds.iter().map(|fd| fd.any().unwrap_or(true));
        sources.retain(|_| fired.next().unwrap_or(false));
        Ok(sources)
    }

    fn timeout(&self) -> PollTimeout {
        let exec_deadline = |process: &Running| Some(process.exit?.1 + EXEC_OUTPUT_TIMEOUT);
        let deadlines = [
            self.kill_deadline,
            self.agent_deadline,
            self.growing.as_ref().map(|growing| growing.look_at),
            self.rewiring.look_at,
            self.untold.tell_at,
            self.resolver.deadline(),
        ];
        let next = self
            .execs
            .values()
            .filter_map(exec_deadline)
            .chain(deadlines.into_iter().flatten())
            .min();
        next.map_or(PollTimeout::NONE, |deadline| {
            // Rounded up, so as not to wake a moment too early and wait again.
            let left =
                deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        })
    }

    fn serve(&mut self, source: &Source) {
        match source {
            Source::Agent => {
                if let Err(error) = self.serve_agent() {
                    // PID 1 is gone, so the guest goes too, and says why on its console.
                    log::debug!("{}", chain(&error));
                    self.agent_deadline = Some(Instant::now() + GUEST_END_TIMEOUT);
                }
            }
            Source::VmEnded => self.vm_ended(),
            Source::Signals => {
                while let Some(signal) = self.parts.signals.next() {
                    self.pass_on(signal);
                }
            }
            Source::Listener => match Peer::accept(&self.parts.listener) {
                Ok(Some(peer)) => {
                    self.peers.insert(self.next_peer, peer);
                    self.next_peer += 1;
                }
                Ok(None) => {}
                Err(error) => log::warn!("control connection refused: {error}"),
            },
            Source::Peer(number) => self.serve_peer(*number),
            Source::Network => self.network_moved(),
            Source::Changes => self.files_changed(),
            // Answers are looked for whenever something happened.
            Source::Output | Source::Resolver => {}
        }
    }

    fn serve_agent(&mut self) -> Result<(), agent::Error> {
        self.parts.agent.flush()?;
        self.parts.agent.receive()?;
        while let Some(said) = self.parts.agent.next()? {
            match said {
                Said::Answer(asker, response) => self.answered(asker, response),
                Said::Event(event) => self.happened(event),
            }
        }
        Ok(())
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::Exited { process, status, .. } if process == INIT_PROCESS => {
                self.parts.init.exit = Some((status, Instant::now()));
                self.kill_deadline = None;
                self.save(Status::Stopped);
            }
            Event::Exited { process, status, .. } => {
                if let Some(process) = self.execs.get_mut(&process) {
                    process.exit = Some((status, Instant::now()));
                }
            }
            Event::OutOfMemory { .. } => {
                if !std::mem::replace(&mut self.out_of_memory_told, true) {
                    log::warn!("a process of the container ran into its memory limit: killed");
                    if let Err(error) = oom::show() {
                        log::warn!("show the engine that memory ran out: {error}");
                    }
                }
            }
            Event::NameQuery { number, stream, query } => self.resolve(number, stream, &query),
            Event::MemoryShort => self.memory_short(),
            Event::Ready { .. } => {}
        }
    }

    fn answered(&mut self, asker: Asker, response: Response) {
        let answer = match response {
            Response::Done | Response::Created { .. } => Answer::Done,
            Response::Processes(processes) => Answer::Processes(processes),
            Response::Stats(stats) => Answer::Stats(stats),
            Response::Failed(failed) => Answer::Failed(failed),
        };
        let done = matches!(answer, Answer::Done);
        match asker {
            Asker::Nobody => {}
            Asker::Network => {
                if let Answer::Failed(failed) = answer {
                    log::warn!("change the guest's network: {failed}");
                }
                self.rewired();
            }
            Asker::Changes => self.changes_told(),
            Asker::Peer(peer) => self.answer(peer, &answer),
            Asker::Start(peer) => self.started(peer, &answer),
            Asker::Freeze(peer, frozen) => {
                if done {
                    self.save(Status::of_live(frozen, self.program_started));
                }
                self.answer(peer, &answer);
            }
            Asker::Update(peer, files) => match answer {
                Answer::Failed(_) => self.answer(peer, &answer),
                _ => self.write_files(peer, files),
            },
            Asker::Exec(peer, name) => {
                if !done {
                    self.execs.remove(&name);
                }
                self.answer(peer, &answer);
            }
        }
    }

    pub(super) fn signal(&mut self, asker: Asker, process: String, signal: i32, all: bool) {
        let container = self.container.clone();
        self.ask(&Order::Signal { container, process, signal, all }, asker);
    }

    /// Passes a signal that this process got on to the workload it stands for.
    fn pass_on(&mut self, signal: i32) {
        if self.parts.init.exit.is_some() && signal != libc::SIGWINCH {
            // Only its last output is left, and nobody seems to read that.
            return self.finish();
        }
        let size = self.parts.console.as_ref().and_then(Console::window_size);
        match size.filter(|_| signal == libc::SIGWINCH) {
            Some(size) => {
                let container = self.container.clone();
                let process = INIT_PROCESS.into();
                self.ask(&Order::Resize { container, process, size }, Asker::Nobody);
            }
            None => self.signal(Asker::Nobody, INIT_PROCESS.into(), signal, false),
        }
    }

    /// Gives the guest a while to kill the first process.
    pub(super) fn kill(&mut self) {
        if self.parts.init.exit.is_some() {
            return self.finish();
        }
        self.kill_deadline.get_or_insert_with(|| Instant::now() + KILL_TIMEOUT);
    }

    pub(super) fn ask(&mut self, order: &Order, asker: Asker) {
        if let Err(error) = self.parts.agent.ask(order, asker) {
            log::debug!("{}", chain(&error));
            self.agent_deadline.get_or_insert_with(|| Instant::now() + GUEST_END_TIMEOUT);
        }
    }

    pub(super) fn answer(&mut self, number: u64, answer: &Answer) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        if peer.answer(answer).is_err() {
            self.leave(number);
        }
    }

    pub(super) fn refuse(&mut self, peer: u64, message: &str) {
        let failed = Failed { message: message.into(), errno: libc::EINVAL };
        self.answer(peer, &Answer::Failed(failed));
    }

    /// Draws the conclusions: who has ended, and which deadline has passed.
    fn settle(&mut self) {
        let now = Instant::now();
        let over: Vec<String> = self
            .execs
            .iter_mut()
            .filter_map(|(name, process)| {
                let (_, since) = process.exit?;
                let late = now >= since + EXEC_OUTPUT_TIMEOUT;
                (late || process.outputs.delivered()).then(|| name.clone())
            })
            .collect();
        for name in over {
            self.exec_ended(&name);
        }
        if self.parts.init.exit.is_some() && self.parts.init.outputs.delivered() {
            self.finish();
        }
        self.pass_answers();
        self.look_at_memory();
        if self.rewiring.look_at.is_some_and(|at| now >= at) {
            self.rewire();
        }
        if self.untold.tell_at.is_some_and(|at| now >= at) {
            self.tell_changes();
        }
        let passed = |deadline: Option<Instant>| deadline.is_some_and(|deadline| now >= deadline);
        if self.code.is_none() && passed(self.kill_deadline) {
            log::warn!("the guest did not kill the container: it is stopped itself");
            self.code = Some(ExitStatus::Signal(libc::SIGKILL).shell_code());
        }
        if self.code.is_none() && passed(self.agent_deadline) {
            self.fail("the agent in the guest ended or misbehaved, and the guest did not end");
        }
    }

    fn exec_ended(&mut self, name: &str) {
        let Some(process) = self.execs.remove(name) else { return };
        if let (Some((status, _)), Some(peer)) = (process.exit, process.peer) {
            self.answer(peer, &Answer::Exited(status));
        }
    }

    fn vm_ended(&mut self) {
        if self.parts.init.exit.is_some() {
            self.finish();
        } else {
            self.fail("the virtual machine ended before its container");
        }
    }

    /// The container is over as it should.
    fn finish(&mut self) {
        if let Some((status, _)) = self.parts.init.exit {
            self.code = Some(status.shell_code());
        }
    }

    /// The container is over, and not by its own doing.
    fn fail(&mut self, what: &str) {
        let console = boot::one_line(&self.parts.vm.console_tail());
        log::error!("{what}; the guest's last console lines: {console}");
        self.code.get_or_insert(VM_FAILED);
    }

    /// Tells everyone who still waits.
    fn end(&mut self) {
        self.save(Status::Stopped);
        let names: Vec<String> = self.execs.keys().cloned().collect();
        for name in names {
            if let Some(process) = self.execs.get_mut(&name) {
                // Whatever ran beside the first process was killed with it.
                process.exit.get_or_insert((ExitStatus::Signal(libc::SIGKILL), Instant::now()));
            }
            self.exec_ended(&name);
        }
        self.parts.vm.stop();
        self.parts.wiring.network.part();
    }

    pub(super) fn save(&mut self, status: Status) {
        if std::mem::replace(&mut self.parts.state.status, status) == status {
            return;
        }
        if let Err(error) = self.dir.save(&self.parts.state) {
            log::warn!("{}", chain(&error));
        }
    }
}
