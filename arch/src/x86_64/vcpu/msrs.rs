//! Model-specific registers that a PC's firmware sets and Linux relies on.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{Msrs, kvm_msr_entry};
use log::debug;

use crate::{ArchError, VcpuFd};

const MISC_ENABLE: u32 = 0x1a0;
/// Without it, Linux takes the fast string instructions for broken.
const MISC_ENABLE_FAST_STRINGS: u64 = 1;

const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets them all. A register this host does not have is left out: Linux does without.
pub fn set(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let wanted = wanted();
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).expect("a handful of registers");
        let done = vcpu.set_msrs(&msrs).map_err(ArchError::kvm("set model-specific registers"))?;
        // KVM stops at the first register it refuses, and says how many came before.
        if let Some(refused) = rest.get(done) {
            debug!("this host has no model-specific register {:#x}", refused.index);
        }
        rest = rest.get(done + 1..).unwrap_or(&[]);
    }
    Ok(())
}

fn wanted() -> [kvm_msr_entry; 2] {
    [
        entry(MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        entry(MTRR_DEFAULT_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK),
    ]
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}
