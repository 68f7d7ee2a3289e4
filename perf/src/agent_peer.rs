//! The same kernel and agent until that is ready in QEMU's machine, which has the agent from an initrd as it
//! cannot map a root, and a socket device that the host's kernel serves.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use agent_protocol::{CONTROL_PORT, Event, Message, frame};
use anyhow::{Context, Result, bail};
use arch::peer::QEMU;
use arch::{Arch, Host};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen, socket,
};

use crate::Options;
use crate::boot::{BOOT_TIMEOUT_MS, add_exits, to_ready, watched};
use crate::guest::Running;
use crate::peer::Peer;
use crate::report::Report;
use crate::samples::Samples;

/// What the host's kernel offers to a process that serves a guest's sockets.
const VHOST: &str = "/dev/vhost-vsock";
/// Highest ratio of our boot to the agent to QEMU's, and of our exits to user space until then to QEMU's.
const GOAL: f64 = 1.0;

/// Measures and adds the rows, if QEMU is among the peers.
pub fn measure(report: &mut Report, options: &Options, image: &Path) -> Result<()> {
    let Some(qemu) = &options.qemu() else { return Ok(()) };
    if !Path::new(VHOST).exists() {
        // No program that the lab starts loads it.
        Command::new("modprobe").arg("vhost_vsock").status().context("run modprobe")?;
    }
    let ours_to_ready = || Ok(to_ready(image, options.verbose, || Ok(()))?.0);
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    // The first round warms caches; then alternating, so that whatever drifts does so for both.
    for run in 0..=options.runs {
        let pair = (ours_to_ready()?, to_agent(qemu, image)?);
        eprintln!(
            "boot to agent: run {run} of {}: {:.1} ms, {qemu} {:.1} ms",
            options.runs, pair.0, pair.1
        );
        if run > 0 {
            ours.add(pair.0);
            theirs.add(pair.1);
        }
    }
    let name = qemu.to_string();
    report.pairs(
        "boot to agent, tuned kernel in both",
        ("ms", &ours),
        (&name, &theirs),
        Some(GOAL),
    );
    if report.counts_instructions() {
        let (ours, theirs) = (watched(ours_to_ready)?, watched(|| to_agent(qemu, image))?);
        add_exits(report, "tuned kernel to agent", &ours, (&name, &theirs), Some(GOAL));
    }
    Ok(())
}

/// Milliseconds from the start of `peer` until the agent in its guest says that it is ready.
fn to_agent(peer: &Peer, image: &Path) -> Result<f64> {
    let listener = listener()?;
    let started = Instant::now();
    let child = Command::new(peer.program())
        .args(arguments(image))
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("start {peer}"))?;
    let _machine = Running { child };
    let mut sources = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    if poll(&mut sources, BOOT_TIMEOUT_MS)? == 0 {
        bail!("the agent of {peer}'s guest does not connect");
    }
    let agent = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just made it, and nothing else knows of it.
    let agent = unsafe { OwnedFd::from_raw_fd(agent) };
    match frame::read(&mut &fs::File::from(agent))? {
        Some(Message::Event(Event::Ready { .. })) => Ok(started.elapsed().as_secs_f64() * 1e3),
        other => bail!("the agent of {peer}'s guest sent {other:?}"),
    }
}

/// Where agents connect to.
fn listener() -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context("vsock")?;
    bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, CONTROL_PORT))?;
    listen(&socket, Backlog::new(1)?)?;
    Ok(socket)
}

/// The devices that our machine has, but for the share, which would take a daemon, and the console.
fn arguments(image: &Path) -> Vec<String> {
    let file = |name| image.join(name).display().to_string();
    let machine = format!("{},acpi=off", QEMU.machine);
    let cmdline = format!("{} quiet", Host::DEFAULT_CMDLINE);
    let (kernel, initrd) = (file("kernel"), file("initrd"));
    [
        ["-M", &machine],
        ["-cpu", "host"],
        ["-smp", "1"],
        ["-m", "256"],
        ["-display", "none"],
        ["-serial", "null"],
        // Not the registers from before virtio 1.0, which are its default.
        ["-global", "virtio-mmio.force-legacy=false"],
        ["-device", "vhost-vsock-device,guest-cid=3"],
        ["-device", "virtio-balloon-device,free-page-reporting=on"],
        ["-device", "virtio-rng-device"],
        ["-append", &cmdline],
        ["-kernel", &kernel],
        ["-initrd", &initrd],
    ]
    .into_iter()
    .flatten()
    .chain(["-nodefaults", "-no-user-config", "-no-reboot"])
    .map(str::to_owned)
    .collect()
}
