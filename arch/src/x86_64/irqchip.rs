//! The interrupt controllers of a PC, all inside KVM.
//!
//! There is no interval timer beside them: Linux has not looked at one since 5.5 where the local APIC's timer
//! counts in cycles of a clock whose rate the hypervisor tells, and each would be a kernel thread of the host.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use crate::{ArchError, VmFd};

/// The interrupt controllers that belong to no vCPU.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Creates the two PICs, the IOAPIC, and with each vCPU its local APIC.
pub fn create(vm: &VmFd) -> Result<(), ArchError> {
    vm.create_irq_chip().map_err(ArchError::kvm("create the interrupt controllers"))
}

/// Where the interrupt controllers outside the vCPUs stand: the first PIC, the second one, and the IOAPIC.
#[derive(Debug, Serialize, Deserialize)]
pub struct State([kvm_irqchip; 3]);

impl State {
    /// Reads it.
    pub fn of(vm: &VmFd) -> Result<Self, ArchError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(ArchError::kvm("read an interrupt controller"))?;
        }
        Ok(State(chips))
    }

    /// Gives it to fresh ones.
    pub fn apply(&self, vm: &VmFd) -> Result<(), ArchError> {
        for chip in &self.0 {
            vm.set_irqchip(chip).map_err(ArchError::kvm("set an interrupt controller"))?;
        }
        Ok(())
    }
}
