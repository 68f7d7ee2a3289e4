//! An x86_64 machine runs a few instructions of its own.
#![cfg(target_arch = "x86_64")]

mod guest;

use arch::machine::{Exit, Space};
use arch::x86_64::layout::power;
use arch::{Arch, Host};
use guest::{Guest, rebuilt};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, Msrs, kvm_irqchip, kvm_msr_entry};
use vm_memory::Bytes;

/// `mov dx, port; mov al, value; out dx, al`.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_first_processor_runs_in_64_bit_mode() {
    const COM1: u16 = 0x3f8;
    let mut guest = Guest::new(1);
    // mov rax, 0x6b << 32; shr rax, 32; mov dx, 0x3f8; out dx, al: 'k' in 64-bit mode only.
    let mut code = vec![0x48, 0xb8, 0, 0, 0, 0, 0x6b, 0, 0, 0, 0x48, 0xc1, 0xe8, 0x20];
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]);
    guest.boot(&code);

    let exit = guest.run();

    let Exit::Write { space: Space::Port, address, data } = exit else { panic!("{exit:?}") };
    assert_eq!((address, data), (COM1.into(), &b"k"[..]));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_first_processor_finds_the_zero_page() {
    let mut guest = Guest::new(1);
    // mov ebx, [rsi + 0x228]; mov al, [rbx]; mov dx, 0x3f8; out dx, al: the first letter of the
    // command line.
    guest.boot(&[0x8b, 0x9e, 0x28, 0x02, 0, 0, 0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee]);

    let exit = guest.run();

    assert!(matches!(exit, Exit::Write { data: b"q", .. }), "{exit:?}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_powers_itself_off() {
    let mut guest = Guest::new(1);
    guest.boot(&out(power::CONTROL_PORT, power::POWER_OFF));

    assert!(matches!(guest.run(), Exit::Shutdown));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_resets_itself() {
    let mut guest = Guest::new(1);
    guest.boot(&out(power::RESET_PORT, power::RESET));

    assert!(matches!(guest.run(), Exit::Reset));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_without_handlers_ends_in_a_triple_fault() {
    let mut guest = Guest::new(1);
    guest.boot(&[0x0f, 0x0b]); // ud2, with an empty interrupt table

    assert!(matches!(guest.run(), Exit::TripleFault));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_processor_of_a_large_machine_is_set_up() {
    let mut guest = Guest::new(8);

    guest.boot(&out(power::RESET_PORT, power::RESET));

    assert!(matches!(guest.run(), Exit::Reset));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_has_the_interrupt_lines_of_its_devices() {
    let guest = Guest::new(1);

    for gsi in Host::device_gsis() {
        guest.vm.set_irq_line(gsi, true).unwrap();
        guest.vm.set_irq_line(gsi, false).unwrap();
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_code_lies_where_the_file_says() {
    let mut guest = Guest::new(1);

    let entry = guest.boot(&[0xf4]);

    assert_eq!(guest.memory.read_obj::<u8>(entry.address).unwrap(), 0xf4);
}

/// Counts in RBX and writes the count to the UART, for ever; says so in LSTAR (MSR 0xc0000082).
const COUNT: &[u8] = &[
    0xb9, 0x82, 0x00, 0x00, 0xc0, // mov ecx, 0xc0000082
    0xb8, 0x34, 0x12, 0x00, 0x00, // mov eax, 0x1234
    0x31, 0xd2, // xor edx, edx
    0x0f, 0x30, // wrmsr
    0x31, 0xdb, // xor ebx, ebx
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xff, 0xc3, // again: inc ebx
    0x88, 0xd8, // mov al, bl
    0xee, // out dx, al
    0xeb, 0xf9, // jmp again
];

fn next_count(guest: &mut Guest) -> u8 {
    match guest.run() {
        Exit::Write { data: &[count], .. } => count,
        exit => panic!("{exit:?}"),
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_processor_built_anew_goes_on_counting_where_the_old_one_was() {
    let mut old = Guest::new(2);
    old.boot(COUNT);
    let before: Vec<_> = (0..5).map(|_| next_count(&mut old)).collect();

    let mut new = rebuilt(&mut old);
    drop(old);
    let after: Vec<_> = (0..5).map(|_| next_count(&mut new)).collect();

    assert_eq!(before, [1, 2, 3, 4, 5]);
    assert_eq!(after, [6, 7, 8, 9, 10]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_registers_of_a_processor_survive() {
    const LSTAR: u32 = 0xc000_0082;
    let mut old = Guest::new(1);
    old.boot(COUNT);
    next_count(&mut old);

    let new = rebuilt(&mut old);

    let (old, new) = (&old.vcpus[0], &new.vcpus[0]);
    assert_eq!(new.get_regs().unwrap(), old.get_regs().unwrap());
    assert_eq!(new.get_sregs().unwrap(), old.get_sregs().unwrap());
    assert_eq!(new.get_lapic().unwrap().regs, old.get_lapic().unwrap().regs);
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: LSTAR, ..Default::default() }]);
    let msrs = msrs.as_mut().unwrap();
    assert_eq!(new.get_msrs(msrs).unwrap(), 1);
    assert_eq!(msrs.as_slice()[0].data, 0x1234);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_interrupt_controllers_survive() {
    const REDIRECTION_OF_LINE_5: usize = 5;
    let mut old = Guest::new(1);
    old.boot(COUNT);
    let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    old.vm.get_irqchip(&mut ioapic).unwrap();
    // SAFETY: the chip is the IOAPIC, and plain numbers are always valid.
    unsafe { ioapic.chip.ioapic.redirtbl[REDIRECTION_OF_LINE_5].bits = 0x1_0041 };
    old.vm.set_irqchip(&ioapic).unwrap();

    let new = rebuilt(&mut old);

    new.vm.get_irqchip(&mut ioapic).unwrap();
    // SAFETY: as above.
    let redirection = unsafe { ioapic.chip.ioapic.redirtbl[REDIRECTION_OF_LINE_5].bits };
    assert_eq!(redirection, 0x1_0041);
}
