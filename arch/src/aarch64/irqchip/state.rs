//! Where the interrupt controller stands: read out of KVM, kept as plain data, given to a fresh one.
#![cfg(target_arch = "aarch64")]

use kvm_bindings::KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
use serde::{Deserialize, Serialize};

use super::{Gic, registers};
use crate::ArchError;
use crate::aarch64::layout::GicVersion;

/// Everything about the interrupt controller that its guest could miss.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    version: GicVersion,
    /// In the order in which they are to be written.
    registers: Vec<Register>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Register {
    group: u32,
    attr: u64,
    value: u64,
}

impl State {
    /// Reads where `gic` stands; no vCPU may run.
    pub fn of(gic: &Gic) -> Result<Self, ArchError> {
        let priority_bits = priority_bits(gic)?;
        let read = |(group, attr)| {
            gic.get(group, attr)
                .map(|value| Register { group, attr, value })
                .map_err(ArchError::kvm("read the interrupt controller"))
        };
        let names = registers::names(gic.version, gic.vcpus, priority_bits);
        let registers = names.into_iter().map(read).collect::<Result<_, _>>()?;
        Ok(State { version: gic.version, registers })
    }

    /// Makes the fresh `gic`, all of whose vCPUs are initialized, go on from here.
    pub fn apply(&self, gic: &Gic) -> Result<(), ArchError> {
        if self.version != gic.version {
            let (saved, host) = (self.version, gic.version);
            return Err(ArchError::InterruptController { saved, host });
        }
        for Register { group, attr, value } in &self.registers {
            gic.set(*group, *attr, *value)
                .map_err(ArchError::kvm("set the interrupt controller"))?;
        }
        Ok(())
    }
}

/// How many bits a priority has: one more than PRIbits says (GIC architecture specification, section
/// 12.2.6).
fn priority_bits(gic: &Gic) -> Result<u32, ArchError> {
    if gic.version == GicVersion::V2 {
        return Ok(0);
    }
    let name = registers::of_vcpu(gic.version, 0, registers::ICC_CTLR);
    let control = gic
        .get(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, name)
        .map_err(ArchError::kvm("read how many priorities there are"))?;
    let bits = u32::try_from(control >> 8 & 7).expect("three bits");
    Ok(bits + 1)
}
