//! Stolen time: how long a vCPU wanted to run, and the host ran something else (Arm DEN0057A).
#![cfg(target_arch = "aarch64")]

use kvm_bindings::{
    KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG,
    KVM_REG_SIZE_U64, kvm_device_attr,
};

use crate::aarch64::layout;
use crate::{ArchError, VcpuFd};

/// The register with a vCPU's affinity: op0 3, op1 0, CRn 0, CRm 0, op2 5.
const MPIDR_EL1: u64 = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | 3 << 14 | 5;

/// The levels of affinity that tell vCPUs apart.
const AFFINITY: u64 = 0xffff;

/// Has KVM tell the guest of `vcpu`'s stolen time, where the host keeps count (KVM API,
/// Documentation/virt/kvm/devices/vcpu.rst, section 3).
pub fn tell(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let mut affinity = [0; 8];
    vcpu.get_one_reg(MPIDR_EL1, &mut affinity).map_err(ArchError::kvm("read a vCPU's affinity"))?;
    let affinity = u64::from_le_bytes(affinity) & AFFINITY;
    let place = layout::stolen_time(u32::try_from(affinity).expect("it has 16 bits"));
    let attribute = kvm_device_attr {
        group: KVM_ARM_VCPU_PVTIME_CTRL,
        attr: KVM_ARM_VCPU_PVTIME_IPA.into(),
        addr: (&raw const place).addr() as u64,
        flags: 0,
    };
    if vcpu.has_device_attr(&attribute).is_err() {
        return Ok(());
    }
    vcpu.set_device_attr(&attribute).map_err(ArchError::kvm("tell a vCPU of stolen time"))
}
