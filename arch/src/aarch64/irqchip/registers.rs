//! Which registers a GIC has that a guest changes, in the order in which they are to be written.
#![cfg(target_arch = "aarch64")]

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CPUID_SHIFT, KVM_DEV_ARM_VGIC_GRP_CPU_REGS, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT, VGIC_LEVEL_INFO_LINE_LEVEL,
};

use super::INTERRUPTS;
use crate::aarch64::layout::{self, GicVersion, PRIVATE_INTERRUPTS};

/// `(group, attribute)` of a register in KVM's terms.
pub type Name = (u32, u64);

/// Registers with `bits` bits for each interrupt, from `offset` on.
struct Bank {
    offset: u32,
    bits: u32,
}

// Of the distributor, and the same of a redistributor for private interrupts (GIC architecture
// specification, sections 12.9 and 12.11): what an interrupt is, then whether it is on its way. KVM
// takes the second by the first.
const CONTROL: u32 = 0;
const GROUP: Bank = Bank { offset: 0x80, bits: 1 };
const ENABLE: Bank = Bank { offset: 0x100, bits: 1 };
const PENDING: Bank = Bank { offset: 0x200, bits: 1 };
const ACTIVE: Bank = Bank { offset: 0x300, bits: 1 };
const PRIORITY: Bank = Bank { offset: 0x400, bits: 8 };
const CONFIGURATION: Bank = Bank { offset: 0xc00, bits: 2 };
const KINDS: [Bank; 4] = [GROUP, ENABLE, CONFIGURATION, PRIORITY];
const STATES: [Bank; 2] = [PENDING, ACTIVE];
/// Which vCPU an interrupt goes to: of the distributor of a GICv3, and of a GICv2.
const ROUTE: Bank = Bank { offset: 0x6000, bits: 64 };
const TARGET: Bank = Bank { offset: 0x800, bits: 8 };
/// Software-generated interrupts on their way in a GICv2: a byte each, with a bit for each sender.
const SOFTWARE_PENDING: Bank = Bank { offset: 0xf20, bits: 8 };
const SOFTWARE_INTERRUPTS: u32 = 16;
/// From a redistributor's control frame to the one of its private interrupts.
const PRIVATE_FRAME: u32 = 0x1_0000;

/// The interface of a GICv2 to a vCPU: control, mask, both binary points and active priorities.
const INTERFACE: [u32; 8] = [0, 0x4, 0x8, 0x1c, 0xd0, 0xd4, 0xd8, 0xdc];

/// `ICC_CTLR_EL1`, which says how many bits a priority has.
pub const ICC_CTLR: u64 = system_register(12, 12, 4);
/// The other system registers of a GICv3: whether there are such, then what is on, the mask and both
/// binary points.
const ICC: [u64; 6] = [
    system_register(12, 12, 5),
    system_register(12, 12, 6),
    system_register(12, 12, 7),
    system_register(4, 6, 0),
    system_register(12, 8, 3),
    system_register(12, 12, 3),
];
/// `ICC_AP0R0_EL1` and `ICC_AP1R0_EL1`: active priorities, 32 in each register.
const ICC_ACTIVE: [u64; 2] = [system_register(12, 8, 4), system_register(12, 9, 0)];

/// A register of EL1 as KVM numbers it; all of the GIC's have the same first two parts.
const fn system_register(crn: u64, crm: u64, op2: u64) -> u64 {
    3 << 14 | crn << 7 | crm << 3 | op2
}

/// Those of a GIC of this `version` with `vcpus`, whose priorities have `priority_bits` bits.
pub fn names(version: GicVersion, vcpus: u8, priority_bits: u32) -> Vec<Name> {
    let mut names = vec![(KVM_DEV_ARM_VGIC_GRP_DIST_REGS, CONTROL.into())];
    match version {
        GicVersion::V3 => v3(&mut names, vcpus, priority_bits),
        GicVersion::V2 => v2(&mut names, vcpus),
    }
    names
}

/// `name` of vCPU `index`.
pub fn of_vcpu(version: GicVersion, index: u8, name: u64) -> u64 {
    match version {
        GicVersion::V3 => {
            u64::from(layout::affinity(index)) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT | name
        }
        GicVersion::V2 => u64::from(index) << KVM_DEV_ARM_VGIC_CPUID_SHIFT | name,
    }
}

