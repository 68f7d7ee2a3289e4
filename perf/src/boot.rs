//! Guest boot to agent ready, and with Debian's kernel to init, beside other VMMs with that.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use agent_protocol::{CONTROL_PORT, Event, Message, frame};
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use stats_alloc::Region;
use vmm::vsock::HostStream;
use vmm::{BalloonConfig, Metrics, ShareConfig, VmConfig, VmHandle, Vmm, VsockConfig};

use crate::agent_peer;
use crate::guest_time::{Guests, Watch};
use crate::memory::OwnMemory;
use crate::peer::{Kind, Peer};
use crate::report::Report;
use crate::samples::Samples;
use crate::vmm_peer;
use crate::{ALLOCATOR, Options};

/// Most instructions of host and guest until the agent is ready, in millions.
const GOAL_INSTRUCTIONS_M: f64 = 350.0;
/// Most instructions outside the guest until Debian's kernel has started init, in millions.
const GOAL_OUTSIDE_M: f64 = 60.0;
/// Highest ratio of our boot with the tuned kernel to QEMU's with Debian's.
const GOAL_BOOT_RATIO: f64 = 0.4;
/// How long a guest may take, in milliseconds: Debian's kernel needs 3 s of emulated time.
pub const BOOT_TIMEOUT_MS: u16 = 60_000;

/// What one boot cost.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boot {
    /// Exits of all vCPUs to user space until ready.
    pub exits: u64,
    /// How often the host process's Rust code took memory from its heap, or made a piece of it larger, until
    /// ready.
    pub allocations: usize,
    /// The host process's own memory, with the guest idle.
    pub memory: OwnMemory,
}

/// Boots the image in `image` in this process until its agent is ready and prints a [`Boot`];
/// `verbose` says where the exits come from.
pub fn guest(image: &Path, verbose: bool) -> Result<()> {
    vmm::use_one_heap();
    let heap = Region::new(ALLOCATOR);
    let mut config = VmConfig::new(image.join("kernel"));
    config.map_root(image.join("rootfs.erofs"));
    config.memory.size_mib = 256;
    config.vsock = Some(VsockConfig { cid: 3, socket: None });
    config.balloon = Some(BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() });
    let share = tempfile::tempdir()?;
    config.shares = vec![ShareConfig::new("coracle", share.path().into())];
    let vm = Vmm::new(config)?;
    let (ours, guests) = UnixStream::pair()?;
    guests.set_nonblocking(true)?;
    let stream = HostStream {
        input: Some(OwnedFd::from(guests.try_clone()?)),
        output: Some(guests.into()),
        on_close: None,
    };
    vm.vsock().context("the configuration has a vsock device")?.listen(CONTROL_PORT, stream)?;
    let vm = vm.start()?;

    if let Err(error) = await_ready(&vm, &ours) {
        vm.stop();
        return Err(error.context(format!("the guest's end: {:?}", vm.wait())));
    }
    let taken = heap.change();
    let allocations = taken.allocations + taken.reallocations;
    // The line is the moment the parent's clock stops; what follows is not part of the boot.
    println!("ready");
    let Metrics { exits, .. } = vm.metrics();
    let boot =
        Boot { exits: exits.total(), allocations, memory: OwnMemory::of(std::process::id())? };
    println!("{}", serde_json::to_string(&boot)?);
    if verbose {
        for (address, count) in &exits.by_address {
            eprintln!("{count:>6} exits at {address}");
        }
    }
    vm.stop();
    vm.wait();
    Ok(())
}

/// Waits for the agent's first word, or for the end of a guest that never said it.
fn await_ready(vm: &VmHandle, agent: &UnixStream) -> Result<()> {
    let mut sources =
        [PollFd::new(agent.as_fd(), PollFlags::POLLIN), PollFd::new(vm.ended(), PollFlags::POLLIN)];
    poll(&mut sources, BOOT_TIMEOUT_MS)?;
    if sources[0].any() != Some(true) {
        let state = if sources[1].any() == Some(true) { "ended" } else { "is still not ready" };
        bail!("the guest {state}; it said: {}", vm.console_tail());
    }
    match frame::read(&mut &*agent)? {
        Some(Message::Event(Event::Ready { .. })) => Ok(()),
        other => bail!("the agent sent {other:?}; the guest said: {}", vm.console_tail()),
    }
}

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let Options { distro, tuned, runs, verbose, .. } = options;
    warm(distro, &["kernel"])?;
    let tuned = Some(tuned).filter(|tuned| tuned.exists());
    match tuned {
        // Ours maps its root, a peer's has it unpacked.
        Some(tuned) => warm(tuned, &["kernel", "rootfs.erofs", "initrd"])?,
        // It takes minutes to compile one.
        None => eprintln!("boot: there is no image of the tuned kernel, so no boot to the agent"),
    }
    let peers: Vec<_> = options.peers().into_iter().filter(Peer::is_vmm).collect();
    let (kernel, initrd) = (distro.join("kernel"), vmm_peer::marker_initrd()?);
    let ours_to_init = || vmm_peer::ours_to_init(&kernel, initrd.path());
    let to_init = |peer: &Peer| vmm_peer::to_init(peer, &kernel, initrd.path());
    let (mut with_tuned, mut with_distro) = (Samples::default(), Samples::default());
    let mut theirs = vec![Samples::default(); peers.len()];
    // The first round is not counted: the peer's binary and libraries come from the lab's slow
    // shared file system, and it waits for them for longer than it then runs.
    for run in 0..=*runs {
        // Alternating, so that whatever drifts does so for all.
        let ready = tuned.map(|tuned| to_ready(tuned, *verbose, || Ok(()))).transpose()?;
        let ready = ready.map(|(ready, ..)| ready);
        let init = ours_to_init()?;
        let ready_text =
            ready.map(|ready| format!("{ready:.1} ms to the agent, ")).unwrap_or_default();
        eprintln!("boot: run {run} of {runs}: {ready_text}{init:.1} ms to init");
        let peers = peers.iter().map(&to_init).collect::<Result<Vec<_>>>()?;
        if run > 0 {
            ready.into_iter().for_each(|value| with_tuned.add(value));
            with_distro.add(init);
            theirs.iter_mut().zip(peers).for_each(|(samples, value)| samples.add(value));
        }
    }
    for (peer, theirs) in peers.iter().zip(&theirs) {
        let goal = (peer.kind == Kind::Qemu).then_some(GOAL_BOOT_RATIO);
        let name = format!("{peer}, distro kernel to init");
        report.pairs("boot to agent, tuned kernel", ("ms", &with_tuned), (&name, theirs), goal);
        let name = peer.to_string();
        report.pairs("boot to init, distro kernel", ("ms", &with_distro), (&name, theirs), None);
    }
    if report.counts_instructions() {
        let what = "instructions to agent, tuned kernel";
        report.samples(what, ("M", &with_tuned), Some(GOAL_INSTRUCTIONS_M));
        add_watched(report, (&with_distro, ours_to_init), (&peers, &theirs, to_init))?;
    }
    tuned.map_or(Ok(()), |tuned| agent_peer::measure(report, options, tuned))
}

