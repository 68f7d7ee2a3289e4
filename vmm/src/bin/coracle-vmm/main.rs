//! `coracle-vmm`: starts one virtual machine from a configuration file, serves its control socket, and
//! ends as it ends.
#![cfg_attr(not(test), no_main)]

mod api;
mod arguments;
mod fields;
mod http;
mod limits;
mod logger;
mod machine;
mod report;
mod resources;
mod server;
mod signals;
mod terminal;

use std::ffi::c_int;
use std::fs;
use std::io::{self, IsTerminal};
use std::mem;
use std::os::fd::AsFd;
use std::os::unix::fs::chown;

use anyhow::{Context, bail};
use clap::Parser;
use log::LevelFilter;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm::{ConsoleConfig, ConsoleOutput, Exit, VmConfig};

use crate::arguments::Arguments;
use crate::machine::{Machine, State};
use crate::report::Report;
use crate::server::Server;
use crate::signals::Signals;

/// How long a control socket rests that cannot let a client in.
const RETRY_MS: u16 = 1000;

/// Who ended the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The guest, or an error.
    Itself,
    /// A client of the control socket.
    Client,
    /// This signal.
    Signal(i32),
}

#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> c_int {
    vmm::run_program(|| {
        vmm::use_one_heap();
        if log::set_logger(&logger::Stderr).is_ok() {
            log::set_max_level(LevelFilter::Warn);
        }
        run(&Arguments::parse()).unwrap_or_else(|error| {
            eprintln!("coracle-vmm: {}", told(&error));
            1
        })
    })
}

fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let config = arguments.configuration()?;
    if arguments.check {
        return Ok(check(arguments, &config));
    }
    if let Some(path) = &arguments.cgroup {
        limits::join_cgroup(path).with_context(|| format!("--cgroup: move to {path:?}"))?;
    }
    limits::check(&arguments.resource_limits, &config).context("--resource-limit")?;
    limits::set(&arguments.resource_limits).context("set resource limits")?;
    vmm::forbid_core_dumps().context("forbid core dumps")?;
    vmm::leave_namespaces().context("leave the host's IPC and UTS namespaces")?;
    let interactive = takes_keys(&config.console) && io::stdin().is_terminal();
    // Before the first thread starts, so that every thread leaves these signals to this one.
    let signals = Signals::open().context("receive signals")?;
    let mut server = match &arguments.api_socket {
        Some(path) => {
            let open = Server::open(path).and_then(|server| {
                let owner = config.user.map(|user| chown(path, Some(user.uid), Some(user.gid)));
                owner.unwrap_or(Ok(())).map(|()| server)
            });
            Some(open.with_context(|| format!("--api-socket: listen on {path:?}"))?)
        }
        None => None,
    };
    let report = arguments.metrics.as_deref().map(Report::open).transpose()?;
    let needs_few = arguments.resource_limits.is_empty() && !opens_more(&config);
    let mut machine = Machine::build(config, interactive)?;
    report.as_ref().map_or(Ok(()), Report::empty)?;
    if needs_few {
        limits::lower_descriptor_limit().context("lower the limit of open files")?;
    }
    if !arguments.paused {
        machine.become_state(State::Running)?;
    }
    let ending = serve(&mut machine, server.as_mut(), &signals).context("wait for the machine")?;
    machine.become_state(State::Stopped)?;
    if let Some(report) = report {
        report.write(&machine.metrics())?;
    }
    exit_code(finish(machine, signals, ending), ending)
}

/// Says everything that keeps the machine from starting.
fn check(arguments: &Arguments, config: &VmConfig) -> u8 {
    let mut found: Vec<String> = vmm::check(config).iter().map(ToString::to_string).collect();
    let mut look = |flag: &str, outcome: anyhow::Result<()>| {
        found.extend(outcome.err().map(|error| format!("{flag}: {error:#}")));
    };
    if let Some(path) = &arguments.cgroup {
        look("--cgroup", limits::check_cgroup(path));
    }
    look("--resource-limit", limits::check(&arguments.resource_limits, config));
    if let Some(path) = &arguments.api_socket {
        look("--api-socket", Server::check(path).with_context(|| format!("{path:?}")));
    }
    if let Some(path) = &arguments.metrics {
        look("--metrics", Report::check(path).with_context(|| format!("{path:?}")));
    }
    for problem in &found {
        eprintln!("coracle-vmm: {problem}");
    }
    u8::from(!found.is_empty())
}

