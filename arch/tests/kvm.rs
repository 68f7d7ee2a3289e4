//! A machine of this host's architecture runs a few instructions of its own.
#![cfg(target_arch = "x86_64")]

use std::fs::File;
use std::io::Write;

use arch::machine::{BootFiles, Entry, Exit, Machine, Space};
use arch::x86_64::layout::power;
use arch::{Arch, Host, Kvm, VcpuFd, VmFd};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, Msrs, kvm_irqchip, kvm_msr_entry, kvm_userspace_memory_region,
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

const RAM_BYTES: u64 = 32 << 20;
const CODE: GuestAddress = GuestAddress(0x10_0000);

struct Guest {
    kvm: Kvm,
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    memory: GuestMemoryMmap,
}

impl Guest {
    /// A machine with `vcpus` processors and empty memory.
    fn new(vcpus: u8) -> Self {
        let kvm = Kvm::new().expect("/dev/kvm");
        let vm = kvm.create_vm().unwrap();
        let memory = memory(&vm);
        Host::before_vcpus(&kvm, &vm).unwrap();
        let fds = (0..vcpus).map(|index| vm.create_vcpu(index.into()).unwrap()).collect();
        Host::after_vcpus(&vm, vcpus).unwrap();
        Self { kvm, vm, vcpus: fds, memory }
    }

    /// Loads a vmlinux that consists of `code`, and resets all processors to its start.
    fn boot(&mut self, code: &[u8]) -> Entry {
        let mut boot = BootFiles { kernel: vmlinux(code), initrd: None, protocol: None };
        let entry = Host::load(&self.memory, &mut boot).unwrap();
        let vcpus = u8::try_from(self.vcpus.len()).unwrap();
        let machine = Machine { vcpus, cmdline: "quiet", entry, devices: &[] };
        Host::describe(&self.memory, &machine).unwrap();
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            Host::reset_vcpu(&self.kvm, vcpu, index, vcpus, (index == 0).then_some(&entry))
                .unwrap();
        }
        entry
    }

    /// Runs the first processor up to its next exit.
    fn run(&mut self) -> Exit<'_> {
        let exit = self.vcpus[0].run().unwrap();
        Host::translate(exit, &self.memory).expect("an exit that a guest can cause")
    }
}

fn memory(vm: &VmFd) -> GuestMemoryMmap {
    let regions: Vec<_> = Host::memory_map(RAM_BYTES)
        .regions
        .iter()
        .map(|(base, size)| (*base, usize::try_from(*size).unwrap()))
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped for as long as `memory` lives, which the guest does not
        // outlive.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
    }
    memory
}

/// An ELF file with one segment, `code`, that starts there.
fn vmlinux(code: &[u8]) -> File {
    let size = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [CODE.0, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [120, CODE.0, CODE.0, size, size, 0x1000] {
        elf.extend(u64::to_le_bytes(word));
    }
    elf.extend(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file
}

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

/// What is known of a machine but its memory, written and read again.
fn saved(guest: &mut Guest) -> (Vec<<Host as Arch>::VcpuState>, <Host as Arch>::BoardState) {
    // The last write to a port is over for the processor once it was entered again.
    guest.vcpus[0].set_kvm_immediate_exit(1);
    assert_eq!(guest.vcpus[0].run().unwrap_err().errno(), libc::EINTR);
    guest.vcpus[0].set_kvm_immediate_exit(0);
    let vcpus = guest.vcpus.iter().map(|vcpu| Host::save_vcpu(&guest.kvm, vcpu).unwrap());
    let vcpus = postcard::to_stdvec(&vcpus.collect::<Vec<_>>()).unwrap();
    let board = postcard::to_stdvec(&Host::save_board(&guest.vm).unwrap()).unwrap();
    (postcard::from_bytes(&vcpus).unwrap(), postcard::from_bytes(&board).unwrap())
}

/// A new machine with the memory of `old` that goes on where `old` stands.
fn rebuilt(old: &mut Guest) -> Guest {
    let (vcpus, board) = saved(old);
    let new = Guest::new(old.vcpus.len().try_into().unwrap());
    let mut bytes = vec![0; RAM_BYTES.try_into().unwrap()];
    old.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    new.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    for (vcpu, state) in new.vcpus.iter().zip(&vcpus) {
        Host::restore_vcpu(vcpu, state).unwrap();
    }
    Host::restore_board(&new.vm, &board).unwrap();
    new
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
fn the_interrupt_controllers_and_the_timer_survive() {
    const REDIRECTION_OF_LINE_5: usize = 5;
    let mut old = Guest::new(1);
    old.boot(COUNT);
    let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    old.vm.get_irqchip(&mut ioapic).unwrap();
    // SAFETY: the chip is the IOAPIC, and plain numbers are always valid.
    unsafe { ioapic.chip.ioapic.redirtbl[REDIRECTION_OF_LINE_5].bits = 0x1_0041 };
    old.vm.set_irqchip(&ioapic).unwrap();
    let mut pit = old.vm.get_pit2().unwrap();
    pit.channels[0].count = 11932;
    pit.channels[0].mode = 2;
    old.vm.set_pit2(&pit).unwrap();

    let new = rebuilt(&mut old);

    new.vm.get_irqchip(&mut ioapic).unwrap();
    // SAFETY: as above.
    let redirection = unsafe { ioapic.chip.ioapic.redirtbl[REDIRECTION_OF_LINE_5].bits };
    assert_eq!(redirection, 0x1_0041);
    let channel = new.vm.get_pit2().unwrap().channels[0];
    assert_eq!((channel.count, channel.mode), (11932, 2));
}
