//! What KVM must be told before the first vCPU: the guest pages it needs for itself.
#![cfg(target_arch = "x86_64")]

use super::layout;
use crate::{ArchError, VmFd};

/// Gives KVM the pages in which it emulates real mode on older Intel processors.
pub fn reserve_addresses(vm: &VmFd) -> Result<(), ArchError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(ArchError::kvm("set the identity map's address"))?;
    vm.set_tss_address(layout::TSS).map_err(ArchError::kvm("set the TSS' address"))
}
