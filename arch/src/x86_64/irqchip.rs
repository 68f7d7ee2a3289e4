//! The interrupt controllers of a PC and its timer, all inside KVM.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use crate::{ArchError, VmFd};

/// The interrupt controllers that belong to no vCPU.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Creates the two PICs, the IOAPIC, and with each vCPU its local APIC; and the timer.
pub fn create(vm: &VmFd) -> Result<(), ArchError> {
    vm.create_irq_chip().map_err(ArchError::kvm("create the interrupt controllers"))?;
    // A kernel without kvmclock calibrates its clock by polling the speaker port: without the
    // dummy, every poll is an exit to us.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(ArchError::kvm("create the interval timer"))
}

/// Where the interrupt controllers outside the vCPUs and the timer stand.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// The first PIC, the second one, and the IOAPIC.
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl State {
    /// Reads it.
    pub fn of(vm: &VmFd) -> Result<Self, ArchError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(ArchError::kvm("read an interrupt controller"))?;
        }
        let pit = vm.get_pit2().map_err(ArchError::kvm("read the interval timer"))?;
        Ok(State { chips, pit })
    }

    /// Gives it to fresh ones.
    pub fn apply(&self, vm: &VmFd) -> Result<(), ArchError> {
        // The timer first: setting it may make it raise its line.
        vm.set_pit2(&self.pit).map_err(ArchError::kvm("set the interval timer"))?;
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(ArchError::kvm("set an interrupt controller"))?;
        }
        Ok(())
    }
}
