//! The process that holds one virtual machine: `create`, seen from inside.
//!
//! What it makes dies with it, but for the cgroup and the state folder: those are taken back if
//! `create` fails or if its caller dies before it has heard of the success.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;

use agent_protocol::{CONTROL_PORT, Container, INIT_PROCESS, Request, Sandbox};
use oci_spec::runtime::{Hook, Hooks, LinuxResources};
use serde::{Deserialize, Serialize};
use vmm::vsock::HostStream;
use vmm::{VmConfig, VmHandle, Vmm};

use super::agent::{Agent, Asker};
use super::boot::{self, Boot};
use super::cgroup::{self, Cgroup};
use super::folder::{self, Later};
use super::launch::{self, Starter};
use super::machine::{self, Room, Size};
use super::namespaces::{self, HostNamespaces, Netns};
use super::network::{self, Network};
use super::rewire::Wiring;
use super::serve::{Parts, Serving};
use super::share::{self, ShareTree};
use super::signals::Signals;
use super::stdio::{self, Stdio};
use super::streams::{Outputs, Owner, Running};
use super::template::{self, Template};
use super::{CreateOptions, control, disks, hooks, view};
use crate::bundle::{self, Bundle};
use crate::limits;
use crate::logging::{self, chain};
use crate::phases::Phases;
use crate::settings::{self, Settings};
use crate::state::{self, ContainerDir, ContainerId, State, StateRoot, Status};
use crate::translate;

/// More descriptors than a sandbox process has before its container runs: sixty, and some for each network
/// and disk.
const MOST_DESCRIPTORS: RawFd = 256;

/// What the caller of `create` sends to the process it starts.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// `--root`, absolute.
    pub(super) root: PathBuf,
    /// Container id.
    pub(super) id: String,
    /// Folder of the bundle, absolute.
    pub(super) bundle: PathBuf,
    /// The rest, with absolute paths.
    pub(super) options: CreateOptions,
}

