//! What is left to the threads of a running machine, and to whom `coracle-vmm` is of use.

mod payload;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use payload::{HANG, Payload, TRIPLE_FAULT, print, print_for_ever};
use tempfile::{NamedTempFile, TempDir};
use vmm::{ConsoleOutput, DiskConfig, ShareConfig, VmConfig, VsockConfig};

/// Generous, because this machine may be busy and its KVM emulated.
const PATIENCE: Duration = Duration::from_secs(20);

/// Gives the rest of the command line a /dev/kvm that everybody may open, and nothing else of root.
const AS_NOBODY: &str = "set -e
mount -t tmpfs -o mode=755 kvm /mnt
mknod -m 666 /mnt/kvm c 10 232
mount --bind /mnt/kvm /dev/kvm
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all \"$@\"";

/// A machine with what it needs on disk.
struct Machine {
    config: VmConfig,
    _payload: Payload,
    disk: NamedTempFile,
}

impl Machine {
    fn of(code: &[Vec<u8>]) -> Self {
        let payload = Payload::elf(code);
        let mut config = payload.config();
        config.console.output = ConsoleOutput::Stdout;
        config.vsock = Some(VsockConfig { cid: 3, socket: None });
        Machine { config, _payload: payload, disk: NamedTempFile::new().unwrap() }
    }

    fn with_a_disk(mut self) -> Self {
        let path = self.disk.path().to_owned();
        self.config.disks = vec![DiskConfig::new("data", path)];
        self
    }

    /// The configuration as a file that, like the kernel, everybody may read.
    fn file(&self) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        serde_json::to_writer(file.as_file(), &self.config).unwrap();
        for path in [file.path(), &self.config.boot.kernel] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        }
        file
    }
}

/// A program that is killed at the end of the test.
struct Running {
    program: Child,
    _config: NamedTempFile,
}

impl Running {
    /// Starts `machine` and waits until its guest prints.
    fn start(machine: &Machine) -> Self {
        let config = machine.file();
        let mut program = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
            .arg("--config")
            .arg(config.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        program.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Running { program, _config: config }
    }

    /// What the kernel says about each thread, by the thread's name.
    fn threads(&self) -> BTreeMap<String, Status> {
        fs::read_dir(format!("/proc/{}/task", self.program.id()))
            .unwrap()
            .map(|task| {
                let path = task.unwrap().path();
                let name = fs::read_to_string(path.join("comm")).unwrap();
                (name.trim().to_owned(), Status(fs::read_to_string(path.join("status")).unwrap()))
            })
            // KVM keeps workers in the process that never leave the kernel.
            .filter(|(name, _)| !name.starts_with("kvm-"))
            .collect()
    }

    /// All threads, once the one that started the machine has nothing left to do.
    fn settled_threads(&self) -> BTreeMap<String, Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let threads = self.threads();
            if threads["coracle-vmm"].field("NoNewPrivs") == "1"
                && threads["coracle-vmm"].capabilities("CapPrm") == 0
            {
                return threads;
            }
            assert!(Instant::now() < deadline, "{}", threads["coracle-vmm"].0);
            std::thread::yield_now();
        }
    }

    /// The threads of the machine itself.
    fn device_threads(&self) -> BTreeMap<String, Status> {
        let mut threads = self.threads();
        threads.remove("coracle-vmm").unwrap();
        threads
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.program.kill().unwrap();
        self.program.wait().unwrap();
    }
}

/// `/proc/PID/task/TID/status`
struct Status(String);

impl Status {
    fn field(&self, name: &str) -> &str {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.strip_prefix(':').unwrap().trim()
    }

    fn capabilities(&self, set: &str) -> u64 {
        u64::from_str_radix(self.field(set), 16).unwrap()
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_thread_of_a_machine_has_its_filter() {
    let machine = Running::start(&Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk());

    let threads = machine.device_threads();

    assert_eq!(threads.keys().collect::<Vec<_>>(), ["io", "vcpu 0", "vmm"]);
    for (name, status) in threads {
        // SECCOMP_MODE_FILTER
        assert_eq!(status.field("Seccomp"), "2", "{name}");
        assert_eq!(status.field("NoNewPrivs"), "1", "{name}");
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn no_thread_keeps_a_capability_it_does_not_need() {
    let machine = Running::start(&Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk());

    for (name, status) in machine.settled_threads() {
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status.capabilities(set), 0, "{name} {set}");
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn no_thread_of_a_machine_sees_the_hosts_files() {
    let folder = TempDir::new().unwrap();
    let mut machine = Machine::of(&[print("up"), HANG.to_vec()]);
    machine.config.shares =
        vec![ShareConfig { tag: "share".into(), path: folder.path().into(), read_only: false }];
    let machine = Running::start(&machine);

    for thread in machine.device_threads().into_values() {
        let root = format!("/proc/{}/root", thread.field("Pid"));
        let mut names: Vec<_> =
            fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["proc", "share"]);
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn the_thread_that_serves_files_keeps_what_that_takes() {
    let folder = TempDir::new().unwrap();
    let mut machine = Machine::of(&[print("up"), HANG.to_vec()]);
    machine.config.shares =
        vec![ShareConfig { tag: "share".into(), path: folder.path().into(), read_only: false }];
    let machine = Running::start(&machine);

    let threads = machine.settled_threads();

    // chown, dac_override, dac_read_search, fowner, fsetid, setgid, setuid, mknod, setfcap
    assert_eq!(threads["io"].capabilities("CapEff"), 0x8800_00df);
    assert_eq!(threads["io"].capabilities("CapPrm"), 0x8800_00df);
    assert_eq!(threads["vmm"].capabilities("CapPrm"), 0);
    assert_eq!(threads["vcpu 0"].capabilities("CapPrm"), 0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_leaves_no_core_dump() {
    let machine = Running::start(&Machine::of(&[print("up"), HANG.to_vec()]));

    let limits = fs::read_to_string(format!("/proc/{}/limits", machine.program.id())).unwrap();

    let line = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["0", "0", "bytes"]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_without_filters_has_none() {
    let mut unfiltered = Machine::of(&[print_for_ever(b'x')]);
    unfiltered.config.seccomp = false;
    let machine = Running::start(&unfiltered);

    assert!(machine.device_threads().values().all(|status| status.field("Seccomp") == "0"));
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_user_who_may_open_kvm_runs_a_machine() {
    let machine = Machine::of(&[print("hello"), TRIPLE_FAULT.to_vec()]);
    let config = machine.file();

    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", AS_NOBODY, "sh", env!("CARGO_BIN_EXE_coracle-vmm")])
        .arg("--config")
        .arg(config.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();

    assert_eq!(output.stdout, b"hello", "{output:?}");
    // The guest's processor gave up, as it should.
    assert_eq!(output.status.code(), Some(4), "{output:?}");
}
