//! Where a vCPU stands: read out of KVM, kept as plain data, and given to a fresh vCPU.
#![cfg(target_arch = "x86_64")]

use std::fmt;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, KvmNestedStateBuffer};
use log::debug;
use serde::{Deserialize, Serialize};

use super::msrs;
use crate::{ArchError, Kvm, VcpuFd};

/// In the register with the APIC's address: this is the processor that booted (Intel SDM, volume 3,
/// section 11.4.4).
const BOOTSTRAP_PROCESSOR: u64 = 1 << 8;

/// Everything about a vCPU that its guest could miss.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of the time stamp counter; 0 where the host does not know it.
    tsc_khz: u32,
    /// Running, halted, or waiting to be started by another vCPU.
    mp_state: kvm_mp_state,
    registers: kvm_regs,
    segments: kvm_sregs,
    /// Floating point and everything newer that XSAVE covers.
    extended: kvm_xsave,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    local_apic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    /// Exceptions and interrupts on their way.
    events: kvm_vcpu_events,
    /// What the guest does with virtualization of its own, on hosts that let it.
    nested: Option<Box<Nested>>,
}

#[derive(Serialize, Deserialize)]
struct Nested(KvmNestedStateBuffer);

impl fmt::Debug for Nested {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Nested").field("flags", &self.0.flags).finish_non_exhaustive()
    }
}

impl State {
    /// Reads where `vcpu` stands.
    pub fn of(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, ArchError> {
        // First, because KVM takes pending INIT and SIPI into account here, which changes the rest.
        let mp_state = vcpu.get_mp_state().map_err(ArchError::kvm("read whether a vCPU runs"))?;
        let cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(ArchError::kvm("read a vCPU's CPUID"))?;
        Ok(State {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            mp_state,
            registers: vcpu.get_regs().map_err(ArchError::kvm("read the registers"))?,
            segments: vcpu.get_sregs().map_err(ArchError::kvm("read the segments"))?,
            extended: vcpu.get_xsave().map_err(ArchError::kvm("read the extended registers"))?,
            extended_control: vcpu
                .get_xcrs()
                .map_err(ArchError::kvm("read the extended control registers"))?,
            debug: vcpu.get_debug_regs().map_err(ArchError::kvm("read the debug registers"))?,
            local_apic: vcpu.get_lapic().map_err(ArchError::kvm("read the local APIC"))?,
            msrs: msrs::save(kvm, vcpu)?,
            // Last, after whatever may still have made KVM change it.
            events: vcpu.get_vcpu_events().map_err(ArchError::kvm("read a vCPU's events"))?,
            nested: Nested::of(kvm, vcpu)?,
        })
    }

    /// Makes the fresh `vcpu` go on from here.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), ArchError> {
        // What a register may hold depends on CPUID, so that comes first.
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| ArchError::Kvm {
            step: "set CPUID: more entries than it takes",
            source: crate::kvm::Error::new(libc::E2BIG),
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(ArchError::kvm("set CPUID"))?;
        self.apply_frequency(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(ArchError::kvm("set whether a vCPU runs"))?;
        vcpu.set_regs(&self.registers).map_err(ArchError::kvm("set the registers"))?;
        vcpu.set_sregs(&self.segments).map_err(ArchError::kvm("set the segments"))?;
        // SAFETY: the structure holds what KVM_SET_XSAVE reads without AMX, and AMX is only there
        // for processes that ask the kernel for it, which this one does not.
        unsafe { vcpu.set_xsave(&self.extended) }
            .map_err(ArchError::kvm("set the extended registers"))?;
        vcpu.set_xcrs(&self.extended_control)
            .map_err(ArchError::kvm("set the extended control registers"))?;
        vcpu.set_debug_regs(&self.debug).map_err(ArchError::kvm("set the debug registers"))?;
        // After the segments, which say where it is and whether it is on; before the MSRs, whose
        // timer deadline counts only in the mode that the APIC is in.
        vcpu.set_lapic(&self.local_apic).map_err(ArchError::kvm("set the local APIC"))?;
        if self.segments.apic_base & BOOTSTRAP_PROCESSOR != 0 {
            msrs::forget_time(vcpu)?;
        }
        msrs::restore(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(ArchError::kvm("set a vCPU's events"))?;
        // Enters the guest of the guest, if the vCPU was there, on top of all that is set by now.
        if let Some(nested) = &self.nested {
            vcpu.set_nested_state(&nested.0).map_err(ArchError::kvm("set the nested state"))?;
        }
        // Tells a guest with kvmclock why its watchdogs heard nothing; others need not know.
        if let Err(error) = vcpu.kvmclock_ctrl() {
            debug!("the guest has no kvmclock to tell of the pause: {error}");
        }
        Ok(())
    }

    /// Lets the time stamp counter go on at its former pace, where the host has another.
    fn apply_frequency(&self, vcpu: &VcpuFd) -> Result<(), ArchError> {
        let same = self.tsc_khz == 0 || vcpu.get_tsc_khz() == Ok(self.tsc_khz);
        if same {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(ArchError::kvm("set the time stamp frequency"))
    }
}

impl Nested {
    fn of(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Option<Box<Self>>, ArchError> {
        if !kvm.check_extension(Cap::NestedState) {
            return Ok(None);
        }
        let mut nested = Box::new(Nested(KvmNestedStateBuffer::empty()));
        // The header alone, which KVM calls no state, says whether virtualization is on.
        vcpu.nested_state(&mut nested.0).map_err(ArchError::kvm("read the nested state"))?;
        Ok(Some(nested))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with one vCPU as it is after a reset.
    fn vcpu(kvm: &Kvm) -> (crate::VmFd, VcpuFd) {
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        (vm, vcpu)
    }

    fn time_stamp(state: &State) -> u64 {
        state.msrs.iter().find(|msr| msr.index == msrs::TSC).unwrap().data
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn the_time_stamp_of_a_young_machine_goes_on() {
        let kvm = Kvm::new().unwrap();
        let (_vm, old) = vcpu(&kvm);
        std::thread::sleep(std::time::Duration::from_millis(100));
        let saved = State::of(&kvm, &old).unwrap();
        let (_vm, new) = vcpu(&kvm);

        saved.apply(&new).unwrap();

        assert!(time_stamp(&State::of(&kvm, &new).unwrap()) >= time_stamp(&saved));
    }
}