/// Which step of `create` failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Log(#[from] logging::Error),
    #[error(transparent)]
    State(#[from] state::Error),
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(transparent)]
    Settings(#[from] settings::Error),
    #[error(transparent)]
    Translate(#[from] translate::Error),
    #[error("take over stdio")]
    Stdio(#[from] stdio::Error),
    #[error("collect signals")]
    Signals(#[source] nix::errno::Errno),
    #[error(transparent)]
    Namespaces(#[from] namespaces::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error("set up the container's network")]
    Network(#[from] network::Error),
    #[error(transparent)]
    Share(#[from] share::Error),
    #[error(transparent)]
    View(#[from] view::Error),
    #[error(transparent)]
    Disk(#[from] disks::Error),
    #[error("set up the virtual machine (`coracle check` says what is missing and what to do)")]
    Vm(#[from] vmm::Error),
    #[error("forbid core dumps")]
    CoreDumps(#[source] io::Error),
    #[error("make the connection to the guest")]
    Connect(#[source] io::Error),
    #[error("read random bytes for the guest from /dev/urandom")]
    Random(#[source] io::Error),
    #[error("connect stdio with the guest")]
    Streams(#[source] io::Error),
    #[error(transparent)]
    Boot(#[from] boot::Error),
    #[error("listen in the state folder: is there room on its file system?")]
    Listen(#[source] io::Error),
    #[error("keep the phases of the start in the state folder: is there room on its file system?")]
    Phases(#[source] io::Error),
    #[error("keep hooks in the state folder: is there room on its file system?")]
    KeepHooks(#[source] io::Error),
}

/// A machine that runs, and the way to the agent in it.
struct Machine {
    vm: VmHandle,
    agent: Agent<Asker>,
    origin: Origin,
}

/// Where a guest comes from.
enum Origin {
    /// It boots, and may become this template.
    Boot(Option<Template>),
    /// It goes on from this template.
    Template(Template),
}

/// What outlives this process unless it is taken back.
#[derive(Default)]
struct Outliving {
    cgroup: Option<Cgroup>,
    network: Network,
    hooks: Option<Poststop>,
}

/// Hooks that undo what those of `create` did, once one of these may have run.
struct Poststop {
    hooks: Vec<Hook>,
    state: State,
    host: Rc<HostNamespaces>,
}

impl Outliving {
    /// Reads the network that the sandbox will be connected to.
    fn wire(&mut self, bundle: &Bundle) -> Result<Wiring, network::Error> {
        let wiring = Wiring::read(bundle)?;
        self.network = wiring.network.clone();
        Ok(wiring)
    }

    /// Takes everything back, the state folder last: with it goes the container's name. Then, as
    /// after every other end (runtime.md, Lifecycle), the poststop hooks run.
    fn take_back(self, dir: &ContainerDir) {
        self.network.part();
        if let Some(cgroup) = self.cgroup {
            cgroup.leave();
        }
        folder::remove(dir);
        if let Some(Poststop { hooks, state, host }) = self.hooks {
            hooks::run_poststop(&hooks, &state, Some(&host));
        }
    }
}

/// Body of the hidden verb: `fd` leads to the caller of `create`. Does not return before the
/// container is over; the result is its exit code.
pub(super) fn main(fd: RawFd) -> i32 {
    vmm::use_one_heap();
    make_room_for_descriptors();
    let (starter, order) = match Starter::meet::<Order>(fd) {
        Ok(met) => met,
        Err(error) => {
            eprintln!("this verb is for coracle's own use: {}", chain(&error));
            return 1;
        }
    };
    match open(&order) {
        Ok(dir) => run(starter, &order, &dir),
        Err(error) => {
            starter.failed(chain(&error));
            1
        }
    }
}

/// Makes the table of descriptors as large as it will be, while there is one thread: the kernel waits for
/// a grace period whenever it makes that of several threads larger, which would hold up the start.
fn make_room_for_descriptors() {
    // Where the limit forbids so many, the table grows as it must.
    drop(rustix::io::fcntl_dupfd_cloexec(io::stdin(), MOST_DESCRIPTORS - 1));
}

fn open(order: &Order) -> Result<ContainerDir, Error> {
    order.options.log.install()?;
    Ok(StateRoot::new(&order.root).open(&ContainerId::parse(&order.id)?)?)
}

fn run(mut starter: Starter, order: &Order, dir: &ContainerDir) -> i32 {
    let mut outliving = Outliving::default();
    let parts = match create(order, dir, starter.socket(), &mut outliving) {
        Ok(parts) => parts,
        Err(error) => {
            outliving.take_back(dir);
            starter.failed(chain(&error));
            return 1;
        }
    };
    if starter.ready().is_err() || !starter.committed() {
        drop(parts);
        outliving.take_back(dir);
        return 1;
    }
    vmm::give_back_startup_memory();
    Serving::new(dir, parts).run().into()
}

/// Creates the container, from the top down as it is told in the design.
fn create(
    order: &Order,
    dir: &ContainerDir,
    caller: &UnixStream,
    outliving: &mut Outliving,
) -> Result<Parts, Error> {
    let options = &order.options;
    let mut phases = Phases::of_process(options.started_ns);
    let bundle = Bundle::load(&order.bundle)?;
    let settings = options.settings.clone().with_annotations(&bundle.annotations())?;
    let netns = Netns::of(&bundle.spec)?;
    let mut signals = Signals::collect().map_err(Error::Signals)?;
    let stdio = Stdio::take(bundle.terminal(), options.console_socket.as_deref())?;
    stdio::let_go()?;
    let resources = resources(&bundle);
    let room = Room::of(&settings, &resources, Size::of_host());
    let name = cgroup_name(&bundle, options, &order.id);
    let cgroup = Cgroup::find(name.clone(), &order.id)?;
    phases.end("read the bundle");
    // From here on `delete` finds what a killed process leaves behind.
    let state = creating(&bundle, &order.id, &name, &netns);
    dir.save(&state)?;
    outliving.cgroup = cgroup.enter(&machine::host_resources(&resources, room.size))?;
    set_oom_score(&bundle);
    phases.end("enter the cgroup");
    let host = Rc::new(HostNamespaces::leave(&netns)?);
    phases.end("enter the namespaces");
    outliving.hooks = Some(keep_hooks(&bundle, dir, &state, &host)?);
    run_hooks(&bundle, &state, &host)?;
    phases.end("run the hooks");
    let wiring = outliving.wire(&bundle)?;
    let network = &wiring.network;
    let (mut container, tree) = share(&bundle, dir, &state, &stdio)?;
    phases.end("share the files");
    let mut config = machine::config(&settings, &room, tree.path(), network.devices(), dir.path());
    config.disks = disks::of(&mut container.devices, &resources)?;
    config.shares.iter_mut().for_each(|share| share.telling = tree.telling());
    let Machine { vm, mut agent, origin } = start_machine(&settings, config, network, &mut phases)?;
    let timeout_s = settings.boot_timeout_s;
    let mut boot = Boot { vm: &vm, agent: &mut agent, caller, signals: &mut signals, timeout_s };
    wait_ready(&mut boot, &origin, &mut phases)?;
    let guest = guest(&bundle, &room, network, &origin)?;
    boot.ask("set up the guest", &Request::ConfigureSandbox(guest))?;
    let (init, console) = connect_stdio(&vm, &order.id, stdio)?;
    boot.ask("create the container in the guest", &Request::CreateContainer(container))?;
    let parts = Parts {
        vm,
        room,
        agent,
        listener: control::listen(dir).map_err(Error::Listen)?,
        signals,
        console,
        init,
        state,
        wiring,
        phases,
    };
    keep_created(parts, &tree, dir)
}

/// Shows the files of the container, which is created, and notes that and what it took.
fn keep_created(mut parts: Parts, tree: &ShareTree, dir: &ContainerDir) -> Result<Parts, Error> {
    view::show(tree)?;
    parts.state.status = Status::Created;
    dir.save(&parts.state)?;
    parts.phases.end("create the container");
    parts.phases.save(dir).map_err(Error::Phases)?;
    Ok(parts)
}

/// Waits until the guest of a machine is ready, and makes a template of the machine if there is none.
fn wait_ready(boot: &mut Boot<'_>, origin: &Origin, phases: &mut Phases) -> Result<(), Error> {
    match origin {
        Origin::Boot(template) => {
            log::info!("guest is up: {}", boot.ready(phases)?);
            if let Some(template) = template {
                template.keep(boot.vm, |order| launch::have_written(boot.caller, order));
                phases.end("keep the template");
            }
        }
        Origin::Template(template) => {
            let woken = boot.woken(phases).inspect_err(|error| {
                // Whoever interrupts says nothing about the guest.
                if !matches!(error, boot::Error::Interrupted { .. }) {
                    template.discard("its guest did not wake up");
                }
            });
            log::info!("guest is up: {}", woken?);
        }
    }
    Ok(())
}

/// What the agent is told about its guest.
fn guest(
    bundle: &Bundle,
    room: &Room,
    network: &Network,
    origin: &Origin,
) -> Result<Sandbox, Error> {
    let resumed = matches!(origin, Origin::Template(_));
    Ok(Sandbox {
        hostname: bundle.spec.hostname().clone(),
        share: true,
        grows: room.grows,
        network: network.guest.clone(),
        resumed: resumed.then(template::awakening).transpose().map_err(Error::Random)?,
    })
}

/// What the agent is told of the container, and the tree of files that it shares with the host.
fn share(
    bundle: &Bundle,
    dir: &ContainerDir,
    state: &State,
    stdio: &Stdio,
) -> Result<(Box<Container>, ShareTree), Error> {
    let mut tree = ShareTree::new(&folder::share(dir), &bundle.rootfs)?;
    let container = container(bundle, dir, state, stdio, &mut tree)?;
    tree.seal()?;
    Ok((container, tree))
}

/// Starts the guest, whose memory nobody shall find in a core dump. The hooks of `create` inherited
/// their limits before.
fn start_machine(
    settings: &Settings,
    config: VmConfig,
    network: &Network,
    phases: &mut Phases,
) -> Result<Machine, Error> {
    let template = Template::of(settings, &config);
    let restored = template.as_ref().and_then(|template| template.restore(&config));
    let (vm, origin) = match (restored, template) {
        (Some(vm), Some(template)) => (vm, Origin::Template(template)),
        (_, template) => (Vmm::new(config)?, Origin::Boot(template)),
    };
    network.join()?;
    let (vm, agent) = listen(vm).map_err(Error::Connect)?;
    vmm::forbid_core_dumps().map_err(Error::CoreDumps)?;
    let vm = vm.start()?;
    end_machine(phases, &vm, &origin);
    Ok(Machine { vm, agent, origin })
}

/// Ends the phases of a machine up to the first instruction of its guest.
fn end_machine(phases: &mut Phases, vm: &VmHandle, origin: &Origin) {
    let metrics = vm.metrics();
    let (first, last) = match origin {
        Origin::Template(_) => ("create the machine", "restore the machine"),
        Origin::Boot(_) => ("create the machine and load the kernel", "create the processors"),
    };
    phases.end_at(first, metrics.machine_ns);
    phases.end_at("create the devices", metrics.devices_ns);
    phases.end_at(last, metrics.built_ns);
    phases.end("start the threads");
}

fn resources(bundle: &Bundle) -> LinuxResources {
    let linux = bundle.spec.linux().as_ref();
    linux.and_then(|linux| linux.resources().clone()).unwrap_or_default()
}

fn cgroup_name(bundle: &Bundle, options: &CreateOptions, id: &str) -> cgroup::Name {
    let linux = bundle.spec.linux().as_ref();
    let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
    cgroup::Name::of(path, options.systemd_cgroup, id)
}

/// When the host runs out of memory, this process is what the engine said about the container's.
fn set_oom_score(bundle: &Bundle) {
    let process = bundle.spec.process().as_ref();
    if let Some(score) = process.and_then(|process| process.oom_score_adj()) {
        if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
            log::warn!("set oom_score_adj to {score}: {error}");
        }
    }
}

fn creating(bundle: &Bundle, id: &str, cgroup: &cgroup::Name, netns: &Netns) -> State {
    let pid = nix::unistd::getpid().as_raw();
    State {
        oci_version: bundle.spec.version().clone(),
        id: id.into(),
        pid: Some(pid),
        pid_start_time: state::process_start_time(pid).unwrap_or_default(),
        status: Status::Creating,
        bundle: bundle.path.clone(),
        rootfs: bundle.rootfs.clone(),
        created: state::timestamp(),
        owner: String::new(),
        annotations: bundle.annotations(),
        cgroup_path: Some(cgroup.path.clone()),
        systemd_cgroup: cgroup.systemd,
        netns: netns.path().map(Into::into),
    }
}

fn hook_list(bundle: &Bundle, which: impl Fn(&Hooks) -> &Option<Vec<Hook>>) -> Vec<Hook> {
    bundle.spec.hooks().as_ref().and_then(|hooks| which(hooks).clone()).unwrap_or_default()
}

/// Keeps hooks in the state folder for `start` and `delete`, and those of `delete` here for a `create` that
/// fails.
fn keep_hooks(
    bundle: &Bundle,
    dir: &ContainerDir,
    state: &State,
    host: &Rc<HostNamespaces>,
) -> Result<Poststop, Error> {
    let poststart = hook_list(bundle, Hooks::poststart);
    folder::keep_hooks(dir, Later::Poststart, &poststart).map_err(Error::KeepHooks)?;
    let hooks = hook_list(bundle, Hooks::poststop);
    folder::keep_hooks(dir, Later::Poststop, &hooks).map_err(Error::KeepHooks)?;
    Ok(Poststop { hooks, state: state.clone(), host: Rc::clone(host) })
}

/// Runs the hooks of `create` (config.md, POSIX-platform Hooks): the first two kinds on the host,
/// the third where the container's side of the host is.
fn run_hooks(bundle: &Bundle, state: &State, host: &HostNamespaces) -> Result<(), Error> {
    // Deprecated, and what Docker sets up its networks with.
    let prestart = hook_list(bundle, Hooks::prestart);
    hooks::run("prestart", &prestart, state, Some(host))?;
    let create_runtime = hook_list(bundle, Hooks::create_runtime);
    hooks::run("createRuntime", &create_runtime, state, Some(host))?;
    let create_container = hook_list(bundle, Hooks::create_container);
    hooks::run("createContainer", &create_container, state, None)?;
    Ok(())
}

/// What the agent is told, with every bind mount's source put in the tree.
fn container(
    bundle: &Bundle,
    dir: &ContainerDir,
    state: &State,
    stdio: &Stdio,
    tree: &mut ShareTree,
) -> Result<Box<Container>, Error> {
    let created = State { status: Status::Created, ..state.clone() }.to_oci_json();
    let mut add = |bind: &translate::Bind<'_>| tree.add(bind).map_err(Into::into);
    let mut container =
        translate::container(dir.id(), bundle, ShareTree::rootfs(), created, &mut add)?;
    let process = &mut container.process;
    limits::inherit(process);
    process.stdio = stdio.streams();
    if process.terminal.is_some() {
        process.terminal = stdio.window_size().or(process.terminal);
    }
    Ok(Box::new(container))
}

/// Waits for the agent of a guest that is yet to be started: it connects to what this returns.
pub(super) fn listen(vm: Vmm) -> io::Result<(Vmm, Agent<Asker>)> {
    let (ours, theirs) = UnixStream::pair()?;
    theirs.set_nonblocking(true)?;
    let input = Some(theirs.try_clone()?.into());
    let stream = HostStream { input, output: Some(theirs.into()), on_close: None };
    let host = vm.vsock().ok_or(io::ErrorKind::NotConnected)?;
    host.listen(CONTROL_PORT, stream)?;
    Ok((vm, Agent::new(ours)?))
}

fn connect_stdio(
    vm: &VmHandle,
    id: &str,
    stdio: Stdio,
) -> Result<(Running, Option<super::console::Console>), Error> {
    let connected = || {
        let host = vm.vsock().ok_or(io::ErrorKind::NotConnected)?;
        let owner = Owner { container: id, process: INIT_PROCESS };
        match stdio {
            Stdio::Terminal(console) => {
                let outputs = Outputs::connect_terminal(host, owner, console.ends()?)?;
                Ok((Running::new(outputs, None), Some(console)))
            }
            Stdio::Streams(streams) => {
                let outputs = Outputs::connect_streams(host, owner, streams)?;
                Ok((Running::new(outputs, None), None))
            }
        }
    };
    connected().map_err(Error::Streams)
}
