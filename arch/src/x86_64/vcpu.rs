//! A vCPU at its first instruction: registers as the kernel's protocol wants them.
#![cfg(target_arch = "x86_64")]

mod cpuid;
mod hidden;
mod msrs;
pub mod segments;
mod state;

use kvm_bindings::kvm_regs;

pub use self::state::State;
use super::layout;
use crate::machine::{Entry, Protocol};
use crate::{ArchError, Kvm, VcpuFd};

/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Sets up vCPU `index` of `vcpus`. The first one starts at its `entry`; KVM keeps the others, which
/// have none, waiting for the guest's INIT and SIPI, which set their registers. The rest stays
/// as KVM makes it: the floating-point unit as after FNINIT, and the local APIC as a PC's firmware leaves
/// it, with the first one's pin for the legacy interrupt controller open (KVM_X86_QUIRK_LINT0_REENABLED).
/// Each kernel programs the pins itself.
pub fn reset(
    kvm: &Kvm,
    vcpu: &VcpuFd,
    index: u8,
    vcpus: u8,
    entry: Option<&Entry>,
) -> Result<(), ArchError> {
    cpuid::set(kvm, vcpu, index, vcpus)?;
    msrs::set(vcpu)?;
    match entry {
        Some(entry) => {
            segments::set(vcpu, entry.protocol)?;
            set_registers(vcpu, entry)
        }
        None => introduce(vcpu),
    }
}

/// Makes KVM find the local APIC of a vCPU that comes while the guest runs: it looks for them anew when the
/// state of one is set, but not when one is made, and without that no INIT gets to it.
fn introduce(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let apic = vcpu.get_lapic().map_err(ArchError::kvm("read the local APIC"))?;
    vcpu.set_lapic(&apic).map_err(ArchError::kvm("set the local APIC"))
}

fn set_registers(vcpu: &VcpuFd, entry: &Entry) -> Result<(), ArchError> {
    let mut registers =
        kvm_regs { rip: entry.address.0, rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry.protocol {
        Protocol::Linux => registers.rsi = layout::ZERO_PAGE.0,
        Protocol::Pvh => registers.rbx = layout::START_INFO.0,
    }
    vcpu.set_regs(&registers).map_err(ArchError::kvm("set the registers"))
}
