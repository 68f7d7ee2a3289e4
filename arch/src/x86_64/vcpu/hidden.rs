//! What a processor can do that no guest is offered, although the host's KVM would: virtual machines
//! within it, counters and traces of the processor, waiting for a cache line, memory that even the
//! host cannot read.
//!
//! Bits and leaves are those of the Intel manual, volume 2A, CPUID, and of the AMD manual, volume 3,
//! appendix E.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::kvm_cpuid_entry2;

const SUBLEAF_0: u32 = 0;

// Leaf 1.
const DEBUG_STORE: u32 = 1 << 21;
const DTES64: u32 = 1 << 2;
const MONITOR: u32 = 1 << 3;
const DS_CPL: u32 = 1 << 4;
const VMX: u32 = 1 << 5;
const SMX: u32 = 1 << 6;
const PDCM: u32 = 1 << 15;

// Leaf 7.
const SGX: u32 = 1 << 2;
const RDT_MONITORING: u32 = 1 << 12;
const RDT_ALLOCATION: u32 = 1 << 15;
const PROCESSOR_TRACE: u32 = 1 << 25;
const WAITPKG: u32 = 1 << 5;
const SGX_LAUNCH: u32 = 1 << 30;
const ARCH_LBR: u32 = 1 << 19;

// Leaf 0x8000_0001.
const SVM: u32 = 1 << 2;
const IBS: u32 = 1 << 10;
const SKINIT: u32 = 1 << 12;
const LWP: u32 = 1 << 15;
const PERFCTR_CORE: u32 = 1 << 23;
const PERFCTR_NB: u32 = 1 << 24;
const PERFTSC: u32 = 1 << 27;
const PERFCTR_L3: u32 = 1 << 28;
const MONITORX: u32 = 1 << 29;

/// Leaves that only describe what is hidden: MONITOR, performance counters, cache monitoring and
/// allocation, SGX, processor trace, last branch records; SVM, instruction sampling, lightweight
/// profiling, encrypted memory, performance counters.
const LEAVES: [u32; 12] = [
    5,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1c,
    0x8000_000a,
    0x8000_001b,
    0x8000_001c,
    0x8000_001f,
    0x8000_0022,
];

/// Clears in `entry` what it says of them.
pub fn hide(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => {
            entry.ecx &= !(DTES64 | MONITOR | DS_CPL | VMX | SMX | PDCM);
            entry.edx &= !DEBUG_STORE;
        }
        7 if entry.index == SUBLEAF_0 => {
            entry.ebx &= !(SGX | RDT_MONITORING | RDT_ALLOCATION | PROCESSOR_TRACE);
            entry.ecx &= !(WAITPKG | SGX_LAUNCH);
            entry.edx &= !ARCH_LBR;
        }
        0x8000_0001 => {
            let counters = PERFCTR_CORE | PERFCTR_NB | PERFTSC | PERFCTR_L3;
            entry.ecx &= !(SVM | IBS | SKINIT | LWP | counters | MONITORX);
        }
        leaf if LEAVES.contains(&leaf) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let ones = u32::MAX;
        let (eax, ebx, ecx, edx) = (ones, ones, ones, ones);
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn left_of(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut entry = all_ones(function, index);
        hide(&mut entry);
        entry
    }

    #[test]
    fn no_guest_is_told_of_virtual_machines_within_it() {
        assert_eq!(left_of(1, 0).ecx & (1 << 5), 0);
        assert_eq!(left_of(0x8000_0001, 0).ecx & (1 << 2), 0);
        assert_eq!(left_of(0x8000_000a, 0).edx, 0);
    }

    #[test]
    fn no_guest_is_told_of_monitor_and_mwait() {
        assert_eq!(left_of(1, 0).ecx & (1 << 3), 0);
        assert_eq!(left_of(0x8000_0001, 0).ecx & (1 << 29), 0);
        assert_eq!(left_of(7, 0).ecx & (1 << 5), 0);
    }

    #[test]
    fn no_guest_is_told_of_counters() {
        assert_eq!(left_of(0xa, 0).eax, 0);
        assert_eq!(left_of(0x8000_0022, 0).eax, 0);
        assert_eq!(left_of(0x8000_0001, 0).ecx >> 23 & 3, 0);
    }

    #[test]
    fn no_guest_is_told_of_enclaves_and_traces() {
        assert_eq!(left_of(7, 0).ebx & (1 << 2 | 1 << 25), 0);
        assert_eq!((left_of(0x12, 2).eax, left_of(0x14, 1).eax), (0, 0));
    }

    #[test]
    fn everything_else_stays() {
        assert_eq!(left_of(1, 0).ecx & (1 << 21), 1 << 21); // x2APIC
        assert_eq!(left_of(7, 1), all_ones(7, 1));
        assert_eq!(left_of(0xd, 1), all_ones(0xd, 1));
    }
}
