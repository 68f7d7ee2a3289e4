//! The interrupt controllers of a PC and its timer, all inside KVM.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};

use crate::{ArchError, VmFd};

/// Creates the two PICs, the IOAPIC, and with each vCPU its local APIC; and the timer.
pub fn create(vm: &VmFd) -> Result<(), ArchError> {
    vm.create_irq_chip().map_err(ArchError::kvm("create the interrupt controllers"))?;
    // A kernel without kvmclock calibrates its clock by polling the speaker port: without the
    // dummy, every poll is an exit to us.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(ArchError::kvm("create the interval timer"))
}
