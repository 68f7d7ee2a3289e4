//! What KVM must be told before the first vCPU: the guest pages it needs for itself, and what the
//! guest shall not have.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_clock_data, kvm_enable_cap};

use super::layout;
use crate::{ArchError, VmFd};

/// Gives KVM the pages in which it emulates real mode on older Intel processors.
pub fn reserve_addresses(vm: &VmFd) -> Result<(), ArchError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(ArchError::kvm("set the identity map's address"))?;
    vm.set_tss_address(layout::TSS).map_err(ArchError::kvm("set the TSS' address"))
}

/// Leaves out the performance counters, with which a guest could watch its neighbours and which cost
/// time at every exit. CPUID alone hides only Intel's: AMD's first four have no bit there. Kernels
/// before 5.18 cannot do it (KVM API, section 8.35).
pub fn leave_out_counters(vm: &VmFd) -> Result<(), ArchError> {
    let possible = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if !u32::try_from(possible).is_ok_and(|bits| bits & KVM_PMU_CAP_DISABLE != 0) {
        return Ok(());
    }
    let mut capability = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    capability.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&capability).map_err(ArchError::kvm("leave out the performance counters"))
}

/// Reads the clock the guest's kvmclock is made of, in nanoseconds.
pub fn save_clock(vm: &VmFd) -> Result<kvm_clock_data, ArchError> {
    vm.get_clock().map_err(ArchError::kvm("read the clock"))
}

/// Sets the clock to where it stood: for the guest no time has passed.
pub fn restore_clock(vm: &VmFd, saved: &kvm_clock_data) -> Result<(), ArchError> {
    // What else was read describes the host of that time, and KVM takes none of it back.
    let clock = kvm_clock_data { clock: saved.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(ArchError::kvm("set the clock"))
}
