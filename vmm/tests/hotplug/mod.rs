//! vCPUs, disks and network interfaces come to a Linux guest while it runs, and go again.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vmm::{
    AttachError, Attachment, DiskConfig, Exit, NetConfig, RateLimitConfig, VhostUse, VmHandle,
};

use crate::guest::{Guest, wait};
use crate::{give_address, new_tap};

/// Generous, because the lab emulates a processor.
const PATIENCE: Duration = Duration::from_secs(100);

/// A shell in the driver's folder, with a list of the places that have no device bound.
const BIND: &str = "
cd /sys/bus/platform/drivers/virtio-mmio
names() { ls /sys/bus/platform/devices | grep -E 'virtio.mmio|LNRO0005' | sort -V; }
spare() { for name in $(names); do [ -e $name ] || echo $name; done; }
";

#[track_caller]
fn await_word(vm: &VmHandle, word: &str) {
    let start = Instant::now();
    while !vm.console_tail().contains(word) {
        assert!(start.elapsed() < PATIENCE, "no {word}: {}", vm.console_tail());
        thread::sleep(Duration::from_millis(10));
    }
}

/// A guest does not learn of what is attached to it: this tries until there is something to bind.
fn until_bound(nth: u32, then: &str) -> String {
    format!(
        "echo READY {nth}
         until name=$(spare | head -n 1); echo $name > bind; do sleep 1; done 2>/dev/null
         echo BOUND $name; {then}
         echo $name > unbind; echo UNBOUND {nth}
         "
    )
}

