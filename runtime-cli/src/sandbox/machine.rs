//! How large a virtual machine a container gets, and what its host cgroup may use (pure).

use std::collections::HashMap;
use std::path::Path;

use agent_protocol::SHARE_TAG;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use vmm::{
    BalloonConfig, BootConfig, ConsoleConfig, ConsoleOutput, MemoryConfig, NetConfig, ShareConfig,
    VmConfig, VsockConfig,
};

use crate::settings::{MAX_VCPUS, MIN_MEMORY_MIB, Settings};
use crate::translate;

/// What a guest needs beside the memory its container may use: kernel, page structures, agent.
pub(super) const GUEST_OVERHEAD_MIB: u32 = 64;

/// What the sandbox process needs beside guest memory: its own pages, and the page cache of the
/// files it serves, which must not be squeezed out by the guest's memory.
pub(super) const VMM_OVERHEAD_MIB: u32 = 32;

/// Any guest can have this context identifier: the socket device of each lives in its own process.
const GUEST_CID: u32 = 3;

/// Where early messages of the guest kernel go with `debug_console`, in the state folder.
const CONSOLE_FILE: &str = "console.log";

const MIB: u64 = 1 << 20;

/// The size of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) vcpus: u8,
    pub(super) memory_mib: u32,
}

impl Size {
    /// Room for what `resources` allow the container, and for the guest around it. Without limits
    /// it is what the settings say.
    pub(super) fn of(settings: &Settings, resources: &LinuxResources, host: Size) -> Self {
        let memory_mib = match memory_limit(resources) {
            Some(limit) => u32::try_from(limit.div_ceil(MIB))
                .unwrap_or(u32::MAX)
                .saturating_add(GUEST_OVERHEAD_MIB)
                .min(host.memory_mib.max(settings.memory_mib))
                .max(MIN_MEMORY_MIB),
            None => settings.memory_mib,
        };
        let vcpus = cpu_limit(resources)
            .map_or(settings.vcpus, |cpus| cpus.min(host.vcpus).max(settings.vcpus))
            .min(MAX_VCPUS);
        Self { vcpus, memory_mib }
    }

    /// The size of this host.
    pub(super) fn of_host() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total_kib = memory
            .strip_prefix("MemTotal:")
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(u64::MAX);
        Self {
            vcpus: u8::try_from(cpus).unwrap_or(u8::MAX),
            memory_mib: u32::try_from(total_kib / 1024).unwrap_or(u32::MAX),
        }
    }
}

