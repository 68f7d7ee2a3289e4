//! Linux guests find every device of their machine, use it, and end their machine cleanly.

mod guest;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use guest::{Ended, Guest, wait};
use tempfile::{NamedTempFile, TempDir};
use vmm::{DiskConfig, Exit, NetConfig, ShareConfig, VsockConfig};

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
    guest.config.disks =
        vec![DiskConfig { id: "data".into(), path: disk.path().into(), read_only: false }];

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    let words: Vec<_> = ended.output.split_whitespace().take(3).collect();
    assert_eq!(words, ["data", "2048", "dddd"], "{ended:?}");
    assert_eq!(&fs::read(disk.path()).unwrap()[512..519], b"written");
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
    guest.config.shares =
        vec![ShareConfig { tag: "share".into(), path: folder.path().into(), read_only: false }];

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
    guest.config.shares =
        vec![ShareConfig { tag: "share".into(), path: folder.path().into(), read_only: false }];

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
    guest.config.shares =
        vec![ShareConfig { tag: "share".into(), path: folder.path().into(), read_only: true }];

    let ended = guest.run();

    assert!(ended.output.contains("status 1"), "{ended:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_has_a_socket_device() {
    let mut guest = Guest::new("ls -l /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/");
    guest.config.vsock = Some(VsockConfig { cid: 3 });

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
    guest.config.nets = vec![NetConfig { tap: "vmmtest0".into(), mac: "02:00:00:00:12:34".into() }];

    let vm = guest.start();
    for arguments in ["address add 192.168.231.1/24 dev vmmtest0", "link set vmmtest0 up"] {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success());
    }
    let ended = wait(vm);

    assert!(ended.output.contains("02:00:00:00:12:34"), "{ended:?}");
    assert!(ended.output.contains(" 0% packet loss"), "{ended:?}");
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
