//! A Linux guest that is saved, whose machine is dropped, and that goes on in another one.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use arch::program;
use tempfile::{NamedTempFile, TempDir};
use vmm::{
    BalloonConfig, DiskConfig, Error, MachineState, MemoryBacking, NetConfig, SavedMemory,
    ShareConfig, Sharing, Unsaved, VhostUse, VmConfig, VmHandle, Vmm, VsockConfig,
};

use crate::guest::{Guest, PATIENCE, wait};
use crate::{assert_ended_by_guest, give_address, new_tap};

const PORT: u32 = 5000;
const SECTOR: usize = 512;

/// What the program talks about: the address of port 5000 of the host, and what it says there.
const TALK: (&[u8; 16], &[u8; 6]) = (b"\x28\0\0\0\x88\x13\0\0\x02\0\0\0\0\0\0\0", b"hello\n");

/// Works with everything it has until the host says stop, once a second of the guest's patience.
const WORK: &str = "
    mount -t virtiofs share /mnt; cd /
    exec 3>>/mnt/log 4</mnt/input
    rm /mnt/nameless; exec 5>/mnt/nameless; rm /mnt/nameless
    read -r first <&4
    ip link set eth0 up; ip address add $ADDRESS.2/24 dev eth0; ping -q -c 1 $ADDRESS.1 >/dev/null
    /talk & early=$!
    n=0
    until [ -e /mnt/stop ]; do
        n=$((n + 1)); read -r uptime rest </proc/uptime
        printf %512d $n | dd of=/dev/vda bs=512 seek=$n conv=fsync 2>/dev/null
        echo $n ${uptime%.*} >&3
        usleep 50000
    done
    read -r second <&4; echo lines: $first $second
    echo x >&5 || echo nameless is stale
    ls /mnt; cat /mnt/late
    wait $early; echo early: $?
    /talk; echo late: $?
    ping -q -c 1 $ADDRESS.1 >/dev/null && echo pong
    [ $(dd if=/dev/vda bs=512 skip=$n count=1 2>/dev/null) = $n ] && echo disk remembers
    head -c 8 /dev/urandom | wc -c
    exec 3>&- 4<&- 5>&-; umount /mnt && echo unmounted
    echo counted: $n";

/// A Linux program that says hello to the host and waits for an answer.
fn talk() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    let code = [program::TALK, TALK.0, TALK.1].concat();
    let size = 120 + code.len() as u64;
    let [low, high] = program::MACHINE.to_le_bytes();
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, low, high, 1, 0, 0, 0]);
    elf.extend([BASE + 120, 64, 0].map(u64::to_le_bytes).as_flattened());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    elf.extend([0, BASE, BASE, size, size, 0x1000].map(u64::to_le_bytes).as_flattened());
    elf.extend(code);
    elf
}

/// A guest that works with a disk, a share, an interface and a socket, and what it works with.
struct Worker {
    guest: Guest,
    folder: TempDir,
    disk: NamedTempFile,
    listener: UnixListener,
}

impl Worker {
    fn new(tap: &str, subnet: &str, vhost: VhostUse) -> Self {
        let work = WORK.replace("$ADDRESS", subnet);
        let mut guest = Guest::with_program(&work, "talk", &talk());
        let folder = TempDir::new().unwrap();
        let share = folder.path().join("share");
        fs::create_dir(&share).unwrap();
        fs::write(share.join("input"), "first\nsecond\n").unwrap();
        fs::write(share.join("nameless"), "").unwrap();
        let disk = NamedTempFile::new().unwrap();
        disk.as_file().set_len(1 << 20).unwrap();
        let socket = folder.path().join("v");
        let listener = UnixListener::bind(folder.path().join(format!("v_{PORT}"))).unwrap();
        let config = &mut guest.config;
        config.disks = vec![DiskConfig::new("disk", disk.path().to_owned())];
        config.shares = vec![ShareConfig::new("share", share)];
        config.vsock = Some(VsockConfig { cid: 3, socket: Some(socket) });
        config.nets = vec![NetConfig { vhost, ..new_tap(tap) }];
        Worker { guest, folder, disk, listener }
    }

    fn share(&self, name: &str) -> PathBuf {
        self.folder.path().join("share").join(name)
    }

