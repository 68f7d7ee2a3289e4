//! fio in a guest on a disk of Coracle, beside the same on `virtio-blk` of QEMU microvm: the same
//! file behind both, past the page cache of the host and through it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use crate::guest::{self, Device, Guest};
use crate::report::Report;

/// Most of the peer's time that a request may take.
const GOAL: f64 = 1.0;
/// Size of the disk, in bytes.
const DISK_BYTES: u64 = 256 << 20;

/// fio prints one line of fields; 7 and 48 are the bandwidth of reads and writes in KiB/s. What is
/// said is microseconds a request, as of everything here the less the better.
const SCRIPT: &str = "
load() {
  fio --name=load --allow_file_create=0 --filename=/dev/vda --direct=1 --ioengine=libaio --thread --size=256M \\
    --rw=$1 --bs=$2 --iodepth=$3 --time_based --runtime=1 --output-format=terse > /tmp/fio || cat /tmp/fio
  awk -F';' -v name=$1-$2 -v kib=$4 '/^3;/ {print \"FIGURE\", name, kib * 1000000 / ($7 + $48)}' /tmp/fio
}
load randread 4k 32 4
load randwrite 4k 32 4
load read 1M 4 1024
load write 1M 4 1024
load randread 4k 1 4
";

/// Measures and adds the rows.
pub fn measure(report: &mut Report, image: &Path, runs: u32) -> Result<()> {
    let disk = Loop::new()?;
    let guest = Guest::new(image, SCRIPT, &["fio"])?;
    for (direct, how) in [(true, "direct"), (false, "buffered")] {
        let device = Device::Disk { path: &disk.device, direct };
        for (index, (name, ours, theirs)) in guest::pairs(&guest, device, runs)?.iter().enumerate()
        {
            let depth = ["depth 32", "depth 32", "depth 4", "depth 4", "depth 1"][index];
            let what = format!("disk {name}, {depth}, {how}");
            let peer = ("qemu microvm, io_uring", *theirs);
            report.beside(&what, ("us/request", *ours), peer, Some(GOAL));
        }
    }
    Ok(())
}

/// A loop device: a file in memory, as the lab has, cannot be read past the page cache, but a device
/// on it can.
struct Loop {
    device: PathBuf,
    _file: NamedTempFile,
}

impl Loop {
    fn new() -> Result<Self> {
        let file = NamedTempFile::new()?;
        // Written once, so that nobody measures how holes are filled.
        let mut written = std::io::repeat(0x5a);
        std::io::copy(&mut std::io::Read::take(&mut written, DISK_BYTES), &mut file.as_file())?;
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output()
            .context("start losetup")?;
        if !made.status.success() {
            bail!("losetup: {}", String::from_utf8_lossy(&made.stderr));
        }
        let device = PathBuf::from(String::from_utf8(made.stdout)?.trim());
        Ok(Loop { device, _file: file })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("losetup --detach {}: failed", self.device.display());
        }
    }
}
