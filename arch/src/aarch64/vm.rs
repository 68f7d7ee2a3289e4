//! What is asked of KVM for the whole machine: which kind of processor its vCPUs are.
#![cfg(target_arch = "aarch64")]

use kvm_bindings::{
    KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_SVE, kvm_vcpu_init,
};
use kvm_ioctls::Cap;

use crate::{ArchError, VmFd};

/// The processor that KVM prefers on this host, with what user space has to ask for: PSCI as of
/// version 0.2, and vectors and pointer authentication where the host has them.
pub fn processor(vm: &VmFd) -> Result<kvm_vcpu_init, ArchError> {
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init).map_err(ArchError::kvm("ask for the kind of processor"))?;
    let mut want = |feature: u32| init.features[0] |= 1 << feature;
    want(KVM_ARM_VCPU_PSCI_0_2);
    if vm.check_extension(Cap::ArmSve) {
        want(KVM_ARM_VCPU_SVE);
    }
    // KVM has both or none of them (KVM API, section 4.82).
    if vm.check_extension(Cap::ArmPtrAuthAddress) && vm.check_extension(Cap::ArmPtrAuthGeneric) {
        want(KVM_ARM_VCPU_PTRAUTH_ADDRESS);
        want(KVM_ARM_VCPU_PTRAUTH_GENERIC);
    }
    Ok(init)
}
