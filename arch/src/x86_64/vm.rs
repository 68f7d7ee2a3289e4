//! What KVM must be told before the first vCPU: the guest pages it needs for itself.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::kvm_clock_data;

use super::layout;
use crate::{ArchError, VmFd};

/// Gives KVM the pages in which it emulates real mode on older Intel processors.
pub fn reserve_addresses(vm: &VmFd) -> Result<(), ArchError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(ArchError::kvm("set the identity map's address"))?;
    vm.set_tss_address(layout::TSS).map_err(ArchError::kvm("set the TSS' address"))
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
