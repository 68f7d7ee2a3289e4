//! Guest boot to agent ready, beside `qemu-system-x86_64 -M microvm` with Debian's kernel to init.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use agent_protocol::{CONTROL_PORT, Event, Message, frame};
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use vmm::vsock::HostStream;
use vmm::{BalloonConfig, Metrics, ShareConfig, VmConfig, VmHandle, Vmm, VsockConfig};

use crate::Options;
use crate::memory::OwnMemory;
use crate::report::Report;

/// Highest number of exits to user space we are content with until the agent is ready.
const GOAL_EXITS: f64 = 400.0;
/// Highest ratio of our boot with the tuned kernel to QEMU's with Debian's.
const GOAL_BOOT_RATIO: f64 = 0.4;
/// What the peer's init says.
const MARKER: &str = "init-is-here";

/// How long a guest may take, in milliseconds: Debian's kernel needs 3 s of emulated time.
const BOOT_TIMEOUT_MS: u16 = 60_000;

/// What one boot cost.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boot {
    /// Exits of all vCPUs to user space until ready.
    pub exits: u64,
    /// The host process's own memory, with the guest idle.
    pub memory: OwnMemory,
}

/// Boots the image in `image` in this process until its agent is ready and prints a [`Boot`];
/// `verbose` says where the exits come from.
pub fn guest(image: &Path, verbose: bool) -> Result<()> {
    vmm::use_one_heap();
    let mut config = VmConfig::new(image.join("kernel"));
    config.boot.initrd = Some(image.join("initrd"));
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
    // The line is the moment the parent's clock stops; what follows is not part of the boot.
    println!("ready");
    let Metrics { exits, .. } = vm.metrics();
    let boot = Boot { exits: exits.total(), memory: OwnMemory::of(std::process::id())? };
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
    let (runs, verbose) = (*runs, *verbose);
    warm(distro)?;
    warm(tuned)?;
    let marker = marker_initrd()?;
    let mut best = [f64::INFINITY; 3];
    let mut exits = [0; 2];
    // The first round is not counted: the peer's binary and libraries come from the lab's slow
    // shared file system, and it waits for them for longer than it then runs.
    for run in 0..=runs {
        eprintln!("boot: run {run} of {runs}");
        // Alternating, so that whatever drifts does so for all.
        let qemu = qemu_to_init(&distro.join("kernel"), marker.path())?;
        let (with_tuned, tuned_boot) = to_ready(tuned, verbose)?;
        let (with_distro, distro_boot) = to_ready(distro, verbose)?;
        if run > 0 {
            for (best, value) in best.iter_mut().zip([qemu, with_tuned, with_distro]) {
                *best = best.min(value);
            }
        }
        exits = [tuned_boot.exits, distro_boot.exits];
    }
    let [qemu, with_tuned, with_distro] = best;
    let peer = ("qemu microvm, distro kernel to init", qemu);
    report.beside("boot to agent, tuned kernel", ("ms", with_tuned), peer, Some(GOAL_BOOT_RATIO));
    report.beside("boot to agent, distro kernel", ("ms", with_distro), peer, None);
    let [tuned_exits, distro_exits] = exits.map(|exits| exits as f64);
    report.alone("exits to agent, tuned kernel", "exits", tuned_exits, Some(GOAL_EXITS));
    report.alone("exits to agent, distro kernel", "exits", distro_exits, None);
    Ok(())
}

/// Starts `coracle-perf guest` and gives the milliseconds until its agent was ready.
pub fn to_ready(image: &Path, verbose: bool) -> Result<(f64, Boot)> {
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
    let boot = serde_json::from_str(&lines.next().context("no figures")??)?;
    child.wait()?;
    Ok((ready_ms, boot))
}

fn qemu_to_init(kernel: &Path, initrd: &Path) -> Result<f64> {
    let mut command = Command::new("qemu-system-x86_64");
    // With a clock, although KVM guests get none by default: Debian's kernel waits 1.2 s for it.
    command
        .args(["-M", "microvm,accel=kvm,rtc=on", "-cpu", "host", "-m", "256", "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1 reboot=t"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().context("start qemu-system-x86_64")?;
    let lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
    for line in lines {
        if line?.contains(MARKER) {
            let ready_ms = started.elapsed().as_secs_f64() * 1e3;
            child.kill()?;
            child.wait()?;
            return Ok(ready_ms);
        }
    }
    bail!("QEMU's guest did not reach init: {}", child.wait()?)
}

/// An initrd whose init says [`MARKER`] and nothing else.
fn marker_initrd() -> Result<tempfile::NamedTempFile> {
    let tree = tempfile::tempdir()?;
    for directory in ["bin", "dev"] {
        fs::create_dir(tree.path().join(directory))?;
    }
    fs::copy("/bin/busybox", tree.path().join("bin/busybox"))
        .context("/bin/busybox of busybox-static is the peer's init")?;
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs dev /dev\n\
         echo {MARKER} > /dev/console\nexec /bin/busybox sleep 1000\n"
    );
    fs::write(tree.path().join("init"), init)?;
    let script = "chmod 755 init && find . | cpio -o -H newc --quiet";
    let packed = Command::new("sh").args(["-c", script]).current_dir(tree.path()).output()?;
    if !packed.status.success() {
        bail!("cpio failed: {}", String::from_utf8_lossy(&packed.stderr));
    }
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(&packed.stdout)?;
    Ok(file)
}

/// Reads an image once, so that no run pays for a cold page cache.
fn warm(image: &Path) -> Result<()> {
    for name in ["kernel", "initrd"] {
        let path = image.join(name);
        fs::read(&path).with_context(|| {
            format!("read {}: build both guest images with `make guest-images`", path.display())
        })?;
    }
    Ok(())
}
