//! A machine of this host's architecture runs a few instructions of its own.
#![cfg(target_arch = "x86_64")]

use std::fs::File;
use std::io::Write;

use arch::machine::{BootFiles, Entry, Exit, Machine, Space};
use arch::x86_64::layout::power;
use arch::{Arch, Host, Kvm, VcpuFd, VmFd};
use kvm_bindings::kvm_userspace_memory_region;
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
            Host::reset_vcpu(&self.kvm, vcpu, index, vcpus, &entry).unwrap();
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
