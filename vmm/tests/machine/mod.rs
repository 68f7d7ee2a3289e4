//! Linux guests find the processor and the clocks that KVM makes for them, however they are entered.

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use arch::expected;
use arch::machine::Protocol;
use vmm::{BootProtocol, Exit};

use crate::guest::{Guest, wait};

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_has_the_clocks_and_timers_of_kvm() {
    let ended = Guest::new(
        "cat /sys/devices/system/clocksource/clocksource0/available_clocksource
         cat /sys/devices/system/clockevents/clockevent0/current_device
         cat /sys/class/ptp/ptp0/clock_name
         [ -c /dev/ptp0 ] && echo a clock to ask",
    )
    .run();

    for clock in expected::CLOCKS {
        assert!(ended.output.contains(clock), "no {clock}: {ended:?}");
    }
    assert!(ended.output.contains("a clock to ask"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_sees_nothing_of_what_only_the_host_is_for() {
    let ended = Guest::new("grep -m 1 -i -E '^(flags|features)' /proc/cpuinfo").run();

    let flags: Vec<_> = ended.output.split_whitespace().collect();
    for feature in expected::FEATURES {
        assert!(flags.contains(feature), "no {feature} in {ended:?}");
    }
    for hidden in expected::HIDDEN_FEATURES {
        assert!(!flags.contains(hidden), "{hidden} in {ended:?}");
    }
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_learns_how_much_time_the_host_took() {
    let busy = AtomicBool::new(true);
    let guest = Guest::new(
        "for i in $(seq 200000); do :; done
         read cpu user nice system idle iowait irq softirq steal rest < /proc/stat
         echo stolen: $steal",
    );

    let ended = thread::scope(|scope| {
        let processors = thread::available_parallelism().unwrap().get();
        for _ in 0..2 * processors {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    hint::spin_loop();
                }
            });
        }
        let ended = wait(guest.start());
        busy.store(false, Ordering::Relaxed);
        ended
    });

    let stolen = ended.output.split("stolen: ").nth(1).expect("the guest says how much");
    let ticks: u64 = stolen.split_whitespace().next().unwrap().parse().unwrap();
    assert!(ticks > 0, "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn sixty_four_processors_come_up() {
    let mut guest = Guest::new("echo processors: $(grep -c ^processor /proc/cpuinfo)");
    guest.config.vcpus = 64;
    guest.config.memory.size_mib = 512;
    // They share the two processors of the lab.
    guest.patience = Duration::from_secs(600);

    let ended = guest.run();

    assert!(ended.output.contains("processors: 64"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_kernel_boots_by_every_entry_that_it_has() {
    for protocol in expected::PROTOCOLS {
        let mut guest = Guest::new("cat /proc/cmdline; grep -c ^processor /proc/cpuinfo");
        guest.config.boot.protocol = match protocol {
            Protocol::Linux => BootProtocol::Linux,
            Protocol::Pvh => BootProtocol::Pvh,
        };
        guest.config.boot.cmdline.push_str(" a.word=here");
        guest.config.vcpus = 2;

        let ended = guest.run();

        assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{protocol:?}: {ended:?}");
        assert!(ended.output.contains("a.word=here\n2\n"), "{protocol:?}: {ended:?}");
    }
}
