//! What is left to the threads of a running machine, and to whom `coracle-vmm` is of use.

mod payload;
#[path = "payload/program.rs"]
mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use payload::{END, HANG, Payload, print, print_for_ever};
use program::end_code;
use tempfile::{NamedTempFile, TempDir};
use vmm::{ConsoleOutput, DiskConfig, ShareConfig, UserConfig, VmConfig, VsockConfig};

/// Generous, because this machine may be busy and its KVM emulated.
const PATIENCE: Duration = Duration::from_secs(20);

/// Gives the rest of the command line a /dev/kvm that everybody may open, and nothing else of root.
const AS_NOBODY: &str = "set -e
mount -t tmpfs -o mode=755 kvm /mnt
mknod -m 666 /mnt/kvm c 10 232
mount --bind /mnt/kvm /dev/kvm
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all \"$@\"";

/// The program, for the rest of its command line.
fn as_nobody() -> Command {
    let mut command = Command::new("unshare");
    let program = env!("CARGO_BIN_EXE_coracle-vmm");
    command.args(["--mount", "sh", "-c", AS_NOBODY, "sh", program]);
    command
}

/// A machine with what it needs on disk.
struct Machine {
    config: VmConfig,
    _payload: Payload,
    disk: NamedTempFile,
}

impl Machine {
    fn of(code: &[Vec<u8>]) -> Self {
        let payload = Payload::of(code);
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
            fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
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
        Running::start_with(machine, &[])
    }

    /// The same with more `arguments`.
    fn start_with(machine: &Machine, arguments: &[&str]) -> Self {
        Running::start_by(Command::new(env!("CARGO_BIN_EXE_coracle-vmm")), machine, arguments)
    }

