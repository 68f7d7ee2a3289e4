//! What CPUID tells the guest: what this host and KVM support, less what no guest is offered, and
//! the machine's own topology: one package of cores with one thread each.
#![cfg(target_arch = "x86_64")]

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Cap;

use super::hidden;
use crate::{ArchError, Kvm, VcpuFd};

/// The place of one vCPU among all.
#[derive(Debug, Clone, Copy)]
struct Topology {
    apic_id: u8,
    cores: u8,
}

impl Topology {
    /// Bits of an APIC id that tell the cores apart.
    fn core_bits(self) -> u32 {
        u32::from(self.cores).next_power_of_two().trailing_zeros()
    }

    /// Highest core number that those bits can name.
    fn max_core(self) -> u32 {
        (1 << self.core_bits()) - 1
    }
}

/// Sets CPUID of vCPU `index` of `vcpus`.
pub fn set(kvm: &Kvm, vcpu: &VcpuFd, index: u8, vcpus: u8) -> Result<(), ArchError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(ArchError::kvm("read the supported CPUID"))?;
    let topology = Topology { apic_id: index, cores: vcpus };
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    let entries = adapt(supported.as_slice(), topology, deadline_timer);
    let cpuid = CpuId::from_entries(&entries).expect("fewer entries than KVM's limit");
    vcpu.set_cpuid2(&cpuid).map_err(ArchError::kvm("set CPUID"))
}

fn adapt(
    supported: &[kvm_cpuid_entry2],
    topology: Topology,
    deadline_timer: bool,
) -> Vec<kvm_cpuid_entry2> {
    let amd = supported.iter().any(is_amd);
    let (mut listed, mut entries) = (Vec::new(), Vec::new());
    for entry in supported {
        match entry.function {
            // A list of topology levels: written anew below.
            0xb | 0x1f => listed.push(entry.function),
            // The same again, for AMD: without it, Linux takes the older leaves.
            0x8000_0026 => {}
            _ => entries.push(*entry),
        }
    }
    listed.dedup();
    entries.extend(listed.into_iter().flat_map(|function| levels(function, topology)));
    for entry in &mut entries {
        adapt_entry(entry, topology, deadline_timer, amd);
        hidden::hide(entry);
    }
    entries.truncate(KVM_MAX_CPUID_ENTRIES);
    entries
}

/// Whether `entry` is the vendor string of a processor with AMD's topology leaves.
fn is_amd(entry: &kvm_cpuid_entry2) -> bool {
    const AMD: u32 = u32::from_le_bytes(*b"Auth");
    const HYGON: u32 = u32::from_le_bytes(*b"Hygo");
    entry.function == 0 && [AMD, HYGON].contains(&entry.ebx)
}

fn adapt_entry(entry: &mut kvm_cpuid_entry2, topology: Topology, deadline_timer: bool, amd: bool) {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const MULTI_THREADING: u32 = 1 << 28;
    let apic_id = u32::from(topology.apic_id);
    let last_core = u32::from(topology.cores) - 1;
    match entry.function {
        1 => {
            let logical = (topology.max_core() + 1).min(0xff);
            set_bits(&mut entry.ebx, 16..32, logical | apic_id << 8);
            entry.ecx |= HYPERVISOR;
            set_flag(&mut entry.ecx, TSC_DEADLINE, deadline_timer);
            set_flag(&mut entry.edx, MULTI_THREADING, topology.cores > 1);
        }
        4 => {
            // The field holds no more than 64 cores; larger machines are told by leaf 0xb.
            set_bits(&mut entry.eax, 26..32, topology.max_core().min(0x3f));
            set_sharing(&mut entry.eax, topology);
        }
        0x8000_0001 if amd => {
            const CMP_LEGACY: u32 = 1 << 1;
            set_flag(&mut entry.ecx, CMP_LEGACY, topology.cores > 1);
        }
        0x8000_0008 if amd => {
            set_bits(&mut entry.ecx, 0..8, last_core);
            set_bits(&mut entry.ecx, 12..16, topology.core_bits());
        }
        0x8000_001d if amd => set_sharing(&mut entry.eax, topology),
        0x8000_001e if amd => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
        _ => {}
    }
}

/// How many cores share the cache that a leaf describes: all share the third level, and each has
/// the levels below for itself.
fn set_sharing(eax: &mut u32, topology: Topology) {
    const NO_MORE_CACHES: u32 = 0;
    if *eax & 0x1f == NO_MORE_CACHES {
        return;
    }
    let level = *eax >> 5 & 7;
    set_bits(eax, 14..26, if level >= 3 { topology.max_core() } else { 0 });
}

