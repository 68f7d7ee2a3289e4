//! Linux guests find the processor and the clocks that KVM makes for them, however they are entered.

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vmm::{BootProtocol, Exit};

use crate::guest::{Ended, Guest, wait};

/// Features of a processor, as Linux names them, that no guest is to have.
const HIDDEN: [&str; 14] = [
    "vmx",
    "smx",
    "svm",
    "monitor",
    "mwaitx",
    "waitpkg",
    "sgx",
    "sgx_lc",
    "intel_pt",
    "arch_perfmon",
    "perfctr_core",
    "perfctr_nb",
    "ibs",
    "arch_lbr",
];

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_has_the_clocks_and_timers_of_kvm() {
    let ended = Guest::new(
        "cat /sys/devices/system/clocksource/clocksource0/available_clocksource
         cat /sys/devices/system/clockevents/clockevent0/current_device
         cat /sys/class/ptp/ptp0/clock_name
         [ -c /dev/ptp0 ] && echo a clock to ask
         dmesg | grep -i x2apic",
    )
    .run();

    assert!(ended.output.contains("kvm-clock"), "{ended:?}");
    assert!(ended.output.contains("lapic-deadline"), "{ended:?}");
    assert!(ended.output.contains("KVM virtual PTP"), "{ended:?}");
    assert!(ended.output.contains("a clock to ask"), "{ended:?}");
    assert!(ended.output.contains("x2apic"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_sees_nothing_of_what_only_the_host_is_for() {
    let ended = Guest::new("grep -m 1 ^flags /proc/cpuinfo").run();

    let flags: Vec<_> = ended.output.split_whitespace().collect();
    assert!(flags.contains(&"hypervisor") && flags.contains(&"x2apic"), "{ended:?}");
    for hidden in HIDDEN {
        assert!(!flags.contains(&hidden), "{hidden} in {ended:?}");
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

/// What a guest that is entered by `protocol` says of its memory, command line and initrd.
fn entered_by(protocol: BootProtocol) -> Ended {
    let mut guest = Guest::new("cat /proc/cmdline; grep -c ^processor /proc/cpuinfo");
    guest.config.boot.protocol = protocol;
    guest.config.boot.cmdline.push_str(" a.word=here");
    guest.config.vcpus = 2;
    let ended = guest.run();
    assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{ended:?}");
    ended
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_vmlinux_boots_by_its_pvh_entry() {
    let ended = entered_by(BootProtocol::Pvh);

    assert!(ended.output.contains("a.word=here\n2\n"), "{ended:?}");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_vmlinux_boots_by_its_64_bit_entry() {
    let ended = entered_by(BootProtocol::Linux);

    assert!(ended.output.contains("a.word=here\n2\n"), "{ended:?}");
}
