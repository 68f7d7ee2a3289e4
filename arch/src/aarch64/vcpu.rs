//! A vCPU at its first instruction: registers as the kernel's boot protocol wants them.
#![cfg(target_arch = "aarch64")]

mod state;
mod stolen;

use std::mem::offset_of;

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_SVE, KVM_MP_STATE_STOPPED, KVM_REG_ARM_CORE,
    KVM_REG_ARM64, KVM_REG_SIZE_U64, kvm_mp_state, kvm_regs, kvm_vcpu_init,
};

pub use self::state::State;
use super::{layout, vm};
use crate::machine::Entry;
use crate::{ArchError, VcpuFd, VmFd};

/// Sets up a vCPU. The first one starts at its `entry`; KVM keeps the others, which have none, waiting
/// for the guest's CPU_ON, which sets their registers.
pub fn reset(vm: &VmFd, vcpu: &VcpuFd, entry: Option<&Entry>) -> Result<(), ArchError> {
    let mut init = vm::processor(vm)?;
    if entry.is_none() {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    vcpu.vcpu_init(&init).map_err(ArchError::kvm("initialize a vCPU"))?;
    finalize(vcpu, &init)?;
    stolen::tell(vcpu)?;
    if let Some(entry) = entry {
        // The rest is as Documentation/arch/arm64/booting.rst wants it: KVM resets a vCPU to EL1 with
        // all interrupts masked, the MMU off, and zero in x1 to x3.
        set_core(vcpu, offset_of!(kvm_regs, regs.pc), entry.address.0)?;
        set_core(vcpu, offset_of!(kvm_regs, regs.regs), layout::RAM.0)?;
    }
    Ok(())
}

/// Powers a vCPU off that KVM takes for one that runs if the guest has called CPU_ON for it: it would
/// begin there long after the guest gave it up, and a second call would find it on already.
pub fn await_start(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let stopped = kvm_mp_state { mp_state: KVM_MP_STATE_STOPPED };
    vcpu.set_mp_state(stopped).map_err(ArchError::kvm("power a vCPU off"))
}

/// Fixes what a vCPU that was initialized as `init` says can be chosen once only: the lengths of its
/// vectors.
fn finalize(vcpu: &VcpuFd, init: &kvm_vcpu_init) -> Result<(), ArchError> {
    if init.features[0] & 1 << KVM_ARM_VCPU_SVE == 0 {
        return Ok(());
    }
    let feature = i32::try_from(KVM_ARM_VCPU_SVE).expect("features have small numbers");
    vcpu.vcpu_finalize(&feature).map_err(ArchError::kvm("fix the lengths of a vCPU's vectors"))
}

/// Sets the 64-bit core register that is `offset` bytes into `kvm_regs` (KVM API, section 4.68).
fn set_core(vcpu: &VcpuFd, offset: usize, value: u64) -> Result<(), ArchError> {
    let id = KVM_REG_ARM64
        | KVM_REG_SIZE_U64
        | u64::from(KVM_REG_ARM_CORE)
        | (offset / size_of::<u32>()) as u64;
    vcpu.set_one_reg(id, &value.to_le_bytes()).map(drop).map_err(ArchError::kvm("set a register"))
}
