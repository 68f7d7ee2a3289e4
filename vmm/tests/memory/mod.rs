//! Memory that a Linux guest does not need goes back to the host.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use vmm::{BalloonConfig, VmHandle};

use crate::guest::{Guest, wait};

/// Size of the guests of these tests.
const RAM_MIB: u32 = 256;

/// What a guest fills and then frees.
const FILLED_MIB: u64 = 100;

/// How much of that has to come back: all but what lies scattered between pages in use.
const COMES_BACK_MIB: u64 = 80;

/// Generous, because the lab emulates a processor.
const PATIENCE: Duration = Duration::from_secs(100);

/// Fills memory with a file, and frees it when the host's patience allows it to look.
const FILL_AND_FREE: &str = "mkdir /fill; mount -t tmpfs -o size=200m fill /fill
     dd if=/dev/zero of=/fill/file bs=1M count=100 2>/dev/null; echo FILLED; sleep 3
     rm /fill/file; echo FREED; sleep 100";

fn guest(script: &str, balloon: BalloonConfig) -> Guest {
    let mut guest = Guest::new(script);
    guest.config.memory.size_mib = RAM_MIB;
    guest.config.balloon = Some(balloon);
    guest
}

/// How much of the guest's RAM is resident on the host, in MiB. One machine at a time.
fn resident_mib() -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut resident_kib, mut kib_of_mapping) = (0, 0);
    for line in smaps.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["Rss:", kib, _] => kib_of_mapping = kib.parse().unwrap(),
            // RAM is what no core dump has, in one mapping or several.
            ["VmFlags:", ref flags @ ..] if flags.contains(&"dd") => resident_kib += kib_of_mapping,
            _ => {}
        }
    }
    resident_kib >> 10
}

/// Waits until `vm` is in the state the host is looking for.
#[track_caller]
fn await_state(vm: &VmHandle, state: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        let so_far = resident_mib();
        assert!(
            start.elapsed() < PATIENCE,
            "not reached: {state}; {so_far} MiB are resident; the guest printed:\n{}",
            vm.console_tail()
        );
        thread::yield_now();
    }
}

/// Waits until the guest printed `word`.
#[track_caller]
fn await_word(vm: &VmHandle, word: &str) {
    await_state(vm, word, || vm.console_tail().contains(word));
}

