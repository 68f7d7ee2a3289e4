//! Linux guests find every device of their machine, use it, and end their machine cleanly.

mod guest;
mod hotplug;
mod machine;
mod memory;
mod pmem;
mod state;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use guest::{Ended, Guest, wait};
use tempfile::{NamedTempFile, TempDir};
use vmm::{
    DiskConfig, DiskEngine, Exit, NetConfig, RateLimitConfig, ShareConfig, VhostUse, VsockConfig,
};

/// Both are a guest's wish to be over: a kernel without ACPI may have only the second.
fn assert_ended_by_guest(ended: &Ended) {
    assert!(ended.output.contains("SCRIPT-ENDS"), "{ended:?}");
    assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn linux_runs_init_and_powers_off() {
    let guest = Guest::new("uname -s");

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("Linux"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn reboot_ends_the_machine() {
    let guest = Guest::new("reboot -f");

    let ended = guest.run();

    assert!(matches!(ended.exit, Exit::Reset | Exit::TripleFault), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn both_processors_of_two_come_up() {
    let mut guest = Guest::new("echo processors: $(grep -c ^processor /proc/cpuinfo)");
    guest.config.vcpus = 2;

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("processors: 2"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_has_the_memory_it_was_given() {
    let mut guest = Guest::new("grep MemTotal /proc/meminfo");
    guest.config.memory.size_mib = 4096;

    let ended = guest.run();

    let kib: u64 = ended
        .output
        .split_whitespace()
        .find_map(|word| word.parse().ok())
        .expect("MemTotal is a number");
    assert!((3_700_000..4 << 20).contains(&kib), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_draws_entropy_from_its_device() {
    let guest = Guest::new(
        "cat /sys/class/misc/hw_random/rng_current
         dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c",
    );

    let ended = guest.run();

    assert!(ended.output.contains("virtio_rng.0"), "{ended:?}");
    assert!(ended.output.contains("64"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_reads_and_writes_its_disk() {
    let mut disk = NamedTempFile::new().unwrap();
    disk.write_all(&[b'd'; 1 << 20]).unwrap();
    let mut guest = Guest::new(
        "cat /sys/block/vda/serial; echo; cat /sys/block/vda/size
         dd if=/dev/vda bs=1 count=4 2>/dev/null; echo
         echo written | dd of=/dev/vda bs=512 seek=1 conv=sync 2>/dev/null; sync",
    );
    guest.config.disks = vec![DiskConfig::new("data", disk.path().into())];

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    let words: Vec<_> = ended.output.split_whitespace().take(3).collect();
    assert_eq!(words, ["data", "2048", "dddd"], "{ended:?}");
    assert_eq!(&fs::read(disk.path()).unwrap()[512..519], b"written");
}

/// A guest with two processors whose script works on a disk of 64 MiB that is full of `d`.
fn guest_with_disk(script: &str) -> (Guest, NamedTempFile) {
    let mut disk = NamedTempFile::new().unwrap();
    (0..64).for_each(|_| disk.write_all(&[b'd'; 1 << 20]).unwrap());
    let mut guest = Guest::new(script);
    guest.config.vcpus = 2;
    guest.config.disks = vec![DiskConfig::new("data", disk.path().into())];
    (guest, disk)
}

const WORK_ON_DISK: &str = "
    ls /sys/block/vda/mq | wc -l
    cd /sys/block/vda/queue; cat discard_max_bytes write_zeroes_max_bytes discard_granularity
    cat /dev/vda | md5sum
    (dd if=/dev/zero of=/dev/vda bs=1M count=8 seek=8 conv=fsync
    dd if=/dev/vda of=/dev/null bs=4k count=512 iflag=direct &
    dd if=/dev/zero of=/dev/vda bs=4k count=512 oflag=direct seek=8192 conv=fsync
    wait) 2>/dev/null
    blkdiscard -o 16777216 -l 16777216 /dev/vda && echo discarded
    echo 3 > /proc/sys/vm/drop_caches; cat /dev/vda | md5sum; cd /";

fn assert_worked_on_disk(ended: &Ended, disk: &NamedTempFile) {
    assert_ended_by_guest(ended);
    let mut expected = vec![b'd'; 64 << 20];
    let before = md5(&expected);
    expected[8 << 20..32 << 20].fill(0);
    expected[32 << 20..34 << 20].fill(0);
    let words: Vec<_> = ended.output.split_whitespace().filter(|&word| word != "-").collect();
    let after = md5(&expected);
    let facts = ["2", "67108864", "8388608", "4096"];
    let rest = [before.as_str(), "discarded", after.as_str()];
    assert_eq!(words[..7], [&facts[..], &rest].concat(), "{ended:?}");
    assert!(fs::read(disk.path()).unwrap() == expected);
    assert!(disk.as_file().metadata().unwrap().blocks() * 512 <= 48 << 20);
}

fn md5(bytes: &[u8]) -> String {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let output = Command::new("md5sum").arg(file.path()).output().unwrap().stdout;
    String::from_utf8(output).unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn both_queues_of_a_disk_work_through_io_uring() {
    let (mut guest, disk) = guest_with_disk(WORK_ON_DISK);
    guest.config.disks[0].queues = 2;
    guest.config.disks[0].engine = DiskEngine::IoUring;

    let ended = guest.run();

    assert_worked_on_disk(&ended, &disk);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn both_queues_of_a_disk_work_without_io_uring() {
    let (mut guest, disk) = guest_with_disk(WORK_ON_DISK);
    guest.config.disks[0].queues = 2;
    guest.config.disks[0].engine = DiskEngine::Sync;

    let ended = guest.run();

    assert_worked_on_disk(&ended, &disk);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_disk_is_as_slow_as_its_limit() {
    let (mut guest, _disk) = guest_with_disk(
        "read before rest < /proc/uptime
         dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null
         read after rest < /proc/uptime
         echo seconds: $(( ${after%.*} - ${before%.*} ))",
    );
    guest.config.disks[0].rate_limit = RateLimitConfig {
        bytes_per_second: Some(1 << 20),
        bytes_burst: Some(1),
        ..RateLimitConfig::default()
    };

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    let seconds: u64 = ended.output.split_whitespace().nth(1).unwrap().parse().unwrap();
    // The first request is not waited for, and the clock is cut to whole seconds.
    assert!((2..60).contains(&seconds), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_shares_a_directory_with_the_host() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("from-host"), "hello guest").unwrap();
    let mut guest = Guest::new(
        "mount -t virtiofs share /mnt && cat /mnt/from-host && echo hello host > /mnt/from-guest
         umount /mnt",
    );
    guest.config.shares = vec![ShareConfig::new("share", folder.path().into())];

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("hello guest"), "{ended:?}");
    assert_eq!(fs::read_to_string(folder.path().join("from-guest")).unwrap(), "hello host\n");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_does_all_kinds_of_things_to_files() {
    let folder = TempDir::new().unwrap();
    // The file server's thread may make these system calls and no others.
    let mut guest = Guest::new(
        "set -e; trap 'echo failed: $?' EXIT
         mount -t virtiofs share /mnt; cd /mnt
         mkdir folder; mkfifo fifo; mknod null c 1 3; ln -s file link; echo data > file; ln file hard
         chmod 4755 file; chown 7:7 file; chown -h 7:7 link; touch -t 200001010000 file; cat link
         echo more >> file; truncate -s 100 file; fallocate -l 8192 large; mv -f hard folder/moved
         dd if=/dev/zero of=large bs=64k count=40 conv=fsync,notrunc 2> /dev/null; sync
         cp large copy; cmp large copy; readlink link; stat -f . > /dev/null; df . > /dev/null
         mkdir /etc; echo guest:x:7:7::/:/bin/sh > /etc/passwd; chmod 777 .; su guest -c 'touch /mnt/owned'
         find . | xargs ls -ld; rm folder/moved; rmdir folder; rm -r copy fifo null link
         cd /; umount /mnt; mount -t virtiofs share /mnt; cat /mnt/file; umount /mnt
         trap - EXIT; echo done",
    );
    guest.config.shares = vec![ShareConfig::new("share", folder.path().into())];

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("done"), "{ended:?}");
    assert_eq!(fs::metadata(folder.path().join("large")).unwrap().len(), 40 << 16);
    assert_eq!(fs::metadata(folder.path().join("owned")).unwrap().uid(), 7);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_read_only_share_stays_as_it_is() {
    let folder = TempDir::new().unwrap();
    let mut guest = Guest::new("mount -t virtiofs share /mnt && touch /mnt/new; echo status $?");
    let share = ShareConfig::new("share", folder.path().into());
    guest.config.shares = vec![ShareConfig { read_only: true, ..share }];

    let ended = guest.run();

    assert!(ended.output.contains("status 1"), "{ended:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_has_a_socket_device() {
    let mut guest = Guest::new("ls -l /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/");
    guest.config.vsock = Some(VsockConfig { cid: 3, socket: None });

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("virtio2"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_reaches_the_host_over_its_network_interface() {
    let mut guest = Guest::new(
        "ip link set eth0 up; ip address add 192.168.231.2/24 dev eth0
         cat /sys/class/net/eth0/address; ping -c 2 192.168.231.1",
    );
    guest.config.nets = vec![NetConfig { vhost: VhostUse::Off, ..new_tap("vmmtest0") }];

    let vm = guest.start();
    give_address("vmmtest0", "192.168.231.1/24");
    let ended = wait(vm);

    assert!(ended.output.contains("02:00:00:00:12:34"), "{ended:?}");
    assert!(ended.output.contains(" 0% packet loss"), "{ended:?}");
}

/// Pings the host from each processor, which Linux gives the transmit queue of its own pair.
fn ping_from_two_processors(tap: &str, subnet: &str, vhost: VhostUse) {
    let mut guest = Guest::new(&format!(
        "ip link set eth0 up; ip address add {subnet}.2/24 dev eth0
         for pair in 0 1; do
           echo pair $pair is of processors $(cat /sys/class/net/eth0/queues/tx-$pair/xps_cpus)
         done
         for processors in 1 2; do taskset $processors ping -c 3 {subnet}.1; done
         dmesg | grep 'queue pairs'",
    ));
    guest.config.vcpus = 2;
    guest.config.nets = vec![NetConfig { queue_pairs: 2, vhost, ..new_tap(tap) }];

    let vm = guest.start();
    give_address(tap, &format!("{subnet}.1/24"));
    let ended = wait(vm);

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("pair 0 is of processors 1"), "{ended:?}");
    assert!(ended.output.contains("pair 1 is of processors 2"), "{ended:?}");
    assert_eq!(ended.output.matches(" 0% packet loss").count(), 2, "{ended:?}");
    assert!(!ended.output.contains("Fail to set num of queue pairs"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn two_processors_use_a_queue_pair_each() {
    ping_from_two_processors("vmmtest1", "192.168.232", VhostUse::Off);
}

#[test]
#[ignore = "needs KVM that boots Linux, and /dev/vhost-net"]
fn the_hosts_kernel_serves_a_queue_pair_of_each_processor() {
    ping_from_two_processors("vmmtest2", "192.168.233", VhostUse::On);
}

#[test]
#[ignore = "needs KVM that boots Linux, and /dev/vhost-net"]
fn a_new_driver_takes_over_from_the_old_one_in_the_hosts_kernel() {
    let mut guest = Guest::new(
        "ip link set eth0 up; ip address add 192.168.234.2/24 dev eth0; ping -c 1 192.168.234.1
         device=$(basename $(readlink /sys/class/net/eth0/device))
         cd /sys/bus/virtio/drivers/virtio_net; echo $device > unbind; echo $device > bind
         ip link set eth0 up; ip address add 192.168.234.2/24 dev eth0; ping -c 1 192.168.234.1",
    );
    guest.config.nets = vec![NetConfig { vhost: VhostUse::On, ..new_tap("vmmtest3") }];

    let vm = guest.start();
    give_address("vmmtest3", "192.168.234.1/24");
    let ended = wait(vm);

    assert_ended_by_guest(&ended);
    assert_eq!(ended.output.matches(" 0% packet loss").count(), 2, "{ended:?}");
}

/// Has a guest exchange 20 frames with the host, one after the other, over `net`.
fn assert_takes_seconds(net: NetConfig, subnet: &str, least: f64) {
    let mut guest = Guest::new(&format!(
        "ip link set eth0 up; ip address add {subnet}.2/24 dev eth0; ping -c 1 {subnet}.1
         read before rest < /proc/uptime
         for i in $(seq 20); do ping -q -c 1 {subnet}.1 || echo lost; done > /tmp-log
         read after rest < /proc/uptime
         grep lost /tmp-log; echo uptimes: $before $after"
    ));
    let tap = net.tap.clone();
    guest.config.nets = vec![net];

    let vm = guest.start();
    give_address(&tap, &format!("{subnet}.1/24"));
    let ended = wait(vm);

    assert!(!ended.output.contains("lost"), "{ended:?}");
    let uptimes = ended.output.split("uptimes: ").nth(1).expect("the guest tells the time");
    let uptimes: Vec<f64> =
        uptimes.split_whitespace().map_while(|word| word.parse().ok()).collect();
    assert!(uptimes[1] - uptimes[0] > least, "{ended:?}");
}

/// Four frames a second, each after the other: 20 of them take 4.75 s.
fn slow() -> RateLimitConfig {
    RateLimitConfig {
        operations_per_second: Some(4),
        operations_burst: Some(1),
        ..RateLimitConfig::default()
    }
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_transmits_no_more_than_its_limit() {
    let net = NetConfig { transmit_limit: slow(), ..new_tap("vmmtest4") };
    assert_takes_seconds(net, "192.168.235", 4.7);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_receives_no_more_than_its_limit() {
    let net = NetConfig { receive_limit: slow(), ..new_tap("vmmtest5") };
    assert_takes_seconds(net, "192.168.236", 4.7);
}

/// An interface on a tap that is made with the VM.
fn new_tap(name: &str) -> NetConfig {
    NetConfig { create: true, ..NetConfig::new(name, "02:00:00:00:12:34") }
}

fn give_address(tap: &str, address: &str) {
    let arguments = format!("address add {address} dev {tap}");
    for arguments in [arguments, format!("link set {tap} up")] {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success());
    }
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_paused_guest_goes_on_where_it_was() {
    let guest = Guest::new("echo before; sleep 1; echo after");
    let vm = guest.start();

    for _ in 0..20 {
        vm.pause();
        vm.resume();
    }
    let ended = wait(vm);

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("after"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_is_stopped_in_the_middle() {
    let guest = Guest::new("echo waiting; sleep 1000");
    let vm = guest.start();
    while !vm.console_tail().contains("waiting") {
        std::thread::yield_now();
    }

    vm.stop();

    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn early_messages_come_over_the_serial_port() {
    let mut guest = Guest::new("true");
    guest.config.console.serial = true;

    let vm = guest.start();
    while !vm.console_tail().contains("Linux version") {
        std::thread::yield_now();
    }

    let ended = wait(vm);
    assert_ended_by_guest(&ended);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_learns_the_size_of_its_terminal() {
    let guest = Guest::new(
        "echo waiting
         until stty size < /dev/hvc0 | grep -q '43 132'; do sleep 1; done; echo resized",
    );
    let vm = guest.start();
    while !vm.console_tail().contains("waiting") {
        std::thread::yield_now();
    }

    vm.resize_console(132, 43);

    let ended = wait(vm);
    assert!(ended.output.contains("resized"), "{ended:?}");
}