    /// What the guest counted up to, and its uptime at each step.
    fn counts(&self) -> Vec<[u64; 2]> {
        let log = fs::read_to_string(self.share("log")).unwrap_or_default();
        let number = |word: &str| word.parse().unwrap();
        let complete = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        complete
            .map(|line| {
                let (count, uptime) = line.trim_end().split_once(' ').unwrap();
                [number(count), number(uptime)]
            })
            .collect()
    }

    fn wait_for_count(&self, vm: &VmHandle, least: usize) {
        let start = Instant::now();
        while self.counts().len() < least {
            let late = start.elapsed() > PATIENCE || vm.has_ended();
            assert!(!late, "{:?}; the guest printed:\n{}", self.counts(), vm.console_tail());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes a connection of the guest.
    fn hear(&self) -> UnixStream {
        let (mut stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut hello = [0; 6];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello\n");
        stream
    }

    /// Runs the guest to its end; `saved` makes another machine of a running one.
    fn run(&self, tap: &str, subnet: &str, saved: impl FnOnce(VmHandle) -> VmHandle) {
        let vm = self.guest.start();
        connect(tap, subnet);
        let _early = self.hear();
        self.wait_for_count(&vm, 5);

        let vm = saved(vm);
        connect(tap, subnet);
        let before = self.counts().len();
        self.wait_for_count(&vm, before + 5);
        fs::write(self.share("late"), "from the host\n").unwrap();
        fs::write(self.share("stop"), "").unwrap();
        self.hear().write_all(b"seven b").unwrap();
        let ended = wait(vm);

        assert_ended_by_guest(&ended);
        let counts = self.counts();
        for wanted in [
            "lines: first second",
            "nameless is stale",
            "from the host",
            "early: 104", // ECONNRESET
            "late: 7",
            "pong",
            "disk remembers",
            "unmounted",
            &format!("counted: {}", counts.len()),
        ] {
            assert!(ended.output.contains(wanted), "{wanted:?} not in {ended:?}");
        }
        assert!(counts.iter().zip(1..).all(|([count, _], nth)| *count == nth), "{counts:?}");
        assert!(counts.is_sorted_by_key(|[_, uptime]| *uptime), "{counts:?}");
        self.assert_on_disk(counts.len());
    }

    fn assert_on_disk(&self, counts: usize) {
        let disk = fs::read(self.disk.path()).unwrap();
        for count in 1..=counts {
            let sector = std::str::from_utf8(&disk[count * SECTOR..][..SECTOR]).unwrap();
            assert_eq!(sector.trim_start(), count.to_string());
        }
    }
}

/// Gives the host's end of the interface an address that the guest still knows after a while.
fn connect(tap: &str, subnet: &str) {
    let arguments = ["link", "set", "dev", tap, "address", "06:00:00:00:00:01"];
    assert!(Command::new("ip").args(arguments).status().unwrap().success());
    give_address(tap, &format!("{subnet}.1/24"));
}

/// Waits until the guest has plugged in this much memory.
fn plug(vm: &VmHandle, mib: u32) {
    let memory = vm.pluggable_memory().unwrap();
    memory.request_mib(mib).unwrap();
    let start = Instant::now();
    while memory.plugged_mib() != u64::from(mib) {
        assert!(start.elapsed() < PATIENCE, "{} MiB of {mib} are plugged", memory.plugged_mib());
        thread::sleep(Duration::from_millis(20));
    }
}

/// How much memory the guest says that it has.
fn total_bytes(vm: &VmHandle) -> Option<u64> {
    let statistics = vm.balloon().unwrap().statistics(PATIENCE).unwrap();
    statistics.expect("the guest answers").total_bytes
}

/// Where a paused machine stands, written as JSON and read again.
fn saved(vm: &VmHandle) -> MachineState {
    vm.pause();
    let json = serde_json::to_vec(&vm.save().unwrap()).unwrap();
    serde_json::from_slice(&json).unwrap()
}

fn rebuilt(config: &VmConfig, state: &MachineState, file: File, sharing: Sharing) -> VmHandle {
    let memory = SavedMemory { file, sharing };
    Vmm::restore(config.clone(), state, memory).unwrap().start().unwrap()
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_goes_on_in_another_machine_with_its_memory_in_a_memfd() {
    let mut worker = Worker::new("vmmstate1", "192.168.241", VhostUse::Off);
    let config = &mut worker.guest.config;
    config.memory.backing = MemoryBacking::Memfd;
    let config = config.clone();

    worker.run("vmmstate1", "192.168.241", |vm| {
        let state = saved(&vm);
        let file = vm.memory_file().unwrap().try_clone().unwrap();
        drop(vm);
        rebuilt(&config, &state, file, Sharing::Shared)
    });
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_of_two_processors_goes_on_from_a_file_and_leaves_it_alone() {
    let memory = TempDir::new().unwrap();
    let path = memory.path().join("memory");
    let mut worker = Worker::new("vmmstate2", "192.168.242", VhostUse::On);
    let config = &mut worker.guest.config;
    config.vcpus = 2;
    config.nets[0].queue_pairs = 2;
    config.memory.pluggable_mib = 256;
    config.memory.backing = MemoryBacking::File(path.clone());
    config.balloon = Some(BalloonConfig { statistics: true, ..BalloonConfig::default() });
    let config = config.clone();

    worker.run("vmmstate2", "192.168.242", |vm| {
        let before = total_bytes(&vm).map(|bytes| bytes + (128 << 20));
        plug(&vm, 128);
        // The driver says that it has the memory before Linux has put all of it to use.
        let start = Instant::now();
        while total_bytes(&vm) != before {
            assert!(start.elapsed() < PATIENCE, "{:?} bytes, not {before:?}", total_bytes(&vm));
        }
        let state = saved(&vm);
        drop(vm);
        let vm = rebuilt(&config, &state, open(&path), Sharing::Private);
        assert_eq!(vm.pluggable_memory().unwrap().plugged_mib(), 128);
        assert_eq!(total_bytes(&vm), before);
        plug(&vm, 256);
        vm
    });
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_saved_guest_may_also_just_go_on() {
    let mut worker = Worker::new("vmmstate3", "192.168.243", VhostUse::On);
    worker.guest.config.memory.backing = MemoryBacking::Memfd;
    let vm = worker.guest.start();
    connect("vmmstate3", "192.168.243");
    let mut early = worker.hear();
    worker.wait_for_count(&vm, 3);

    assert!(matches!(vm.save(), Err(Error::Save(Unsaved::Running))));
    saved(&vm);
    let before = worker.counts().len();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(worker.counts().len(), before);
    vm.resume();

    worker.wait_for_count(&vm, before + 3);
    let ping = ["ping", "-q", "-c", "3", "-W", "20", "192.168.243.2"];
    assert!(Command::new("/bin/busybox").args(ping).status().unwrap().success());
    early.write_all(b"still").unwrap();
    vm.stop();
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn two_machines_go_on_from_one_template_and_so_does_that_itself() {
    let guest =
        Guest::new("i=0; while [ $i -lt 40 ]; do i=$((i + 1)); echo count $i; usleep 50000; done");
    let vm = guest.start();
    let start = Instant::now();
    while !vm.console_tail().contains("count 5") {
        assert!(start.elapsed() < PATIENCE, "{}", vm.console_tail());
        thread::sleep(Duration::from_millis(10));
    }
    let memory = tempfile::tempfile().unwrap();
    vm.pause();
    let state = vm.save_with(|_, layout| layout.copy(Path::new("/proc/self"), &memory)).unwrap();
    vm.resume();

    let [first, second] = [(), ()]
        .map(|()| rebuilt(&guest.config, &state, memory.try_clone().unwrap(), Sharing::Private));
    first.pause();
    assert!(matches!(first.save(), Err(Error::NoMemoryFile { field: "memory.backing", .. })));
    first.resume();
    for (ended, is_template) in [vm, first, second].map(wait).into_iter().zip([true, false, false])
    {
        assert_ended_by_guest(&ended);
        let first = ended.output.find("count").map(|at| &ended.output[at..]).unwrap();
        let first: u32 = first[6..].split_whitespace().next().unwrap().parse().unwrap();
        assert!((first == 1) == is_template && ended.output.contains("count 40"), "{ended:?}");
    }
}