/// Waits until the guest has filled and freed memory; returns how much was resident before, in MiB.
fn filled_and_freed(vm: &VmHandle) -> u64 {
    await_word(vm, "FILLED");
    let full = resident_mib();
    assert!(full >= FILLED_MIB, "{full} MiB are resident");
    await_word(vm, "FREED");
    full
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn memory_the_guest_frees_comes_back_without_anyone_asking() {
    let balloon = BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() };
    let vm = guest(FILL_AND_FREE, balloon).start();

    let full = filled_and_freed(&vm);

    await_state(&vm, "memory comes back", || resident_mib() + COMES_BACK_MIB <= full);
    assert!(vm.balloon().unwrap().given_back_bytes() >= COMES_BACK_MIB << 20);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn free_memory_comes_back_when_the_host_asks_for_it() {
    let balloon = BalloonConfig { free_page_hinting: true, ..BalloonConfig::default() };
    let vm = guest(FILL_AND_FREE, balloon).start();

    let full = filled_and_freed(&vm);
    assert!(resident_mib() + COMES_BACK_MIB > full);
    assert!(vm.balloon().unwrap().ask_for_free_pages());

    await_state(&vm, "memory comes back", || {
        // Linux tells of whole blocks only: some of it may not have come together at first.
        thread::sleep(Duration::from_secs(1));
        vm.balloon().unwrap().ask_for_free_pages();
        resident_mib() + COMES_BACK_MIB <= full
    });
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_balloon_grows_and_shrinks_with_its_target() {
    let vm = guest(FILL_AND_FREE, BalloonConfig::default()).start();
    let balloon = vm.balloon().unwrap();

    let full = filled_and_freed(&vm);
    balloon.set_target_mib(150);
    await_state(&vm, "the balloon is full", || balloon.size_mib() == 150);
    let inflated = resident_mib();
    balloon.set_target_mib(10);
    await_state(&vm, "the balloon is small", || balloon.size_mib() == 10);

    assert!(inflated + COMES_BACK_MIB <= full, "{inflated} MiB of {full} MiB are resident");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_without_memory_takes_it_back_from_the_balloon() {
    let balloon =
        BalloonConfig { target_mib: 180, deflate_on_oom: true, ..BalloonConfig::default() };
    let vm = guest(
        "while [ $(grep MemFree /proc/meminfo | tr -dc 0-9) -gt 60000 ]; do sleep 1; done
         mkdir /fill; mount -t tmpfs -o size=200m fill /fill
         dd if=/dev/zero of=/fill/file bs=1M count=100 2>/dev/null; ls -s /fill; echo SURVIVED",
        balloon,
    )
    .start();

    let ended = wait(vm);

    assert!(ended.output.contains("SURVIVED"), "{ended:?}");
    assert!(ended.output.contains("102400 file"), "{ended:?}");
}

/// What the guest says its memory is, in MiB, each second.
const SAY_TOTAL: &str = "echo 1 > /proc/sys/kernel/printk
     while true; do echo TOTAL $(($(grep MemTotal /proc/meminfo | tr -dc 0-9) / 1024)) MiB; sleep 1
     done";

/// What the guest last said its memory is, in MiB.
fn total_mib(vm: &VmHandle) -> u64 {
    let tail = vm.console_tail();
    let last = tail.rsplit("TOTAL ").find_map(|rest| rest.split_once(" MiB")?.0.parse().ok());
    last.unwrap_or(0)
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_grows_and_shrinks() {
    let mut guest = Guest::new(SAY_TOTAL);
    guest.config.memory.size_mib = RAM_MIB;
    guest.config.memory.pluggable_mib = 512;
    let vm = guest.start();
    let memory = vm.pluggable_memory().unwrap();
    await_word(&vm, "TOTAL");
    let before = total_mib(&vm);

    memory.request_mib(384).unwrap();
    await_state(&vm, "the guest is large", || total_mib(&vm) >= before + 350);
    assert_eq!(memory.plugged_mib(), 384);
    memory.request_mib(0).unwrap();

    await_state(&vm, "the guest is small", || total_mib(&vm) <= before + 10);
    assert_eq!(memory.plugged_mib(), 0);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn plugged_memory_holds_what_the_rest_does_not() {
    let script = format!(
        "mkdir /fill; mount -t tmpfs -o size=500m fill /fill
         until grep -q 'MemTotal: *[5-9].....' /proc/meminfo; do sleep 1; done
         dd if=/dev/zero of=/fill/file bs=1M count=400 2>/dev/null; ls -s /fill; echo SURVIVED
         rm /fill/file; {SAY_TOTAL}"
    );
    let mut guest = Guest::new(&script);
    guest.config.memory.size_mib = RAM_MIB;
    guest.config.memory.pluggable_mib = 512;
    let vm = guest.start();
    let memory = vm.pluggable_memory().unwrap();

    memory.request_mib(512).unwrap();
    await_word(&vm, "SURVIVED");
    let full = resident_mib();
    memory.request_mib(0).unwrap();
    await_state(&vm, "memory comes back", || memory.plugged_mib() == 0);

    assert!(vm.console_tail().contains("409600 file"), "{}", vm.console_tail());
    assert!(full >= 400, "{full} MiB are resident");
    assert!(resident_mib() <= u64::from(RAM_MIB), "{} MiB are resident", resident_mib());
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_tells_how_it_uses_its_memory() {
    let balloon = BalloonConfig { statistics: true, ..BalloonConfig::default() };
    let vm = guest("echo HERE; sleep 100", balloon).start();
    await_word(&vm, "HERE");

    let statistics = vm.balloon().unwrap().statistics(PATIENCE).unwrap().unwrap();

    let total_mib = statistics.total_bytes.unwrap() >> 20;
    assert!((200..=u64::from(RAM_MIB)).contains(&total_mib), "{statistics:?}");
    assert!(statistics.free_bytes < statistics.total_bytes, "{statistics:?}");
}
