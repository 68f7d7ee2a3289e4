//! Where a vCPU stands: read out of KVM, kept as plain data, and given to a fresh vCPU.
#![cfg(target_arch = "aarch64")]

use kvm_bindings::{
    KVM_REG_ARM64, KVM_REG_ARM64_SVE, KVM_REG_SIZE_MASK, KVM_REG_SIZE_SHIFT, KVM_REG_SIZE_U512,
    RegList, kvm_mp_state, kvm_vcpu_events,
};
use serde::{Deserialize, Serialize};

use crate::aarch64::vm;
use crate::{ArchError, VcpuFd, VmFd};

/// More registers than KVM has of a vCPU: what its list holds at most.
const MOST_REGISTERS: usize = 500;

/// Which lengths of vectors a vCPU has, which must be known before all else of vectors (KVM API,
/// section 4.68).
const VECTOR_LENGTHS: u64 = KVM_REG_ARM64 | KVM_REG_SIZE_U512 | KVM_REG_ARM64_SVE as u64 | 0xffff;

/// Everything about a vCPU that its guest could miss.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// Running, or waiting to be started by another vCPU.
    mp_state: kvm_mp_state,
    /// All that KVM lists, in its order: core, floating point, system and firmware registers, timers.
    registers: Vec<Register>,
    /// A system error that has not reached the guest, with its syndrome where the host has such.
    system_error: Option<Option<u64>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Register {
    id: u64,
    value: Vec<u8>,
}

impl State {
    /// Reads where `vcpu` stands.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, ArchError> {
        let mp_state = vcpu.get_mp_state().map_err(ArchError::kvm("read whether a vCPU runs"))?;
        let mut list = RegList::new(MOST_REGISTERS).expect("no more than the list can hold");
        vcpu.get_reg_list(&mut list).map_err(ArchError::kvm("list a vCPU's registers"))?;
        let ids = list.as_slice().iter();
        let registers = ids.map(|id| Register::of(vcpu, *id)).collect::<Result<_, _>>()?;
        let events =
            vcpu.get_vcpu_events().map_err(ArchError::kvm("read a vCPU's events"))?.exception;
        let syndrome = (events.serror_has_esr != 0).then_some(events.serror_esr);
        let system_error = (events.serror_pending != 0).then_some(syndrome);
        Ok(State { mp_state, registers, system_error })
    }

    /// Makes the fresh `vcpu` go on from here.
    pub fn apply(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), ArchError> {
        let init = vm::processor(vm)?;
        vcpu.vcpu_init(&init).map_err(ArchError::kvm("initialize a vCPU"))?;
        let (lengths, rest): (Vec<_>, Vec<_>) =
            self.registers.iter().partition(|register| register.id == VECTOR_LENGTHS);
        lengths.iter().try_for_each(|register| register.apply(vcpu))?;
        super::finalize(vcpu, &init)?;
        super::stolen::tell(vcpu)?;
        rest.iter().try_for_each(|register| register.apply(vcpu))?;
        let mut events = kvm_vcpu_events::default();
        if let Some(syndrome) = self.system_error {
            events.exception.serror_pending = 1;
            events.exception.serror_has_esr = u8::from(syndrome.is_some());
            events.exception.serror_esr = syndrome.unwrap_or(0);
        }
        vcpu.set_vcpu_events(&events).map_err(ArchError::kvm("set a vCPU's events"))?;
        vcpu.set_mp_state(self.mp_state).map_err(ArchError::kvm("set whether a vCPU runs"))
    }
}

impl Register {
    fn of(vcpu: &VcpuFd, id: u64) -> Result<Self, ArchError> {
        let mut value = vec![0; bytes(id)];
        vcpu.get_one_reg(id, &mut value).map_err(ArchError::kvm("read a register"))?;
        Ok(Register { id, value })
    }

    fn apply(&self, vcpu: &VcpuFd) -> Result<(), ArchError> {
        if self.value.len() == bytes(self.id) && vcpu.set_one_reg(self.id, &self.value).is_ok() {
            return Ok(());
        }
        // Some say what the host is, and may be read only.
        match Register::of(vcpu, self.id) {
            Ok(own) if own.value == self.value => Ok(()),
            _ => Err(ArchError::Register { id: self.id }),
        }
    }
}

/// Size of the register `id`, in bytes.
fn bytes(id: u64) -> usize {
    1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)
}
