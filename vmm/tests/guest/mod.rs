//! A Linux guest that runs one shell script and ends.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use cpio::newc::{Builder, ModeFileType, trailer};
use tempfile::NamedTempFile;
use vmm::{Exit, VmConfig, VmHandle, Vmm};

/// Generous, because the lab emulates a processor.
pub const PATIENCE: Duration = Duration::from_secs(120);

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
    /// How long it may take.
    pub patience: Duration,
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
        Guest::of(&[("test-init", format!("{PROLOGUE}{script}{EPILOGUE}").as_bytes())])
    }

    /// One that also has `program` as a file of this `name`.
    pub fn with_program(script: &str, name: &str, program: &[u8]) -> Self {
        let script = format!("{PROLOGUE}{script}{EPILOGUE}");
        Guest::of(&[("test-init", script.as_bytes()), (name, program)])
    }

    fn of(files: &[(&str, &[u8])]) -> Self {
        let initrd = initrd(files).unwrap();
        let mut config = VmConfig::new(path_from("CORACLE_TEST_KERNEL"));
        config.boot.initrd = Some(initrd.path().to_owned());
        config.boot.cmdline = "rdinit=/test-init panic=-1".to_owned();
        Guest { initrd, config, patience: PATIENCE }
    }

    /// Starts it.
    pub fn start(&self) -> VmHandle {
        assert!(self.initrd.path().exists());
        Vmm::new(self.config.clone()).unwrap().start().unwrap()
    }

    /// Runs it to its end.
    pub fn run(&self) -> Ended {
        wait_for(self.start(), self.patience)
    }
}

/// Waits for the end of `vm`.
pub fn wait(vm: VmHandle) -> Ended {
    wait_for(vm, PATIENCE)
}

fn wait_for(vm: VmHandle, patience: Duration) -> Ended {
    let mut ended = libc::pollfd { fd: vm.ended().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let patience_ms = i32::try_from(patience.as_millis()).unwrap();
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

/// The initrd of the environment, for its modules, with busybox and `files` added to it.
fn initrd(files: &[(&str, &[u8])]) -> io::Result<NamedTempFile> {
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
    for (name, contents) in files {
        entry(&mut file, name, ModeFileType::Regular, contents)?;
    }
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