fn assert_attached(vm: &VmHandle, attachment: &Attachment) {
    let known = |name: &String| vm.console_tail().contains(&format!("BOUND {name}"));
    await_word(vm, "BOUND ");
    assert!(attachment.names.iter().any(known), "{attachment:?}: {}", vm.console_tail());
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn vcpus_come_online_once_they_are_granted_and_go_offline_again() {
    let mut guest = Guest::new(
        "count() { echo $1: $(grep -c ^processor /proc/cpuinfo) of \
         $(ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l); }
         cd /sys/devices/system/cpu; count START
         until stty size < /dev/hvc0 | grep -q '43 132'; do sleep 1; done
         for n in 1 2 3; do echo 1 > cpu$n/online; done; count GROWN
         for n in 1 2 3; do taskset $((1 << n)) sh -c \
         'i=0; while [ $i -lt 500 ]; do i=$((i+1)); done'; done; count USED
         for n in 1 2 3; do echo 0 > cpu$n/online; done; count SHRUNK
         echo 1 > cpu2/online; count AGAIN",
    );
    guest.config.max_vcpus = Some(4);
    let vm = guest.start();
    await_word(&vm, "START: 1 of 4");

    vm.grant_vcpus(4).unwrap();
    vm.resize_console(132, 43);
    let ended = wait(vm);

    for line in ["GROWN: 4 of 4", "USED: 4 of 4", "SHRUNK: 1 of 4", "AGAIN: 2 of 4"] {
        assert!(ended.output.contains(line), "{ended:?}");
    }
    assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_vcpu_that_is_not_granted_does_not_start_and_hurts_nobody() {
    let mut guest = Guest::new(
        "cd /sys/devices/system/cpu
         echo 1 > cpu1/online || echo REFUSED; grep -c ^processor /proc/cpuinfo",
    );
    guest.config.max_vcpus = Some(2);

    let ended = guest.run();

    assert!(ended.output.contains("REFUSED\n1\n"), "{ended:?}");
    assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_vcpu_that_the_guest_tried_too_early_starts_once_it_is_granted() {
    let mut guest = Guest::new(
        "cd /sys/devices/system/cpu
         echo 1 > cpu1/online || echo REFUSED
         until stty size < /dev/hvc0 | grep -q '43 132'; do sleep 1; done
         echo 1 > cpu1/online && taskset 2 echo STARTED",
    );
    guest.config.max_vcpus = Some(2);
    let vm = guest.start();
    await_word(&vm, "REFUSED");

    vm.grant_vcpus(2).unwrap();
    vm.resize_console(132, 43);
    let ended = wait(vm);

    assert!(ended.output.contains("STARTED"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_vcpu_that_came_later_pauses_with_the_others() {
    let mut guest = Guest::new(
        "echo START; until echo 1 > /sys/devices/system/cpu/cpu1/online; do sleep 1; done
         taskset 2 sh -c 'while true; do :; done' & sleep 1; echo SPINS; sleep 1000",
    );
    guest.config.max_vcpus = Some(2);
    let vm = guest.start();
    await_word(&vm, "START");
    vm.grant_vcpus(2).unwrap();
    await_word(&vm, "SPINS");

    for _ in 0..20 {
        vm.pause();
        vm.resume();
    }
    vm.stop();

    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_disk_comes_is_used_goes_and_another_one_comes() {
    let [first, second] = [b"first!!!", b"second!!"].map(|text| {
        let mut disk = NamedTempFile::new().unwrap();
        disk.write_all(&text.repeat(128 << 10)).unwrap();
        disk
    });
    let read = "head -c 8 /dev/vda; echo; cat /sys/block/vda/serial; echo
                echo written | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync 2>/dev/null";
    let mut guest = Guest::new(&format!("{BIND}{}{}", until_bound(1, read), until_bound(2, read)));
    guest.config.spare_slots = 1;
    let vm = guest.start();

    await_word(&vm, "READY 1");
    let attachment = vm.attach_disk(&DiskConfig::new("one", first.path().into())).unwrap();
    assert_attached(&vm, &attachment);
    await_word(&vm, "UNBOUND 1");
    vm.detach_disk("one").unwrap();
    let again = vm.attach_disk(&DiskConfig::new("two", second.path().into())).unwrap();
    let ended = wait(vm);

    assert_eq!(again, attachment);
    for text in ["first!!!\none\n", "second!!\ntwo\n"] {
        assert!(ended.output.contains(text), "{ended:?}");
    }
    for disk in [first, second] {
        assert_eq!(&fs::read(disk.path()).unwrap()[512..519], b"written");
    }
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn an_interface_comes_is_used_and_goes() {
    for (vhost, tap, subnet) in
        [(VhostUse::Off, "vmmhot0", "192.168.241"), (VhostUse::Auto, "vmmhot1", "192.168.242")]
    {
        let ping = format!(
            "ip link set eth0 up; ip address add {subnet}.2/24 dev eth0; ping -c 3 {subnet}.1"
        );
        let mut guest = Guest::new(&format!("{BIND}{}", until_bound(1, &ping)));
        guest.config.spare_slots = 1;
        let vm = guest.start();
        await_word(&vm, "READY 1");

        let net = NetConfig { vhost, ..new_tap(tap) };
        let attachment = vm.attach_net(&net).unwrap();
        give_address(tap, &format!("{subnet}.1/24"));
        assert_attached(&vm, &attachment);
        await_word(&vm, "UNBOUND 1");
        vm.detach_net(tap).unwrap();
        let ended = wait(vm);

        assert!(ended.output.contains(" 0% packet loss"), "{ended:?}");
    }
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_disk_that_is_taken_away_from_its_driver_hurts_only_who_uses_it() {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(64 << 20).unwrap();
    let mut guest = Guest::new(&format!(
        "{BIND} echo READY 1
         until name=$(spare | head -n 1); echo $name > bind; do sleep 1; done 2>/dev/null
         echo BOUND $name; (while true; do cat /dev/vda > /dev/null 2>&1; done) & sleep 3; echo ALIVE"
    ));
    guest.config.spare_slots = 1;
    let vm = guest.start();
    await_word(&vm, "READY 1");
    vm.attach_disk(&DiskConfig::new("one", disk.path().into())).unwrap();
    await_word(&vm, "BOUND");

    vm.detach_disk("one").unwrap();
    let ended = wait(vm);

    assert!(ended.output.contains("ALIVE"), "{ended:?}");
    assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_disk_that_is_taken_away_while_it_is_written_to_fails_the_writer_and_frees_its_place() {
    let [first, second] = [0xff, b'2'].map(|byte| {
        let mut disk = NamedTempFile::new().unwrap();
        disk.write_all(&vec![byte; 32 << 20]).unwrap();
        disk
    });
    let read = "head -c 8 /dev/vda; echo";
    let mut guest = Guest::new(&format!(
        "{BIND} echo READY 1
         until name=$(spare | head -n 1); echo $name > bind; do sleep 1; done 2>/dev/null
         dd if=/dev/zero of=/dev/vda bs=1M count=32 conv=fsync || echo WRITER FAILED
         until stty size < /dev/hvc0 | grep -q '43 132'; do sleep 1; done
         echo $name > unbind; echo UNBOUND 1
         {}",
        until_bound(2, read)
    ));
    guest.config.spare_slots = 1;
    let vm = guest.start();
    await_word(&vm, "READY 1");
    // Most of what is written waits in the queue.
    let rate_limit = RateLimitConfig { bytes_per_second: Some(1 << 20), ..Default::default() };
    let slow = DiskConfig { rate_limit, ..DiskConfig::new("one", first.path().into()) };
    vm.attach_disk(&slow).unwrap();
    let is_untouched = || {
        let mut byte = [0];
        first.as_file().read_exact_at(&mut byte, 0).unwrap();
        byte == [0xff]
    };
    let start = Instant::now();
    while is_untouched() {
        assert!(start.elapsed() < PATIENCE, "nothing is written: {}", vm.console_tail());
        thread::sleep(Duration::from_millis(10));
    }

    vm.detach_disk("one").unwrap();
    await_word(&vm, "WRITER FAILED");
    let second = DiskConfig::new("two", second.path().into());
    assert!(matches!(vm.attach_disk(&second), Err(AttachError::NoSlot { spare_slots: 1 })));
    vm.resize_console(132, 43);
    await_word(&vm, "UNBOUND 1");
    vm.attach_disk(&second).unwrap();
    let ended = wait(vm);

    assert!(ended.output.contains("22222222\n"), "{ended:?}");
    assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{ended:?}");
}
