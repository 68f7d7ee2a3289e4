//! Model-specific registers: those that a PC's firmware sets and Linux relies on, and all of them.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use log::debug;

use crate::{ArchError, Kvm, VcpuFd};

const MISC_ENABLE: u32 = 0x1a0;
/// Without it, Linux takes the fast string instructions for broken.
const MISC_ENABLE_FAST_STRINGS: u64 = 1;

const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// The time stamp counter.
pub const TSC: u32 = 0x10;

/// Far enough from any time stamp for KVM not to take two for the same.
const AGE: u64 = 1 << 60;

/// When the local APIC's timer shall fire, in terms of the time stamp counter.
const TSC_DEADLINE: u32 = 0x6e0;

/// Sets those of a PC's firmware. A register this host does not have is left out: Linux does without.
pub fn set(vcpu: &VcpuFd) -> Result<(), ArchError> {
    set_all(vcpu, &wanted(), |_| Ok(()))
}

/// Reads every register that KVM has of a vCPU.
pub fn save(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, ArchError> {
    let list =
        kvm.get_msr_index_list().map_err(ArchError::kvm("list the model-specific registers"))?;
    let mut indices = list.as_slice().to_vec();
    // It counts only once the time stamp counter is set.
    indices.sort_by_key(|&index| index == TSC_DEADLINE);
    let wanted: Vec<_> = indices.into_iter().map(|index| entry(index, 0)).collect();
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut msrs = Msrs::from_entries(chunk).expect("no more than KVM's limit");
        let done =
            vcpu.get_msrs(&mut msrs).map_err(ArchError::kvm("read model-specific registers"))?;
        saved.extend_from_slice(&msrs.as_slice()[..done]);
        // KVM stops at the first register it refuses: CPUID says that this vCPU does not have it.
        let refused = usize::from(done < chunk.len());
        rest = &rest[done + refused..];
    }
    Ok(saved)
}

/// Keeps KVM from taking what is set as the time stamp next for the one of a machine that has just been
/// made, if that is less than a second away: the guest's clock would go back by that.
pub fn forget_time(vcpu: &VcpuFd) -> Result<(), ArchError> {
    set_all(vcpu, &[entry(TSC, AGE)], |_| Ok(()))
}

/// Sets the registers that [`save`] read.
pub fn restore(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), ArchError> {
    // A register that is not there, or that cannot be written, may be left at zero.
    set_all(vcpu, saved, |refused| match refused.data {
        0 => Ok(()),
        value => Err(ArchError::Msr { index: refused.index, value }),
    })
}

/// Sets `entries` in their order; `refuse` decides about those that KVM refuses.
fn set_all(
    vcpu: &VcpuFd,
    entries: &[kvm_msr_entry],
    refuse: impl Fn(&kvm_msr_entry) -> Result<(), ArchError>,
) -> Result<(), ArchError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let msrs = Msrs::from_entries(chunk).expect("no more than KVM's limit");
        let done = vcpu.set_msrs(&msrs).map_err(ArchError::kvm("set model-specific registers"))?;
        rest = &rest[done..];
        // KVM stops at the first register it refuses, and says how many came before.
        if done < chunk.len() {
            debug!("this host has no model-specific register {:#x}", rest[0].index);
            refuse(&rest[0])?;
            rest = &rest[1..];
        }
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