    /// The same by a command that becomes the program.
    fn start_by(mut command: Command, machine: &Machine, arguments: &[&str]) -> Self {
        let config = machine.file();
        let mut program = command
            .arg("--config")
            .arg(config.path())
            .args(arguments)
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

    /// The soft and the hard limit called `name`.
    fn limit(&self, name: &str) -> [String; 2] {
        let limits = fs::read_to_string(format!("/proc/{}/limits", self.program.id())).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let mut words = line.split_whitespace().map(str::to_owned);
        [words.next().unwrap(), words.next().unwrap()]
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

    fn words(&self, name: &str) -> Vec<&str> {
        self.field(name).split_whitespace().collect()
    }

    fn capabilities(&self, set: &str) -> u64 {
        u64::from_str_radix(self.field(set), 16).unwrap()
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_thread_of_a_machine_has_its_filter() {
    let machine = Running::start(&Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk());

    let threads = machine.threads();

    assert_eq!(threads.keys().collect::<Vec<_>>(), ["coracle-vmm", "io", "vcpu 0", "vmm"]);
    for (name, status) in threads {
        // SECCOMP_MODE_FILTER
        assert_eq!(status.field("Seccomp"), "2", "{name}");
        assert_eq!(status.field("NoNewPrivs"), "1", "{name}");
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_machine_that_can_grow_is_confined_like_any_other() {
    let mut machine = Machine::of(&[print("up"), HANG.to_vec()]);
    machine.config.spare_slots = 1;
    machine.config.max_vcpus = Some(2);
    let machine = Running::start(&machine);

    for (name, status) in machine.threads() {
        assert_eq!(status.capabilities("CapPrm"), 0, "{name}");
        assert!(!status.words("Uid").contains(&"0"), "{name}");
        let root = fs::read_dir(format!("/proc/{}/root", status.field("Pid"))).unwrap();
        assert_eq!(root.count(), 0, "{name}");
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn every_machine_of_root_has_a_user_of_its_own() {
    let machine = Machine::of(&[print("up"), HANG.to_vec()]);
    let machines = [(); 2].map(|()| Running::start(&machine));

    let users = machines.map(|machine| {
        let threads = machine.threads().into_values();
        let ids = threads.flat_map(|status| {
            [status.words("Uid"), status.words("Gid")]
                .concat()
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        });
        ids.collect::<BTreeSet<_>>()
    });

    assert!(users.iter().all(|ids| ids.len() == 1 && !ids.contains("0")), "{users:?}");
    assert_ne!(users[0], users[1]);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_guest_that_may_connect_to_the_host_does_so_as_who_started_it() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("vsock");
    let mut machine = Machine::of(&[print("up"), HANG.to_vec()]);
    machine.config.vsock = Some(VsockConfig { cid: 3, socket: Some(socket.clone()) });
    let mut machine = Running::start(&machine);

    assert_eq!(machine.threads()["vmm"].words("Uid"), ["0"; 4]);

    // Whoever kills it has nothing to clean up.
    machine.program.kill().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while socket.exists() {
        assert!(Instant::now() < deadline, "the socket is still there");
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn no_thread_keeps_a_capability_it_does_not_need() {
    let machine = Running::start(&Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk());

    for (name, status) in machine.threads() {
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
    machine.config.shares = vec![ShareConfig::new("share", folder.path().into())];
    let machine = Running::start(&machine);

    for thread in machine.threads().into_values() {
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
    machine.config.shares = vec![ShareConfig::new("share", folder.path().into())];
    let machine = Running::start(&machine);

    let threads = machine.threads();

    // chown, dac_override, dac_read_search, fowner, fsetid, setgid, setuid, mknod, setfcap
    assert_eq!(threads["io"].capabilities("CapEff"), 0x8800_00df);
    assert_eq!(threads["io"].capabilities("CapPrm"), 0x8800_00df);
    assert_eq!(threads["vmm"].capabilities("CapPrm"), 0);
    assert_eq!(threads["vcpu 0"].capabilities("CapPrm"), 0);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn threads_become_the_user_they_are_told_to_be() {
    let mut machine = Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk();
    machine.config.user = Some(UserConfig { uid: 4711, gid: 4712 });
    let machine = Running::start(&machine);

    let threads = machine.threads();

    assert_eq!(threads.len(), 4);
    for (name, status) in threads {
        assert_eq!(status.words("Uid"), ["4711"; 4], "{name}");
        assert_eq!(status.words("Gid"), ["4712"; 4], "{name}");
        assert!(status.words("Groups").is_empty(), "{name}");
        assert_eq!(status.capabilities("CapPrm"), 0, "{name}");
    }
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn the_thread_that_serves_files_stays_root() {
    let folder = TempDir::new().unwrap();
    let mut machine = Machine::of(&[print("up"), HANG.to_vec()]);
    machine.config.user = Some(UserConfig { uid: 4711, gid: 4712 });
    machine.config.shares = vec![ShareConfig::new("share", folder.path().into())];
    let machine = Running::start(&machine);

    let threads = machine.threads();

    assert_eq!(threads["io"].words("Uid"), ["0"; 4]);
    assert_eq!(threads["io"].capabilities("CapEff"), 0x8800_00df);
    assert_eq!(threads["vmm"].words("Uid"), ["4711"; 4]);
    assert_eq!(threads["vcpu 0"].words("Uid"), ["4711"; 4]);
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_machine_of_another_user_is_controlled_through_its_socket() {
    let folder = TempDir::new().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let socket = folder.path().join("api");
    let machine = Machine::of(&[print("up"), HANG.to_vec()]);
    let arguments = ["--user=4711:4712", "--api-socket", socket.to_str().unwrap()];
    let mut machine = Running::start_with(&machine, &arguments);

    for state in ["paused", "running", "stopped"] {
        let mut client = UnixStream::connect(&socket).unwrap();
        let body = format!("{{\"state\": \"{state}\"}}");
        let bytes = body.len();
        let head = "PUT /v1/vm/state HTTP/1.0\r\nContent-Length";
        client.write_all(format!("{head}: {bytes}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 204"), "{state}: {answer}");
    }

    assert_eq!(machine.program.wait().unwrap().code(), Some(5));
    assert!(!socket.exists());
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_machine_shares_neither_ipc_nor_host_name_with_the_host() {
    let machine = Running::start(&Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk());

    for thread in machine.threads().into_values() {
        for namespace in ["ipc", "uts", "mnt"] {
            let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}"));
            assert_ne!(of(thread.field("Pid")).unwrap(), of("self").unwrap(), "{}", thread.0);
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_may_open_little_more_than_it_has_open() {
    let mut bounded = Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk();
    bounded.config.vsock = None;
    let machine = Running::start(&bounded);

    let [soft, hard] = machine.limit("Max open files");

    assert_eq!(soft, hard);
    assert!((64..128).contains(&soft.parse::<u64>().unwrap()), "{soft}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_keeps_to_the_limits_it_is_told() {
    let machine = Machine::of(&[print("up"), HANG.to_vec()]);
    let arguments = ["--resource-limit=no-file=200", "--resource-limit=fsize=1048576"];
    let machine = Running::start_with(&machine, &arguments);

    assert_eq!(machine.limit("Max open files"), ["200"; 2]);
    assert_eq!(machine.limit("Max file size"), ["1048576"; 2]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_leaves_no_core_dump() {
    let machine = Running::start(&Machine::of(&[print("up"), HANG.to_vec()]));

    assert_eq!(machine.limit("Max core file size"), ["0"; 2]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_without_filters_has_none() {
    let mut unfiltered = Machine::of(&[print_for_ever(b'x')]);
    unfiltered.config.seccomp = false;
    let machine = Running::start(&unfiltered);

    assert!(machine.threads().values().all(|status| status.field("Seccomp") == "0"));
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_user_who_may_open_kvm_runs_a_machine() {
    let machine = Machine::of(&[print("hello"), END.to_vec()]);
    let config = machine.file();

    let output =
        as_nobody().arg("--config").arg(config.path()).stdin(Stdio::null()).output().unwrap();

    assert_eq!(output.stdout, b"hello", "{output:?}");
    // The guest's processor gave up, as it should.
    assert_eq!(output.status.code(), end_code(), "{output:?}");
}

#[test]
#[ignore = "needs /dev/kvm, root, and user namespaces for everybody"]
fn a_machine_of_such_a_user_sees_nothing_of_the_host_either() {
    let machine = Machine::of(&[print("up"), HANG.to_vec()]).with_a_disk();
    let nobody = Permissions::from_mode(0o666);
    fs::set_permissions(machine.disk.path(), nobody).unwrap();
    let machine = Running::start_by(as_nobody(), &machine, &[]);

    for (name, status) in machine.threads() {
        assert_eq!(status.words("Uid"), ["65534"; 4], "{name}");
        assert_eq!(status.capabilities("CapPrm"), 0, "{name}");
        let root = fs::read_dir(format!("/proc/{}/root", status.field("Pid"))).unwrap();
        assert_eq!(root.count(), 0, "{name}");
        for namespace in ["ipc", "uts", "mnt", "user"] {
            let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}"));
            assert_ne!(of(status.field("Pid")).unwrap(), of("self").unwrap(), "{name}");
        }
    }
}
