//! `coracle-vmm`: starts one virtual machine from a configuration file, serves its control socket, and
//! ends as it ends.
#![cfg_attr(not(test), no_main)]

mod api;
mod arguments;
mod asker;
mod fields;
mod http;
mod limits;
mod logger;
mod machine;
mod opener;
mod report;
mod resources;
mod server;
mod signals;
mod terminal;
mod warden;

use std::ffi::c_int;
use std::io::{self, IsTerminal};
use std::mem;
use std::os::fd::AsFd;

use anyhow::{Context, bail};
use clap::Parser;
use log::{LevelFilter, error};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use vmm::{ConsoleConfig, ConsoleOutput, Exit, VmConfig};

use crate::arguments::Arguments;
use crate::machine::{Machine, State};
use crate::report::Report;
use crate::server::Server;
use crate::signals::Signals;
use crate::warden::Warden;

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
    let mut config = arguments.configuration()?;
    if arguments.check {
        return Ok(check(arguments, &config));
    }
    if let Some(path) = &arguments.cgroup {
        limits::join_cgroup(path).with_context(|| format!("--cgroup: move to {path:?}"))?;
    }
    limits::check(&arguments.resource_limits, &config).context("--resource-limit")?;
    limits::set(&arguments.resource_limits).context("set resource limits")?;
    vmm::forbid_core_dumps().context("forbid core dumps")?;
    vmm::leave_namespaces(&config).context("leave the host's IPC and UTS namespaces")?;
    let interactive = takes_keys(&config.console) && io::stdin().is_terminal();
    // Before the first thread starts, so that every thread leaves these signals to this one.
    let signals = Signals::open().context("receive signals")?;
    let server = match &arguments.api_socket {
        Some(path) => {
            let open = Server::open(path).and_then(|server| {
                config.user.map_or(Ok(()), |user| server.give_to(user)).map(|()| server)
            });
            Some(open.with_context(|| format!("--api-socket: listen on {path:?}"))?)
        }
        None => None,
    };
    // Before there is anything of the guest's that it could inherit.
    let (has_socket, may_attach) = (has_socket(&config), config.spare_slots != 0);
    let is_needed = server.is_some() || has_socket;
    let warden = is_needed.then(|| Warden::start(server, may_attach)).transpose();
    let mut warden = warden.context("start the process that keeps the machine's sockets")?;
    if config.user.is_none() && !has_socket {
        // The guest connects to sockets of the host as who started it, as it is up to their modes who may.
        config.user = vmm::user_of_its_own();
    }
    let report = arguments.metrics.as_deref().map(Report::open).transpose()?;
    let needs_few = arguments.resource_limits.is_empty() && !opens_more(&config);
    let mut machine = Machine::build(config, interactive)?;
    report.as_ref().map_or(Ok(()), Report::empty)?;
    if needs_few {
        limits::lower_descriptor_limit(machine.config())
            .context("lower the limit of open files")?;
    }
    if let Some(warden) = &warden {
        warden.set_out(&machine.take_sockets()).context("tell of the machine's sockets")?;
    }
    if !arguments.paused {
        machine.become_state(State::Running)?;
    }
    let ending = serve(&mut machine, &mut warden, &signals).context("wait for the machine")?;
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

/// Does what clients want until the machine ends or a signal comes.
fn serve(
    machine: &mut Machine,
    warden: &mut Option<Warden>,
    signals: &Signals,
) -> io::Result<Ending> {
    loop {
        let [is_signal, is_order] = wait(machine, warden.as_ref(), signals)?;
        if is_signal {
            return signals.read().map(Ending::Signal);
        }
        if machine.state() == State::Stopped {
            return Ok(Ending::Itself);
        }
        let Some(keeper) = warden.as_ref().filter(|_| is_order) else { continue };
        if let Err(error) = obey(machine, keeper) {
            error!("nobody serves the control socket any more, and the guest runs on: {error}");
            *warden = None;
        }
        if machine.state() == State::Stopped {
            return Ok(Ending::Client);
        }
    }
}

/// Does what a client wants.
fn obey(machine: &mut Machine, warden: &Warden) -> io::Result<()> {
    let mut order = warden.receive()?;
    let opened = order.take_opened();
    warden.answer(&api::answer(machine, &order.request, opened))
}

/// Waits until there is something to do; says whether there is a signal, and whether an order.
fn wait(machine: &Machine, warden: Option<&Warden>, signals: &Signals) -> io::Result<[bool; 2]> {
    let mut descriptors = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    let orders = warden.map(AsFd::as_fd);
    let others = orders.into_iter().chain(machine.ended());
    descriptors.extend(others.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN)));
    poll(&mut descriptors, PollTimeout::NONE)?;
    let is_ready = |descriptor: &PollFd<'_>| descriptor.any().unwrap_or(false);
    Ok([is_ready(&descriptors[0]), orders.is_some() && is_ready(&descriptors[1])])
}

/// Waits for one of `descriptors`, at most for `timeout`.
fn poll(descriptors: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<()> {
    loop {
        match nix::poll::poll(descriptors, timeout) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Says how `machine` ended, and lets its devices finish, unless a signal says not to: one of them
/// may wait for whoever reads our output, or for a slow disk.
fn finish(machine: Machine, signals: Signals, ending: Ending) -> Exit {
    let vm = match machine.into_handle() {
        Ok(vm) => vm,
        Err(exit) => return exit,
    };
    if !matches!(ending, Ending::Signal(_)) {
        drop(signals);
        return vm.wait();
    }
    let exit = vm.outcome();
    // Its threads end with the process, which is about to.
    mem::forget(vm);
    exit
}

/// Whether the machine makes a socket in the host's file system.
fn has_socket(config: &VmConfig) -> bool {
    config.vsock.as_ref().is_some_and(|vsock| vsock.socket.is_some())
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