/// The container's memory limit, in bytes, if it has one.
fn memory_limit(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// How many processors the container's quota can keep busy, rounded up.
fn cpu_limit(resources: &LinuxResources) -> Option<u8> {
    let cpu = resources.cpu().as_ref()?;
    let quota = u64::try_from(cpu.quota()?).ok().filter(|quota| *quota > 0)?;
    // The kernel's default period is 100 ms (Documentation/scheduler/sched-bwc.rst).
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
    Some(u8::try_from(quota.div_ceil(period)).unwrap_or(u8::MAX))
}

/// What the host enforces on the sandbox process. The guest enforces the container's own limits
/// on the container's processes, so the host's must leave room for guest kernel and VMM, and must
/// not count host threads or host device nodes against the container.
pub(super) fn host_resources(resources: &LinuxResources, size: Size) -> LinuxResources {
    let mut host = host_changes(resources);
    if let (Some(memory), Some(limit)) = (resources.memory(), memory_limit(resources)) {
        host.set_memory(Some(host_memory(memory, limit, size)));
    }
    host
}

/// What of `resources` can be changed on the host while the sandbox runs: all but its memory, as a
/// virtual machine has what it was created with.
pub(super) fn host_changes(resources: &LinuxResources) -> LinuxResources {
    let mut host = LinuxResources::default();
    host.set_cpu(
        resources.cpu().as_ref().map(what_is_set).filter(|cpu| *cpu != LinuxCpu::default()),
    );
    host.set_block_io(resources.block_io().clone());
    host.set_network(resources.network().clone());
    let unified = resources.unified().iter().flatten();
    let of_host = unified.filter(|(name, _)| translate::is_host_file(name));
    let of_host: HashMap<_, _> =
        of_host.map(|(name, value)| (name.clone(), value.clone())).collect();
    host.set_unified(Some(of_host).filter(|files| !files.is_empty()));
    host
}

/// Engines write zero and the empty string for what they do not set; the kernel refuses both.
fn what_is_set(cpu: &LinuxCpu) -> LinuxCpu {
    let mut set = cpu.clone();
    set.set_shares(cpu.shares().filter(|shares| *shares != 0))
        .set_quota(cpu.quota().filter(|quota| *quota != 0))
        .set_period(cpu.period().filter(|period| *period != 0))
        .set_realtime_runtime(cpu.realtime_runtime().filter(|runtime| *runtime != 0))
        .set_realtime_period(cpu.realtime_period().filter(|period| *period != 0))
        .set_cpus(cpu.cpus().clone().filter(|cpus| !cpus.is_empty()))
        .set_mems(cpu.mems().clone().filter(|nodes| !nodes.is_empty()));
    set
}

fn host_memory(memory: &LinuxMemory, limit: u64, size: Size) -> LinuxMemory {
    let total = (u64::from(size.memory_mib) + u64::from(VMM_OVERHEAD_MIB)) * MIB;
    let total = i64::try_from(total).unwrap_or(i64::MAX);
    let added = total.saturating_sub(i64::try_from(limit).unwrap_or(i64::MAX));
    // -1 is no limit, and stays that.
    let raised = |value: i64| if value > 0 { value.saturating_add(added) } else { value };
    let mut host = LinuxMemory::default();
    host.set_limit(Some(total));
    // Zero is not set, and would be less than the limit.
    host.set_swap(memory.swap().filter(|swap| *swap != 0).map(raised));
    host.set_reservation(memory.reservation().map(raised));
    host.set_swappiness(memory.swappiness());
    host
}

/// The virtual machine of a container.
pub(super) fn config(
    settings: &Settings,
    size: Size,
    share: &Path,
    nets: Vec<NetConfig>,
    state_dir: &Path,
) -> VmConfig {
    let output = if settings.debug_console {
        ConsoleOutput::File(state_dir.join(CONSOLE_FILE))
    } else {
        ConsoleOutput::Discard
    };
    VmConfig {
        vcpus: size.vcpus,
        memory: MemoryConfig { size_mib: size.memory_mib, ..MemoryConfig::default() },
        boot: BootConfig {
            initrd: Some(settings.initrd.clone()),
            ..BootConfig::new(settings.kernel.clone())
        },
        console: ConsoleConfig { serial: settings.debug_console, output },
        disks: Vec::new(),
        nets,
        pmem: Vec::new(),
        shares: vec![ShareConfig::new(SHARE_TAG, share.into())],
        vsock: Some(VsockConfig { cid: GUEST_CID, socket: None }),
        rng: true,
        balloon: Some(BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() }),
        seccomp: true,
        user: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Size = Size { vcpus: 4, memory_mib: 8192 };

    fn resources(text: &str) -> LinuxResources {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn without_limits_the_settings_decide() {
        let size = Size::of(&Settings::default(), &resources("{}"), HOST);

        assert_eq!(size, Size { vcpus: 1, memory_mib: 256 });
    }

    #[test]
    fn a_memory_limit_leaves_room_for_the_guest_kernel() {
        let limited = resources(r#"{"memory":{"limit":1073741824}}"#);

        assert_eq!(Size::of(&Settings::default(), &limited, HOST).memory_mib, 1024 + 64);
    }

    #[test]
    fn a_limit_beyond_the_host_gives_no_more_than_the_host_has() {
        let limited = resources(r#"{"memory":{"limit":9223372036854771712}}"#);

        assert_eq!(Size::of(&Settings::default(), &limited, HOST).memory_mib, 8192);
    }

    #[test]
    fn a_quota_of_one_and_a_half_processors_gives_two() {
        let limited = resources(r#"{"cpu":{"quota":150000,"period":100000}}"#);

        assert_eq!(Size::of(&Settings::default(), &limited, HOST).vcpus, 2);
    }

    #[test]
    fn the_host_limit_holds_the_whole_machine() {
        let limited = resources(r#"{"memory":{"limit":67108864,"swap":134217728}}"#);
        let size = Size::of(&Settings::default(), &limited, HOST);

        let host = host_resources(&limited, size);

        let memory = host.memory().unwrap();
        assert_eq!(memory.limit(), Some((64 + 64 + 32) << 20));
        assert_eq!(memory.swap(), Some((128 + 64 + 32) << 20));
    }

    #[test]
    fn a_swap_limit_of_zero_is_none() {
        let limited = resources(r#"{"memory":{"limit":67108864,"swap":0}}"#);

        assert_eq!(host_resources(&limited, HOST).memory().unwrap().swap(), None);
    }

    #[test]
    fn zero_and_nothing_are_no_limits() {
        let unset = resources(
            r#"{"cpu":{"shares":0,"quota":0,"period":0,"realtimeRuntime":0,"realtimePeriod":0,
                       "cpus":"","mems":""}}"#,
        );

        assert_eq!(host_resources(&unset, HOST), LinuxResources::default());
    }

    #[test]
    fn unified_keys_of_the_host_s_own_resources_are_for_the_host() {
        let limited =
            resources(r#"{"unified":{"cpuset.cpus":"0","io.weight":"9","pids.max":"1"}}"#);

        let host = host_resources(&limited, HOST);

        let unified = host.unified().as_ref().unwrap();
        assert_eq!(unified.len(), 2);
        assert_eq!((&unified["cpuset.cpus"][..], &unified["io.weight"][..]), ("0", "9"));
    }

    #[test]
    fn the_memory_of_a_running_machine_stays_as_it_is() {
        let changed = host_changes(&resources(r#"{"memory":{"limit":1},"cpu":{"quota":5}}"#));

        assert!(changed.memory().is_none());
        assert_eq!(changed.cpu().as_ref().unwrap().quota(), Some(5));
    }

    #[test]
    fn process_and_device_limits_are_for_the_guest_alone() {
        let limited = resources(r#"{"pids":{"limit":1},"devices":[{"allow":false}]}"#);

        let host = host_resources(&limited, HOST);

        assert_eq!(host, LinuxResources::default());
    }
}