/// `error` with its causes, and what to do about some.
fn told(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    // Each library has a type of its own for what the kernel says, and all have its words.
    if text.contains(Errno::EMFILE.desc()) {
        return text + " (raise the limit: --resource-limit no-file=N, or ulimit -n)";
    }
    text
}

/// Serves the control socket until the machine ends or a signal comes.
fn serve(
    machine: &mut Machine,
    mut server: Option<&mut Server>,
    signals: &Signals,
) -> io::Result<Ending> {
    loop {
        if wait(machine, server.as_deref(), signals)? {
            return signals.read().map(Ending::Signal);
        }
        if machine.state() == State::Stopped {
            return Ok(Ending::Itself);
        }
        if let Some(server) = &mut server {
            let mut is_stopped_by_client = false;
            server.serve(|request| {
                let was_stopped = machine.state() == State::Stopped;
                let response = api::answer(machine, request);
                is_stopped_by_client |= !was_stopped && machine.state() == State::Stopped;
                response
            });
            if is_stopped_by_client {
                return Ok(Ending::Client);
            }
        }
    }
}

/// Waits until there is something to do; says whether that is a signal.
fn wait(machine: &Machine, server: Option<&Server>, signals: &Signals) -> io::Result<bool> {
    let mut descriptors = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    let others = machine.ended().into_iter();
    let others = others.chain(server.into_iter().flat_map(Server::descriptors));
    descriptors.extend(others.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN)));
    let is_deaf = server.is_some_and(Server::is_deaf);
    let timeout = if is_deaf { RETRY_MS.into() } else { PollTimeout::NONE };
    loop {
        match poll(&mut descriptors, timeout) {
            Ok(_) => return Ok(descriptors[0].any().unwrap_or(false)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Says how `machine` ended, and lets its devices finish, unless a signal says not to: one of them
/// may wait for whoever reads our output, or for a slow disk.
fn finish(machine: Machine, signals: Signals, ending: Ending) -> Exit {
    let socket = machine.config().vsock.as_ref().and_then(|vsock| vsock.socket.clone());
    let vm = match machine.into_handle() {
        Ok(vm) => vm,
        Err(exit) => return exit,
    };
    if !matches!(ending, Ending::Signal(_)) {
        drop(signals);
        return vm.wait();
    }
    let exit = vm.outcome();
    // Its threads end with the process, which is about to. Nobody else will remove its socket.
    mem::forget(vm);
    if let Some(path) = socket {
        let _ = fs::remove_file(path);
    }
    exit
}

/// Whether the guest makes this process open descriptors: streams, or files.
fn opens_more(config: &VmConfig) -> bool {
    config.vsock.is_some() || !config.shares.is_empty()
}

/// Whether the guest gets what is typed here. A serial port has no input, and then the keys that
/// send signals must go on doing so.
fn takes_keys(console: &ConsoleConfig) -> bool {
    console.output == ConsoleOutput::Stdout && !console.serial
}

fn exit_code(exit: Exit, ending: Ending) -> anyhow::Result<u8> {
    Ok(match (exit, ending) {
        (Exit::PowerOff, _) => 0,
        (Exit::Reset, _) => 3,
        (Exit::TripleFault, _) => 4,
        (Exit::Failed(reason), _) => bail!(reason),
        (Exit::Stopped, Ending::Client) => 5,
        (Exit::Stopped, Ending::Signal(signal)) => {
            128 + u8::try_from(signal).expect("signal numbers are small")
        }
        (Exit::Stopped, Ending::Itself) => unreachable!("only these two stop a machine"),
    })
}
