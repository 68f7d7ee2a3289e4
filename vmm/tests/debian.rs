//! A stock Debian boots from its disk to a login prompt, with disk and network.
//!
//! `CORACLE_TEST_DEBIAN` names the folder that `tests/lab/debian.sh` fills.

use std::env;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

/// Generous, because the lab emulates a processor.
const PATIENCE: Duration = Duration::from_secs(240);

/// What `coracle-vmm` ends with when the guest restarts.
const RESET: i32 = 3;

/// What the shell is asked after the login: the root file system is the disk and can be written,
/// the host answers, and the machine ends, by a restart, as a kernel without ACPI can only halt.
const QUESTIONS: &str = "export TERM=dumb; findmnt -rno SOURCE,FSTYPE,OPTIONS /; \
     touch /written && echo can write; ping -q -c 2 192.168.240.1; systemctl --no-block reboot\n";

/// The console of a `coracle-vmm` that runs.
struct Console {
    program: Child,
    shown: String,
}

impl Console {
    /// Boots what the arguments `boot` name from a copy of the disk, with the network interface `tap`.
    fn boot(folder: &Path, boot: &[String], tap: &str) -> Self {
        let disk = folder.join("root.ext4");
        let mut copy = Command::new("cp");
        copy.arg("--sparse=always").arg(debian("root.ext4")).arg(&disk);
        assert!(copy.status().unwrap().success());
        let mut program = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"));
        program.args(["--memory=512", "--console", "--cmdline=root=/dev/vda rw"]);
        program.args(boot);
        program.arg(format!("--disk=id=root,path={}", disk.display()));
        program.arg(format!("--net=tap={tap},create,mac=02:00:00:00:24:01"));
        let program = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Console { program, shown: String::new() }
    }

    /// Waits until `text` was shown, and forgets everything up to it.
    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((before, after)) = self.shown.split_once(text) {
                let (before, after) = (before.to_owned(), after.to_owned());
                self.shown = after;
                return before;
            }
            assert!(Instant::now() < deadline, "no {text:?} in:\n{}", self.shown);
            self.read(PollTimeout::from(1000_u16), text);
        }
    }

    fn read(&mut self, patience: PollTimeout, wanted: &str) {
        let output = self.program.stdout.as_mut().unwrap();
        let mut there = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
        if poll(&mut there, patience).unwrap() == 0 {
            return;
        }
        let mut bytes = [0; 4096];
        match output.read(&mut bytes) {
            Ok(0) => panic!("the machine ended before {wanted:?}; it showed:\n{}", self.shown),
            Ok(count) => self.shown.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted),
        }
    }

    fn enter(&mut self, text: &str) {
        self.program.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It is gone already unless the test failed.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// A file of the folder of Debian.
fn debian(name: &str) -> PathBuf {
    let folder = env::var_os("CORACLE_TEST_DEBIAN").expect("set CORACLE_TEST_DEBIAN");
    Path::new(&folder).join(name)
}

fn give_address(tap: &str) {
    for arguments in
        [format!("address add 192.168.240.1/24 dev {tap}"), format!("link set {tap} up")]
    {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success());
    }
}

#[test]
#[ignore = "needs KVM that boots Linux, and a Debian"]
fn debian_boots_with_its_own_kernel_and_initrd_to_a_login_prompt() {
    let folder = TempDir::new().unwrap();
    let boot = [
        format!("--kernel={}", debian("vmlinuz").display()),
        format!("--initrd={}", debian("initrd").display()),
        "--serial".to_owned(),
    ];
    let mut console = Console::boot(folder.path(), &boot, "vmmdeb0");
    // The prompts of the serial port and of the virtio console come at once, piece by piece.
    console.wait_for("login: ");
    give_address("vmmdeb0");

    let mut ping = Command::new("/bin/busybox");
    ping.args(["ping", "-c", "3", "-W", "20", "192.168.240.2"]);

    assert!(ping.status().unwrap().success(), "the guest is silent");
}

#[test]
#[ignore = "needs KVM that boots Linux, and a Debian"]
fn debian_boots_with_the_kernel_of_containers_and_root_logs_in() {
    let kernel = PathBuf::from(env::var_os("CORACLE_TEST_KERNEL").unwrap());
    let folder = TempDir::new().unwrap();
    let boot = [format!("--kernel={}", kernel.display())];
    let mut console = Console::boot(folder.path(), &boot, "vmmdeb1");
    console.wait_for("stock login: ");
    give_address("vmmdeb1");

    console.enter("root\n");
    console.wait_for("root@stock:~# ");
    console.enter(QUESTIONS);
    console.wait_for("/dev/vda ext4 rw,");
    console.wait_for("can write\r\n");
    console.wait_for(" 0% packet loss");

    let ended = console.program.wait().unwrap();
    assert_eq!(ended.code(), Some(RESET), "{ended}");
}
