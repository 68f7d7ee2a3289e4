//! An aarch64 machine runs a few instructions of its own.
#![cfg(target_arch = "aarch64")]

mod guest;

use arch::aarch64::layout;
use arch::machine::{Exit, Space};
use arch::{Arch, Host};
use guest::{Guest, rebuilt, saved};
use vm_memory::{Address, Bytes};
use vmm_sys_util::eventfd::EventFd;

/// What the machine's tree begins with (Devicetree Specification 0.4, section 5.2).
const TREE_MAGIC: u32 = 0xd00d_feed;

/// `mov w0, #0x84000000`, `movk w0, #function`, `hvc #0`: a call of PSCI.
const fn psci(function: u32) -> [u32; 3] {
    [0x52b0_8000, 0x7280_0000 | function << 5, 0xd400_0002]
}
const SYSTEM_OFF: u32 = 8;
const SYSTEM_RESET: u32 = 9;

/// Writes the first word of what x0 points at to the UART.
const SHOW_TREE: [u32; 3] = [
    0xb940_0001, // ldr w1, [x0]
    0xd2a1_6002, // mov x2, #0xb000000
    0xb900_0041, // str w1, [x2]
];

/// Asks the hypervisor where it tells of stolen time, and writes that to the UART.
const STOLEN_TIME: [u32; 5] = [
    0x52b8_a000, // mov w0, #0xc5000000
    0x7280_0420, // movk w0, #0x21
    0xd400_0002, // hvc #0
    0xd2a1_6002, // mov x2, #0xb000000
    0xb900_0040, // str w0, [x2]
];

/// Counts in w1 and writes the count to the UART, for ever.
const COUNT: [u32; 5] = [
    0xd2a1_6002, // mov x2, #0xb000000
    0x5280_0001, // mov w1, #0
    0x1100_0421, // again: add w1, w1, #1
    0x3900_0041, // strb w1, [x2]
    0x17ff_fffe, // b again
];

/// Keeps 0x1234 in a system register, and writes that to the UART, for ever.
const SYSTEM_REGISTER: [u32; 6] = [
    0xd282_4683, // mov x3, #0x1234
    0xd518_d083, // msr tpidr_el1, x3
    0xd2a1_6002, // mov x2, #0xb000000
    0xd538_d084, // again: mrs x4, tpidr_el1
    0xb900_0044, // str w4, [x2]
    0x17ff_fffe, // b again
];

/// Enables eight interrupts of devices, and writes to the UART for ever.
const ENABLE_INTERRUPTS: [u32; 6] = [
    0xd2a1_0005, // mov x5, #0x8000000
    0x529f_e006, // mov w6, #0xff00
    0xb901_04a6, // str w6, [x5, #0x104]
    0xd2a1_6002, // mov x2, #0xb000000
    0x3900_0046, // again: strb w6, [x2]
    0x17ff_ffff, // b again
];

/// Instructions as they lie in memory.
fn bytes(code: &[u32]) -> Vec<u8> {
    code.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The next write to the UART, as a number.
fn next_write(guest: &mut Guest) -> u32 {
    match guest.run() {
        Exit::Write { space: Space::Memory, address: layout::UART, data } => {
            data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
        }
        exit => panic!("{exit:?}"),
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_first_processor_finds_the_device_tree() {
    let mut guest = Guest::new(1);
    guest.boot(&bytes(&SHOW_TREE));

    assert_eq!(next_write(&mut guest).swap_bytes(), TREE_MAGIC);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_powers_itself_off() {
    let mut guest = Guest::new(1);
    guest.boot(&bytes(&psci(SYSTEM_OFF)));

    assert!(matches!(guest.run(), Exit::Shutdown));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_resets_itself() {
    let mut guest = Guest::new(1);
    guest.boot(&bytes(&psci(SYSTEM_RESET)));

    assert!(matches!(guest.run(), Exit::Reset));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_processor_of_a_large_machine_is_set_up() {
    let mut guest = Guest::new(8);

    guest.boot(&bytes(&psci(SYSTEM_RESET)));

    assert!(matches!(guest.run(), Exit::Reset));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_is_told_of_stolen_time() {
    let mut guest = Guest::new(1);
    guest.boot(&bytes(&STOLEN_TIME));

    assert_eq!(u64::from(next_write(&mut guest)), layout::STOLEN_TIME.0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_has_the_interrupt_lines_of_its_devices() {
    let guest = Guest::new(1);

    for gsi in Host::device_gsis() {
        let line = EventFd::new(0).unwrap();
        guest.vm.register_irqfd(&line, gsi).unwrap();
        line.write(1).unwrap();
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_code_lies_where_the_file_says() {
    let mut guest = Guest::new(1);

    let entry = guest.boot(&bytes(&COUNT));

    let first: u32 = guest.memory.read_obj(entry.address.unchecked_add(64)).unwrap();
    assert_eq!(first, COUNT[0]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_processor_built_anew_goes_on_counting_where_the_old_one_was() {
    let mut old = Guest::new(2);
    old.boot(&bytes(&COUNT));
    let before: Vec<_> = (0..5).map(|_| next_write(&mut old)).collect();

    let mut new = rebuilt(&mut old);
    drop(old);
    let after: Vec<_> = (0..5).map(|_| next_write(&mut new)).collect();

    assert_eq!(before, [1, 2, 3, 4, 5]);
    assert_eq!(after, [6, 7, 8, 9, 10]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn system_registers_survive() {
    let mut old = Guest::new(1);
    old.boot(&bytes(&SYSTEM_REGISTER));
    assert_eq!(next_write(&mut old), 0x1234);

    let mut new = rebuilt(&mut old);

    assert_eq!(next_write(&mut new), 0x1234);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_interrupt_controller_survives() {
    let state = |guest: &mut Guest| postcard::to_stdvec(&saved(guest).1).unwrap();
    let mut fresh = Guest::new(2);
    fresh.boot(&bytes(&COUNT));
    next_write(&mut fresh);
    let mut old = Guest::new(2);
    old.boot(&bytes(&ENABLE_INTERRUPTS));
    next_write(&mut old);
    let before = state(&mut old);

    let mut new = rebuilt(&mut old);

    assert_ne!(before, state(&mut fresh));
    assert_eq!(before, state(&mut new));
}