/// Adds what the host's KVM notes of one more boot of ours and of each peer, beside the samples of those
/// that it noted nothing of.
fn add_watched(
    report: &mut Report,
    (our_samples, ours_to_init): (&Samples, impl FnOnce() -> Result<f64>),
    (peers, peer_samples, to_init): (&[Peer], &[Samples], impl Fn(&Peer) -> Result<f64>),
) -> Result<()> {
    let ours = watched(ours_to_init)?;
    let ours_outside = outside(our_samples, &ours);
    let what = "instructions outside the guest, distro kernel to init";
    report.alone(what, "M", ours_outside, Some(GOAL_OUTSIDE_M));
    for (peer, samples) in peers.iter().zip(peer_samples) {
        let name = peer.to_string();
        let theirs = watched(|| to_init(peer))?;
        let what = "instructions outside the guest beside a peer's";
        report.beside(what, ("M", ours_outside), (&name, outside(samples, &theirs)), None);
        add_exits(report, "distro kernel to init", &ours, (&name, &theirs), None);
    }
    Ok(())
}

/// Adds how often our guest was left in a boot of this kind, beside that of the peer of this name. The goal is
/// for exits to user space: others are also what small pages cost, which save memory.
pub fn add_exits(
    report: &mut Report,
    boot: &str,
    ours: &Guests,
    (peer, theirs): (&str, &Guests),
    goal: Option<f64>,
) {
    let all = [ours, theirs].map(Guests::all_exits);
    let to_user = [ours, theirs].map(|guests| guests.exits_to_user);
    for (which, exits, goal) in [("of the guest", all, None), ("to user space", to_user, goal)] {
        let [ours, theirs] = exits.map(f64::from);
        let what = format!("exits {which}, {boot}");
        report.beside(&what, ("exits", ours), (peer, theirs), goal);
    }
}

/// What guests do in one more `boot`.
pub fn watched(boot: impl FnOnce() -> Result<f64>) -> Result<Guests> {
    let watch = Watch::start()?;
    boot()?;
    watch.stop()
}

/// How many milliseconds of the boots in `samples` went by outside the guest, which ran as `guests` says.
/// To note that costs time, so it is not done in those; half of what it costs, less than a hundredth of
/// this, is taken for the guest's.
fn outside(samples: &Samples, guests: &Guests) -> f64 {
    samples.spread().map_or(0.0, |all| all.median - guests.ms)
}

/// Starts `coracle-perf guest` and gives the milliseconds until its agent was ready, and what `at_ready`
/// gives then.
pub fn to_ready<T>(
    image: &Path,
    verbose: bool,
    at_ready: impl FnOnce() -> Result<T>,
) -> Result<(f64, Boot, T)> {
    let program = std::env::current_exe()?;
    let mut command = Command::new(program);
    command.arg("guest").arg("--tuned").arg(image);
    if verbose {
        command.arg("--verbose");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().context("start a guest")?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
    let first = lines.next().context("the guest's process ended without a word")??;
    let ready_ms = started.elapsed().as_secs_f64() * 1e3;
    if first != "ready" {
        bail!("the guest's process said {first:?}");
    }
    let then = at_ready()?;
    let boot = serde_json::from_str(&lines.next().context("no figures")??)?;
    child.wait()?;
    Ok((ready_ms, boot, then))
}

/// Reads the files of an image once, so that no run pays for a cold page cache.
fn warm(image: &Path, files: &[&str]) -> Result<()> {
    for name in files {
        let path = image.join(name);
        fs::read(&path).with_context(|| {
            format!("read {}: build both guest images with `make guest-images`", path.display())
        })?;
    }
    Ok(())
}
