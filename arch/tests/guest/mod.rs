//! A machine of this host's architecture, made without the VMM.

use std::io::Write;

use arch::machine::{BootFiles, Entry, Exit, Machine};
use arch::{Arch, Host, Kvm, VcpuFd, VmFd, payload};
use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

const RAM_BYTES: u64 = 32 << 20;

/// A machine on its way to its first exit, or beyond.
pub struct Guest {
    pub kvm: Kvm,
    pub vm: VmFd,
    pub board: <Host as Arch>::Board,
    pub vcpus: Vec<VcpuFd>,
    pub memory: GuestMemoryMmap,
}

impl Guest {
    /// A machine with `vcpus` processors and empty memory.
    pub fn new(vcpus: u8) -> Self {
        let kvm = Kvm::new().expect("/dev/kvm");
        let vm = kvm.create_vm().unwrap();
        let memory = memory(&vm);
        let mut board = Host::before_vcpus(&kvm, &vm).unwrap();
        let fds = (0..vcpus).map(|index| vm.create_vcpu(index.into()).unwrap()).collect();
        Host::after_vcpus(&mut board, &vm, vcpus).unwrap();
        Self { kvm, vm, board, vcpus: fds, memory }
    }

    /// Loads a kernel that is `code`, and resets all processors to its start.
    pub fn boot(&mut self, code: &[u8]) -> Entry {
        let mut kernel = tempfile::tempfile().unwrap();
        kernel.write_all(&payload::kernel(code)).unwrap();
        let mut boot = BootFiles { kernel, initrd: None, protocol: None };
        let entry = Host::load(&self.memory, &mut boot).unwrap();
        let vcpus = u8::try_from(self.vcpus.len()).unwrap();
        let machine = Machine { vcpus, cmdline: "quiet", entry, devices: &[] };
        Host::describe(&self.board, &self.memory, &machine).unwrap();
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            let entry = (index == 0).then_some(&entry);
            Host::reset_vcpu(&self.kvm, &self.vm, vcpu, index, vcpus, entry).unwrap();
        }
        entry
    }

    /// Runs the first processor up to its next exit.
    pub fn run(&mut self) -> Exit<'_> {
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

/// What is known of a machine but its memory, written and read again.
pub fn saved(guest: &mut Guest) -> (Vec<<Host as Arch>::VcpuState>, <Host as Arch>::BoardState) {
    // The last write to a port is over for the processor once it was entered again.
    guest.vcpus[0].set_kvm_immediate_exit(1);
    assert_eq!(guest.vcpus[0].run().unwrap_err().errno(), libc::EINTR);
    guest.vcpus[0].set_kvm_immediate_exit(0);
    let vcpus = guest.vcpus.iter().map(|vcpu| Host::save_vcpu(&guest.kvm, vcpu).unwrap());
    let vcpus = postcard::to_stdvec(&vcpus.collect::<Vec<_>>()).unwrap();
    let board = postcard::to_stdvec(&Host::save_board(&guest.board, &guest.vm).unwrap()).unwrap();
    (postcard::from_bytes(&vcpus).unwrap(), postcard::from_bytes(&board).unwrap())
}

/// A new machine with the memory of `old` that goes on where `old` stands.
pub fn rebuilt(old: &mut Guest) -> Guest {
    let (vcpus, board) = saved(old);
    let new = Guest::new(old.vcpus.len().try_into().unwrap());
    for region in old.memory.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        old.memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        new.memory.write_slice(&bytes, region.start_addr()).unwrap();
    }
    for (vcpu, state) in new.vcpus.iter().zip(&vcpus) {
        Host::restore_vcpu(&new.vm, vcpu, state).unwrap();
    }
    Host::restore_board(&new.board, &new.vm, &board).unwrap();
    new
}
