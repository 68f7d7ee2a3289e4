//! What KVM must be told before the first vCPU: the guest pages it needs for itself, and what it need
//! not emulate.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};

use super::layout;
use crate::{ArchError, VmFd};

/// Gives KVM the pages in which it emulates real mode on older Intel processors.
pub fn reserve_addresses(vm: &VmFd) -> Result<(), ArchError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(ArchError::kvm("set the identity map's address"))?;
    vm.set_tss_address(layout::TSS).map_err(ArchError::kvm("set the TSS' address"))
}

/// Has KVM leave the performance counters out, which CPUID hides: to keep the host's and the guest's
/// apart costs time at every exit. KVM of Linux before 5.18 cannot, and then only hides them.
pub fn leave_out_counters(vm: &VmFd) -> Result<(), ArchError> {
    let offered = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(offered).is_ok_and(|offered| offered & KVM_PMU_CAP_DISABLE != 0) {
        let mut counters = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
        counters.args[0] = KVM_PMU_CAP_DISABLE.into();
        vm.enable_cap(&counters).map_err(ArchError::kvm("leave out the performance counters"))?;
    }
    Ok(())
}
