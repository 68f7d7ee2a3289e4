//! What is asked of KVM for the whole machine, which kind of processor its vCPUs are, and of the processor.
#![cfg(target_arch = "aarch64")]

use std::arch::asm;
use std::sync::atomic::AtomicU32;

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

/// Writes `word` from the caches to memory: a guest that maps it as device memory reads it there, unless
/// the processor overrides what guests say of memory (FEAT_S2FWB).
pub fn clean(word: &AtomicU32) {
    // SAFETY: cleaning a line of the cache changes nothing that a program can see, and Linux lets its
    // programs do so; the barrier makes it happen before the guest is told of what changed.
    unsafe {
        asm!("dc cvac, {}", "dsb sy", in(reg) word.as_ptr(), options(nostack, preserves_flags))
    };
}