/// The topology levels of leaf 0xb or 0x1f: thread, core, end of the list.
fn levels(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index: u32, kind: u32, bits: u32, count: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: count,
        ecx: kind << 8 | index,
        edx: topology.apic_id.into(),
        ..Default::default()
    };
    [
        level(0, THREAD, 0, 1),
        level(1, CORE, topology.core_bits(), topology.cores.into()),
        level(2, 0, 0, 0),
    ]
}

fn set_flag(register: &mut u32, flag: u32, on: bool) {
    *register = if on { *register | flag } else { *register & !flag };
}

fn set_bits(register: &mut u32, bits: std::ops::Range<u32>, value: u32) {
    let mask = u32::MAX >> (32 - (bits.end - bits.start)) << bits.start;
    *register = *register & !mask | value << bits.start & mask;
}

#[cfg(test)]
mod tests {
    use super::*;

    const THIRD_OF_FOUR: Topology = Topology { apic_id: 2, cores: 4 };

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ..Default::default() }
    }

    fn vendor(name: &[u8; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*name), ..leaf(0) }
    }

    fn adapted(entries: &[kvm_cpuid_entry2], function: u32) -> Vec<kvm_cpuid_entry2> {
        let mut adapted = adapt(entries, THIRD_OF_FOUR, true);
        adapted.retain(|entry| entry.function == function);
        adapted
    }

    #[test]
    fn leaf_one_tells_the_apic_id_and_the_number_of_processors() {
        let leaf = adapted(&[leaf(1)], 1)[0];

        assert_eq!(leaf.ebx >> 24, 2);
        assert_eq!(leaf.ebx >> 16 & 0xff, 4);
    }

    #[test]
    fn leaf_one_tells_of_a_hypervisor_and_its_deadline_timer() {
        let leaf = adapted(&[leaf(1)], 1)[0];

        assert_ne!(leaf.ecx & (1 << 31), 0);
        assert_ne!(leaf.ecx & (1 << 24), 0);
    }

    #[test]
    fn a_deadline_timer_that_kvm_lacks_is_hidden() {
        let host = kvm_cpuid_entry2 { ecx: 1 << 24, ..leaf(1) };

        let leaf = adapt(&[host], THIRD_OF_FOUR, false)[0];

        assert_eq!(leaf.ecx & (1 << 24), 0);
    }

    #[test]
    fn only_the_third_cache_level_is_shared() {
        let second = kvm_cpuid_entry2 { eax: 2 << 5 | 3 | 7 << 14, ..leaf(4) };
        let third = kvm_cpuid_entry2 { eax: 3 << 5 | 3, index: 1, ..leaf(4) };

        let caches = adapted(&[second, third], 4);

        assert_eq!(caches[0].eax >> 14 & 0xfff, 0);
        assert_eq!(caches[1].eax >> 14 & 0xfff, 3);
    }

    #[test]
    fn the_hosts_topology_levels_are_replaced() {
        let host: Vec<_> =
            (0..4).map(|index| kvm_cpuid_entry2 { index, ebx: 99, ..leaf(0xb) }).collect();

        let levels = adapted(&host, 0xb);

        let counts: Vec<_> = levels.iter().map(|level| (level.eax, level.ebx)).collect();
        assert_eq!(counts, [(0, 1), (2, 4), (0, 0)]);
        assert!(levels.iter().all(|level| level.edx == 2));
    }

    #[test]
    fn topology_levels_that_the_host_lacks_are_not_invented() {
        assert!(adapted(&[leaf(1)], 0x1f).is_empty());
    }

    #[test]
    fn an_amd_guest_learns_its_cores() {
        let host = [vendor(b"Auth"), leaf(0x8000_0008), leaf(0x8000_001e)];

        let sizes = adapted(&host, 0x8000_0008)[0];
        let ids = adapted(&host, 0x8000_001e)[0];

        assert_eq!((sizes.ecx & 0xff, sizes.ecx >> 12 & 0xf), (3, 2));
        assert_eq!((ids.eax, ids.ebx & 0xff), (2, 2));
    }

    #[test]
    fn amds_leaves_stay_as_they_are_on_other_processors() {
        let host = [vendor(b"Genu"), leaf(0x8000_0008)];

        assert_eq!(adapted(&host, 0x8000_0008)[0].ecx, 0);
    }

    #[test]
    fn kvms_own_leaves_are_kept() {
        let host = kvm_cpuid_entry2 { eax: 0x4000_0001, ebx: 7, ..leaf(0x4000_0000) };

        assert_eq!(adapted(&[host], 0x4000_0000), [host]);
    }

    #[test]
    fn one_processor_needs_no_bits() {
        let alone = Topology { apic_id: 0, cores: 1 };

        assert_eq!((alone.core_bits(), alone.max_core()), (0, 0));
    }

    #[test]
    fn three_processors_need_as_many_bits_as_four() {
        let three = Topology { apic_id: 0, cores: 3 };

        assert_eq!((three.core_bits(), three.max_core()), (2, 3));
    }
}
