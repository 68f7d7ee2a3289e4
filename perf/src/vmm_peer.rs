//! VMMs side by side: each boots Debian's kernel with an initrd whose init says one line on the console.

use std::env;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use arch::peer::QEMU;
use arch::{Arch, Host};
use serde_json::json;
use tempfile::NamedTempFile;

use crate::guest::pack;
use crate::peer::{Kind, Peer};

/// What the peer's init says.
const MARKER: &str = "init-is-here";

/// What every kernel is told beside what `coracle-vmm` tells its own.
const WORDS: &str = "quiet reboot=t";

/// Guest memory, in MiB.
const MEMORY_MIB: u32 = 256;

/// Milliseconds from the start of `peer` to the line of its init.
pub fn to_init(peer: &Peer, kernel: &Path, initrd: &Path) -> Result<f64> {
    let config = firecracker_config(kernel, initrd)?;
    let mut command = Command::new(peer.program());
    match peer.kind {
        Kind::Qemu => qemu(&mut command, kernel, initrd),
        Kind::Firecracker => {
            command.args(["--no-api", "--config-file"]).arg(config.path());
        }
        Kind::CloudHypervisor => cloud_hypervisor(&mut command, kernel, initrd),
        Kind::Runc | Kind::Crun | Kind::Kata => bail!("{peer} boots no kernel"),
    }
    until_marker(&mut command)
}

/// Milliseconds from the start of `coracle-vmm` to the line of the same init, with the same devices: none
/// but a serial port.
pub fn ours_to_init(kernel: &Path, initrd: &Path) -> Result<f64> {
    let mut command = Command::new(coracle_vmm()?);
    command
        .args([
            "--console",
            "--serial",
            "--no-rng",
            "--memory",
            &MEMORY_MIB.to_string(),
            "--cmdline",
            WORDS,
        ])
        .arg("--kernel")
        .arg(kernel)
        .arg("--initrd")
        .arg(initrd);
    until_marker(&mut command)
}

/// The program that was built with this one, or the one that is installed.
pub fn coracle_vmm() -> Result<PathBuf> {
    const PROGRAM: &str = "coracle-vmm";
    let sibling = env::current_exe()?.with_file_name(PROGRAM);
    Ok(if sibling.exists() { sibling } else { PROGRAM.into() })
}

/// What a peer's kernel is told: what ours is, so that it skips the same.
fn cmdline() -> String {
    format!("{} console={} {WORDS}", Host::DEFAULT_CMDLINE, QEMU.serial_port)
}

fn qemu(command: &mut Command, kernel: &Path, initrd: &Path) {
    command
        .args(["-M", QEMU.machine, "-cpu", "host", "-smp", "1", "-m", &MEMORY_MIB.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-append", &cmdline()])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd);
}

fn cloud_hypervisor(command: &mut Command, kernel: &Path, initrd: &Path) {
    command
        .args(["--cpus", "boot=1", "--memory", &format!("size={MEMORY_MIB}M")])
        .args(["--serial", "tty", "--console", "off", "--cmdline", &cmdline()])
        .arg("--kernel")
        .arg(kernel)
        .arg("--initramfs")
        .arg(initrd);
}

fn firecracker_config(kernel: &Path, initrd: &Path) -> Result<NamedTempFile> {
    let config = json!({
        "boot-source": {
            "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": cmdline(),
        },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
    });
    let mut file = NamedTempFile::new()?;
    file.write_all(config.to_string().as_bytes())?;
    Ok(file)
}

fn until_marker(command: &mut Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let started = Instant::now();
    let program = command.get_program().to_owned();
    let mut child = command.spawn().with_context(|| format!("start {program:?}"))?;
    let lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
    for line in lines {
        if line?.contains(MARKER) {
            let ready_ms = started.elapsed().as_secs_f64() * 1e3;
            child.kill()?;
            child.wait()?;
            return Ok(ready_ms);
        }
    }
    bail!("the guest of {program:?} did not reach init: {}", child.wait()?)
}

/// An initrd whose init says [`MARKER`] and nothing else.
pub fn marker_initrd() -> Result<NamedTempFile> {
    let tree = tempfile::tempdir()?;
    for directory in ["bin", "dev"] {
        fs::create_dir(tree.path().join(directory))?;
    }
    fs::copy("/bin/busybox", tree.path().join("bin/busybox"))
        .context("/bin/busybox of busybox-static is init")?;
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs dev /dev\n\
         echo {MARKER} > /dev/console\nexec /bin/busybox sleep 1000\n"
    );
    let path = tree.path().join("init");
    fs::write(&path, init)?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    pack(tree.path())
}
