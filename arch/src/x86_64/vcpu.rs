//! A vCPU at its first instruction: registers as the kernel's protocol wants them.
#![cfg(target_arch = "x86_64")]

mod cpuid;
mod hidden;
mod msrs;
pub mod segments;
mod state;

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs};

pub use self::state::State;
use super::layout;
use crate::machine::{Entry, Protocol};
use crate::{ArchError, Kvm, VcpuFd};

/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 2;
/// x87 control word after FNINIT: all exceptions masked, extended precision.
const FPU_CONTROL: u16 = 0x37f;
/// MXCSR at reset: all exceptions masked.
const MXCSR_DEFAULT: u32 = 0x1f80;

// The local APIC's pins for the legacy interrupt controller and for NMIs, their entries in the
// vector table, and the delivery modes that a PC's firmware leaves there (MP specification 1.4,
// section 3.6.2).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVERY_MODES: u32 = 0x700;
const DELIVER_EXTINT: u32 = 0x700;
const DELIVER_NMI: u32 = 0x400;

/// Sets up vCPU `index` of `vcpus`. The first one starts at its `entry`; KVM keeps the others, which
/// have none, waiting for the guest's INIT and SIPI, which set their registers.
pub fn reset(
    kvm: &Kvm,
    vcpu: &VcpuFd,
    index: u8,
    vcpus: u8,
    entry: Option<&Entry>,
) -> Result<(), ArchError> {
    cpuid::set(kvm, vcpu, index, vcpus)?;
    msrs::set(vcpu)?;
    set_apic_pins(vcpu)?;
    if let Some(entry) = entry {
        set_fpu(vcpu)?;
        segments::set(vcpu, entry.protocol)?;
        set_registers(vcpu, entry)?;
    }
    Ok(())
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

fn set_fpu(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let fpu = kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR_DEFAULT, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(ArchError::kvm("set the floating-point registers"))
}

fn set_apic_pins(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let mut apic = vcpu.get_lapic().map_err(ArchError::kvm("read the local APIC"))?;
    set_delivery(&mut apic, APIC_LVT_LINT0, DELIVER_EXTINT);
    set_delivery(&mut apic, APIC_LVT_LINT1, DELIVER_NMI);
    vcpu.set_lapic(&apic).map_err(ArchError::kvm("set the local APIC"))
}

fn set_delivery(apic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes = &mut apic.regs[register..register + 4];
    let old = u32::from_le_bytes(std::array::from_fn(|at| bytes[at].to_le_bytes()[0]));
    let new = (old & !DELIVERY_MODES | mode).to_le_bytes();
    for (byte, value) in bytes.iter_mut().zip(new) {
        *byte = i8::from_le_bytes([value]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delivery_mode_changes_and_nothing_else() {
        let mut apic = kvm_lapic_state::default();
        apic.regs[APIC_LVT_LINT1 + 2] = 1; // masked

        set_delivery(&mut apic, APIC_LVT_LINT1, DELIVER_NMI);

        assert_eq!(apic.regs[APIC_LVT_LINT1..][..4], [0, 4, 1, 0]);
    }
}