fn v3(names: &mut Vec<Name>, vcpus: u8, priority_bits: u32) {
    let level = u64::from(VGIC_LEVEL_INFO_LINE_LEVEL) << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT;
    for index in 0..vcpus {
        let own = |name: u64| of_vcpu(GicVersion::V3, index, name);
        let redistributor = |offset: u32| (KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, own(offset.into()));
        let private = |bank: &Bank| {
            bank.offsets(0..PRIVATE_INTERRUPTS)
                .map(move |offset| redistributor(PRIVATE_FRAME + offset))
        };
        names.push(redistributor(CONTROL));
        names.extend(KINDS.iter().flat_map(private));
        names.push((KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, own(level)));
        names.extend(STATES.iter().flat_map(private));
    }
    let distributor = |offset: u32| (KVM_DEV_ARM_VGIC_GRP_DIST_REGS, u64::from(offset));
    let shared = |bank: &Bank| bank.offsets(PRIVATE_INTERRUPTS..INTERRUPTS).map(distributor);
    names.extend(KINDS.iter().chain([&ROUTE]).flat_map(shared));
    names.extend(
        (PRIVATE_INTERRUPTS..INTERRUPTS)
            .step_by(32)
            .map(|first| (KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, level | u64::from(first))),
    );
    names.extend(STATES.iter().flat_map(shared));
    // There is one register for every 32 priorities, and a bit less of them than they have bits.
    let active = 1 << priority_bits.saturating_sub(5);
    for index in 0..vcpus {
        let own =
            |name: u64| (KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, of_vcpu(GicVersion::V3, index, name));
        names.extend(ICC.iter().chain([&ICC_CTLR]).map(|name| own(*name)));
        names.extend(
            ICC_ACTIVE.iter().flat_map(|first| (0..active).map(move |next| own(first + next))),
        );
    }
}

fn v2(names: &mut Vec<Name>, vcpus: u8) {
    let distributor = |index: u8, offset: u32| {
        (KVM_DEV_ARM_VGIC_GRP_DIST_REGS, of_vcpu(GicVersion::V2, index, offset.into()))
    };
    for index in 0..vcpus {
        let private =
            |bank: &Bank| bank.offsets(0..PRIVATE_INTERRUPTS).map(move |at| distributor(index, at));
        names.extend(KINDS.iter().chain(&STATES).flat_map(private));
        let software = SOFTWARE_PENDING.offsets(0..SOFTWARE_INTERRUPTS);
        names.extend(software.map(|at| distributor(index, at)));
    }
    let shared =
        |bank: &Bank| bank.offsets(PRIVATE_INTERRUPTS..INTERRUPTS).map(|at| distributor(0, at));
    names.extend(KINDS.iter().chain([&TARGET]).chain(&STATES).flat_map(shared));
    for index in 0..vcpus {
        names.extend(INTERFACE.map(|offset| {
            (KVM_DEV_ARM_VGIC_GRP_CPU_REGS, of_vcpu(GicVersion::V2, index, offset.into()))
        }));
    }
}

impl Bank {
    /// Offsets of the 32-bit registers for `interrupts`.
    fn offsets(&self, interrupts: std::ops::Range<u32>) -> impl Iterator<Item = u32> + use<> {
        let at = |interrupt: u32| self.offset + interrupt * self.bits / 8;
        (at(interrupts.start)..at(interrupts.end)).step_by(size_of::<u32>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bank_starts_behind_the_private_interrupts() {
        let offsets: Vec<_> = ENABLE.offsets(PRIVATE_INTERRUPTS..INTERRUPTS).collect();

        assert_eq!(offsets, [0x104, 0x108, 0x10c]);
    }

    #[test]
    fn no_register_is_named_twice() {
        for version in [GicVersion::V2, GicVersion::V3] {
            let mut names = names(version, 8, 5);
            let all = names.len();
            names.sort_unstable();
            names.dedup();

            assert_eq!(names.len(), all);
        }
    }

    #[test]
    fn a_priority_of_seven_bits_has_four_registers_a_group() {
        let registers = |bits| names(GicVersion::V3, 1, bits).len();

        assert_eq!(registers(7) - registers(5), 6);
    }
}
