//! A Linux guest that runs one shell script and ends.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use cpio::newc::{Builder, ModeFileType, trailer};
use tempfile::NamedTempFile;
use vmm::{Exit, VmConfig, VmHandle, Vmm};

/// Generous, because the lab emulates a processor.
const PATIENCE_MS: i32 = 120_000;

const PROLOGUE: &str = "#!/bin/busybox sh
export PATH=/bin
mkdir -p /proc /sys /dev /mnt
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
if [ -e /modules/order ]; then
  while read -r module; do insmod /modules/$module; done < /modules/order
fi
exec > /dev/console 2>&1
[ -c /dev/hvc0 ] && ! grep -q console=ttyS0 /proc/cmdline && exec > /dev/hvc0 2>&1
echo SCRIPT-STARTS
";

/// Without ACPI Linux does not know how to power the machine off, but it can always restart it.
const EPILOGUE: &str = "
echo SCRIPT-ENDS
[ -e /sys/firmware/acpi ] && poweroff -f
reboot -f
";

/// A guest that is to run a script.
pub struct Guest {
    initrd: NamedTempFile,
    /// Its machine; the initrd and the kernel are filled in.
    pub config: VmConfig,
    /// How long it may take, in milliseconds.
    pub patience_ms: i32,
}

/// What became of a guest.
#[derive(Debug)]
pub struct Ended {
    /// How the machine ended.
    pub exit: Exit,
    /// What it printed from the start of the script on.
    pub output: String,
}

impl Guest {
    /// A guest with the kernel and the modules of the environment, whose init is `script`.
    pub fn new(script: &str) -> Self {
        let initrd = initrd(&format!("{PROLOGUE}{script}{EPILOGUE}")).unwrap();
        let mut config = VmConfig::new(path_from("CORACLE_TEST_KERNEL"));
        config.boot.initrd = Some(initrd.path().to_owned());
        config.boot.cmdline = "rdinit=/test-init panic=-1".to_owned();
        Guest { initrd, config, patience_ms: PATIENCE_MS }
    }

    /// Starts it.
    pub fn start(&self) -> VmHandle {
        assert!(self.initrd.path().exists());
        Vmm::new(self.config.clone()).unwrap().start().unwrap()
    }

    /// Runs it to its end.
    pub fn run(&self) -> Ended {
        wait_for(self.start(), self.patience_ms)
    }
}

/// Waits for the end of `vm`.
pub fn wait(vm: VmHandle) -> Ended {
    wait_for(vm, PATIENCE_MS)
}

fn wait_for(vm: VmHandle, patience_ms: i32) -> Ended {
    let mut ended = libc::pollfd { fd: vm.ended().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `ended` is one descriptor that stays open during the call.
    let ready = unsafe { libc::poll(&raw mut ended, 1, patience_ms) };
    let output = vm.console_tail();
    assert_eq!(ready, 1, "the guest does not end; it printed:\n{output}");
    let output = output.split("SCRIPT-STARTS").last().unwrap_or_default().to_owned();
    Ended { exit: vm.wait(), output }
}

/// The file that the environment variable `name` names.
fn path_from(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("set {name} to the path of one")).into()
}

/// The initrd of the environment, for its modules, with busybox and `script` added to it.
fn initrd(script: &str) -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new()?;
    let bytes = io::copy(&mut File::open(path_from("CORACLE_TEST_INITRD"))?, &mut file)?;
    // The kernel takes archives one after the other, each at a multiple of four bytes.
    file.as_file().set_len(bytes.next_multiple_of(4))?;
    file.seek(SeekFrom::End(0))?;
    let busybox = fs::read("/bin/busybox")?;
    for directory in ["bin", "dev"] {
        entry(&mut file, directory, ModeFileType::Directory, &[])?;
    }
    entry(&mut file, "bin/busybox", ModeFileType::Regular, &busybox)?;
    let applets = Command::new("/bin/busybox").arg("--list").output()?.stdout;
    for applet in String::from_utf8_lossy(&applets).lines().filter(|&name| name != "busybox") {
        entry(&mut file, &format!("bin/{applet}"), ModeFileType::Symlink, b"busybox")?;
    }
    entry(&mut file, "test-init", ModeFileType::Regular, script.as_bytes())?;
    trailer(&mut file)?;
    Ok(file)
}

fn entry(output: impl Write, path: &str, kind: ModeFileType, contents: &[u8]) -> io::Result<()> {
    let mut entry = Builder::new(path)
        .mode(0o755)
        .set_mode_file_type(kind)
        .write(output, u32::try_from(contents.len()).unwrap());
    entry.write_all(contents)?;
    entry.finish()?;
    Ok(())
}
