//! A guest that carries out one load and says what it measured, in Coracle or in its peer: the same
//! kernel, the same initrd, one processor, the same memory.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use arch::peer::QEMU;
use tempfile::NamedTempFile;

use crate::vmm_peer::coracle_vmm;

/// What a line of the guest begins with that holds a figure: a name and a number follow.
const FIGURE: &str = "FIGURE";
/// The guest's last word.
const END: &str = "FIGURES-END";
/// Enough for the largest load's programs, which lie in memory, in MiB.
const MEMORY_MIB: &str = "768";

const PROLOGUE: &str = "#!/bin/sh
export PATH=/bin HOME=/tmp
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
cd /tmp; exec < /dev/null > /dev/console 2>&1
figure() { echo FIGURE $1 $2; }
";

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// `coracle-vmm`.
    Coracle,
    /// `qemu-system-x86_64 -M microvm`.
    Qemu,
}

/// What the guest boots, and the device that it is about.
#[derive(Debug)]
pub struct Guest {
    kernel: PathBuf,
    initrd: NamedTempFile,
}

/// A device, as each machine is told of it.
#[derive(Debug, Clone, Copy)]
pub enum Device<'a> {
    /// A disk with io_uring behind it, past the host's page cache if `direct`.
    Disk { path: &'a Path, direct: bool },
    /// A tap, served by the host's kernel if `vhost`.
    Net { tap: &'a str, vhost: bool },
    /// A shared directory; Coracle only, as the peer needs a daemon for it.
    Share { path: &'a Path },
    /// A socket device with a unix socket; Coracle only.
    Vsock { socket: &'a Path },
    /// None but those that every machine has.
    None,
}

/// A figure by name.
pub type Figure = (String, f64);

impl Guest {
    /// A guest with the kernel of the image in `image`, whose init is `script`, with `programs` of
    /// this machine and their libraries.
    pub fn new(image: &Path, script: &str, programs: &[&str]) -> Result<Self> {
        let kernel = image.join("kernel");
        // So that no run pays for a cold page cache.
        fs::read(&kernel).with_context(|| format!("read {}", kernel.display()))?;
        Ok(Guest { kernel, initrd: initrd(script, programs)? })
    }

    /// Runs it on `machine` and gives its figures in the order it said them.
    pub fn run(&self, machine: Machine, device: Device<'_>) -> Result<Vec<Figure>> {
        self.start(machine, device)?.figures()
    }

    /// Starts it on `machine`.
    pub fn start(&self, machine: Machine, device: Device<'_>) -> Result<Running> {
        let mut command = match machine {
            Machine::Coracle => self.coracle(device)?,
            Machine::Qemu => self.qemu(device)?,
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        Ok(Running { child })
    }

    fn coracle(&self, device: Device<'_>) -> Result<Command> {
        let mut command = Command::new(coracle_vmm()?);
        command.args(["--console", "--memory", MEMORY_MIB, "--cmdline", "rdinit=/init"]);
        command.arg("--kernel").arg(&self.kernel).arg("--initrd").arg(self.initrd.path());
        match device {
            Device::Disk { path, direct } => {
                let direct = if direct { ",direct" } else { "" };
                let path = path.display();
                command.arg(format!("--disk=id=data,path={path},engine=io_uring{direct}"))
            }
            Device::Net { tap, vhost } => {
                let vhost = if vhost { "on" } else { "off" };
                command.arg(format!("--net=tap={tap},mac=02:00:00:00:24:02,vhost={vhost}"))
            }
            Device::Share { path } => {
                command.arg(format!("--share=tag=data,path={}", path.display()))
            }
            Device::Vsock { socket } => {
                command.arg(format!("--vsock=cid=3,socket={}", socket.display()))
            }
            Device::None => &mut command,
        };
        Ok(command)
    }

    fn qemu(&self, device: Device<'_>) -> Result<Command> {
        let mut command = Command::new(QEMU.program);
        command
            // Without ACPI, which the tuned kernel has not: it finds devices on its command line.
            .args(["-M", &format!("{},acpi=off", QEMU.machine), "-cpu", "host", "-smp", "1"])
            .args(["-m", MEMORY_MIB, "-nodefaults", "-no-user-config", "-display", "none"])
            // Not the registers from before virtio 1.0, which are its default.
            .args(["-no-reboot", "-global", "virtio-mmio.force-legacy=false", "-serial", "stdio"])
            .args(["-append", "console=ttyS0 quiet panic=-1 tsc=reliable rdinit=/init"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(self.initrd.path());
        match device {
            Device::Disk { path, direct } => {
                let cache = if direct { "none" } else { "writeback" };
                let path = path.display();
                command
                    .arg("-drive")
                    .arg(format!(
                        "if=none,id=data,file={path},format=raw,cache={cache},aio=io_uring"
                    ))
                    .args(["-device", "virtio-blk-device,drive=data"]);
            }
            Device::Net { tap, vhost } => {
                let vhost = if vhost { "on" } else { "off" };
                let script = "script=no,downscript=no";
                command
                    .arg("-netdev")
                    .arg(format!("tap,id=net,ifname={tap},{script},vhost={vhost}"))
                    .args(["-device", "virtio-net-device,netdev=net,mac=02:00:00:00:24:02"]);
            }
            Device::None => {}
            Device::Share { .. } | Device::Vsock { .. } => bail!("the peer has no such device"),
        }
        Ok(command)
    }
}

/// A guest that runs; dropping it ends it.
#[derive(Debug)]
pub struct Running {
    /// The process that holds the machine.
    pub child: Child,
}

impl Running {
    /// The process that holds the machine.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the guest's last word and gives its figures.
    pub fn figures(&mut self) -> Result<Vec<Figure>> {
        let output = self.child.stdout.take().context("stdout is piped")?;
        let (mut figures, mut said) = (Vec::new(), String::new());
        for line in BufReader::new(output).lines() {
            let line = line?;
            let words: Vec<_> = line.split_whitespace().collect();
            match &words[..] {
                [END] if figures.is_empty() => break,
                [END] => return Ok(figures),
                [FIGURE, name, value] => figures.push(((*name).to_owned(), value.parse()?)),
                _ => said.push_str(&format!("{line}\n")),
            }
        }
        bail!("the guest has no figure, or ended early; it said:\n{said}")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already; either way nothing of it is left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the guest on both machines in turn, `runs` times after one that warms caches, and gives for
/// each figure the pair whose ratio is the median: `(name, ours, the peer's)`.
pub fn pairs(guest: &Guest, device: Device<'_>, runs: u32) -> Result<Vec<(String, f64, f64)>> {
    let mut all: Vec<Vec<(String, f64, f64)>> = Vec::new();
    for run in 0..=runs {
        let ours = guest.run(Machine::Coracle, device)?;
        let theirs = guest.run(Machine::Qemu, device)?;
        if ours.iter().map(|(name, _)| name).ne(theirs.iter().map(|(name, _)| name)) {
            bail!("figures are missing: ours are {ours:?}, QEMU's {theirs:?}");
        }
        let pairs: Vec<_> = ours
            .into_iter()
            .zip(theirs)
            .map(|((name, ours), (_, theirs))| (name, ours, theirs))
            .collect();
        for (name, ours, theirs) in &pairs {
            eprintln!("run {run} of {runs}: {name} {ours:.2}, QEMU {theirs:.2}");
        }
        if run > 0 {
            all.push(pairs);
        }
    }
    let figures = all.first().map_or(0, Vec::len);
    Ok((0..figures).filter_map(|at| median(all.iter().filter_map(|run| run.get(at)))).collect())
}

fn median<'a>(pairs: impl Iterator<Item = &'a (String, f64, f64)>) -> Option<(String, f64, f64)> {
    let mut pairs: Vec<_> = pairs.collect();
    pairs.sort_by(|a, b| (a.1 / a.2).total_cmp(&(b.1 / b.2)));
    pairs.get(pairs.len() / 2).copied().cloned()
}

fn initrd(script: &str, programs: &[&str]) -> Result<NamedTempFile> {
    let tree = tempfile::tempdir()?;
    for directory in ["bin", "dev", "proc", "sys", "tmp", "mnt"] {
        fs::create_dir(tree.path().join(directory))?;
    }
    fs::copy("/bin/busybox", tree.path().join("bin/busybox"))
        .context("/bin/busybox of busybox-static is the guest's shell")?;
    for applet in ["sh", "mount", "ip", "awk", "sleep", "cat"] {
        symlink("busybox", tree.path().join("bin").join(applet))?;
    }
    for program in programs {
        install(program, tree.path())?;
    }
    let init = tree.path().join("init");
    fs::write(&init, format!("{PROLOGUE}{script}\necho {END}\nsleep 1000\n"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    pack(tree.path())
}

/// An initrd of all that is in `tree`.
pub fn pack(tree: &Path) -> Result<NamedTempFile> {
    let script = "find . | cpio -o -H newc --quiet";
    let packed = Command::new("sh").args(["-c", script]).current_dir(tree).output()?;
    if !packed.status.success() {
        bail!("cpio failed: {}", String::from_utf8_lossy(&packed.stderr));
    }
    let mut file = NamedTempFile::new()?;
    file.write_all(&packed.stdout)?;
    Ok(file)
}

/// Copies a program of this machine and its libraries, these to where the program looks for them.
fn install(program: &str, tree: &Path) -> Result<()> {
    let lookup = format!("command -v {program}");
    let found = Command::new("sh").args(["-c", &lookup]).output()?;
    if !found.status.success() {
        bail!("no {program} on this machine: run `make setup`");
    }
    let path = String::from_utf8(found.stdout)?.trim().to_owned();
    fs::copy(&path, tree.join("bin").join(program))?;
    // A static program has none, which ldd says by its status.
    let libraries = String::from_utf8(Command::new("ldd").arg(&path).output()?.stdout)?;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let target = tree.join(library.trim_start_matches('/'));
        fs::create_dir_all(target.parent().context("a library lies in a folder")?)?;
        fs::copy(library, target)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pair_in_the_middle_is_that_of_the_middle_ratio() {
        let pair = |ours, theirs| ("x".to_owned(), ours, theirs);

        let middle = median([pair(1.0, 9.0), pair(9.0, 1.0), pair(4.0, 5.0)].iter());

        assert_eq!(middle, Some(pair(4.0, 5.0)));
    }
}
