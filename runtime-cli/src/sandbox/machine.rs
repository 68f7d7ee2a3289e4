//! How large a virtual machine a container gets, and what its host cgroup may use (pure).

use std::collections::HashMap;
use std::path::Path;

use agent_protocol::SHARE_TAG;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use serde::{Deserialize, Serialize};
use vmm::config::MAX_MEMORY_MIB;
use vmm::{
    BalloonConfig, BootConfig, ConsoleConfig, ConsoleOutput, MemoryConfig, NetConfig, ShareConfig,
    VmConfig, VsockConfig,
};

use crate::settings::{MAX_VCPUS, MIN_MEMORY_MIB, Root, Settings};
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

/// Most virtual processors that a guest is told of, unless the settings or the container's limits say
/// more: it keeps memory for each.
const MOST_LATER_VCPUS: u8 = 8;

/// Places for networks that are connected while the container runs. The guest's kernel looks at each of
/// them when it boots.
const SPARE_SLOTS: u8 = 4;

/// Linux takes memory in pieces of this size, in MiB.
const PLUG_MIB: u32 = 128;

/// The size of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Size {
    pub(super) vcpus: u8,
    pub(super) memory_mib: u32,
}

impl Size {
    /// Room for what `resources` allow the container, and for the guest around it. Without limits
    /// it is what the settings say, and else the host's processors.
    pub(super) fn of(settings: &Settings, resources: &LinuxResources, host: Size) -> Self {
        let memory_mib = match memory_limit(resources) {
            Some(limit) => u32::try_from(limit.div_ceil(MIB))
                .unwrap_or(u32::MAX)
                .saturating_add(GUEST_OVERHEAD_MIB)
                .min(host.memory_mib.max(settings.memory_mib))
                .max(MIN_MEMORY_MIB),
            None => settings.memory_mib,
        };
        let usual = host.vcpus.min(MOST_LATER_VCPUS);
        let vcpus = cpu_limit(resources).map_or_else(
            || settings.vcpus.unwrap_or(usual),
            |cpus| cpus.min(host.vcpus).max(settings.vcpus.unwrap_or(1)),
        );
        let vcpus = vcpus.clamp(1, MAX_VCPUS);
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

/// What a virtual machine has, and what it can have while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// What it starts with.
    pub(super) size: Size,
    /// Fewest processors, whatever the quota.
    least_vcpus: u8,
    /// Most processors.
    most_vcpus: u8,
    /// How much memory can be added.
    pub(super) pluggable_mib: u32,
    /// Whether it is added whenever the container needs it: nothing limits that.
    pub(super) grows: bool,
}

/// What a virtual machine shall be changed to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// How many processors shall be online.
    pub(super) vcpus: Option<u8>,
    /// How much memory shall be added to what it started with.
    pub(super) plugged_mib: Option<u32>,
}

/// A machine cannot become as large as a limit says.
#[derive(Debug, thiserror::Error)]
#[error(
    "a memory limit of {limit_mib} MiB is more than the virtual machine can have: it can grow from \
     {size_mib} MiB by {pluggable_mib} MiB, and needs {GUEST_OVERHEAD_MIB} MiB beside the limit \
     (one can grow up to the host's memory)"
)]
pub struct TooLarge {
    limit_mib: u64,
    size_mib: u32,
    pluggable_mib: u32,
}

impl Room {
    /// The machine for a container that `resources` are set for, on a host of size `host`, all of whose
    /// memory it can get.
    pub(super) fn of(settings: &Settings, resources: &LinuxResources, host: Size) -> Self {
        let size = Size::of(settings, resources, host);
        let more_mib = host.memory_mib.min(MAX_MEMORY_MIB).saturating_sub(size.memory_mib);
        let pluggable_mib = more_mib / PLUG_MIB * PLUG_MIB;
        Room {
            size,
            least_vcpus: settings.vcpus.unwrap_or(1),
            most_vcpus: size.vcpus.max(host.vcpus.min(MOST_LATER_VCPUS)).min(MAX_VCPUS),
            pluggable_mib,
            grows: pluggable_mib != 0 && memory_limit(resources).is_none(),
        }
    }

    /// What shall be added to a machine that grows and has got `plugged_mib` so far: as much as it has.
    pub(super) fn more(&self, plugged_mib: u32) -> u32 {
        let total_mib = self.size.memory_mib.saturating_add(plugged_mib);
        let wanted_mib = total_mib.saturating_add(plugged_mib).next_multiple_of(PLUG_MIB);
        wanted_mib.min(self.pluggable_mib)
    }

    /// What `resources` change of the machine.
    pub fn change(&self, resources: &LinuxResources) -> Result<Change, TooLarge> {
        let vcpus = cpu_limit(resources);
        let vcpus = vcpus.map(|cpus| cpus.min(self.most_vcpus).max(self.least_vcpus));
        let plugged_mib = memory_limit(resources).map(|limit| self.plug(limit)).transpose()?;
        // Nothing to take back where nothing can be added.
        Ok(Change { vcpus, plugged_mib: plugged_mib.filter(|_| self.pluggable_mib != 0) })
    }

    /// How much memory must be added for a limit of so many bytes, in MiB.
    fn plug(&self, limit: u64) -> Result<u32, TooLarge> {
        let limit_mib = limit.div_ceil(MIB);
        let needed_mib = limit_mib.saturating_add(GUEST_OVERHEAD_MIB.into());
        let more_mib = needed_mib.saturating_sub(self.size.memory_mib.into());
        let more_mib = u32::try_from(more_mib).ok().and_then(|mib| {
            mib.checked_next_multiple_of(PLUG_MIB).filter(|mib| *mib <= self.pluggable_mib)
        });
        let Room { size, pluggable_mib, .. } = *self;
        more_mib.ok_or(TooLarge { limit_mib, size_mib: size.memory_mib, pluggable_mib })
    }

    /// What of `resources` changes on the host: memory only if the machine grows. What it gives back
    /// it gives back in its own time, and is never squeezed out of; nor is one that had no limit, which
    /// may have grown to any size.
    pub(super) fn host_update(&self, resources: &LinuxResources, change: Change) -> LinuxResources {
        let mut host = host_changes(resources);
        let grown = change.plugged_mib.filter(|mib| *mib != 0 && !self.grows);
        if let (Some(memory), Some(limit), Some(plugged_mib)) =
            (resources.memory(), memory_limit(resources), grown)
        {
            let memory_mib = self.size.memory_mib + plugged_mib;
            host.set_memory(Some(host_memory(memory, limit, Size { memory_mib, ..self.size })));
        }
        host
    }
}

/// The container's memory limit, in bytes, if it has one.
fn memory_limit(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// How many processors the container can keep busy: those it may run on, and its quota rounded up.
fn cpu_limit(resources: &LinuxResources) -> Option<u8> {
    let cpu = resources.cpu().as_ref()?;
    let set = cpu.cpus().as_deref().and_then(count_of_set);
    [set, cpu_quota(cpu)].into_iter().flatten().min()
}

/// How many processors a list such as `0-2,5` has (cpuset(7), List format).
fn count_of_set(list: &str) -> Option<u8> {
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (first.trim().parse::<u32>().ok()?, last.trim().parse::<u32>().ok()?);
        Some(last.checked_sub(first)?.saturating_add(1))
    };
    let counts: Option<Vec<u32>> = list.split(',').map(range).collect();
    let count = counts?.into_iter().fold(0, u32::saturating_add);
    Some(u8::try_from(count).unwrap_or(u8::MAX))
}

/// How many processors the quota can keep busy, rounded up.
fn cpu_quota(cpu: &LinuxCpu) -> Option<u8> {
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

/// What of `resources` can be changed on the host while the sandbox runs, whatever its size.
fn host_changes(resources: &LinuxResources) -> LinuxResources {
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
    room: &Room,
    share: &Path,
    nets: Vec<NetConfig>,
    state_dir: &Path,
) -> VmConfig {
    let output = if settings.debug_console {
        ConsoleOutput::File(state_dir.join(CONSOLE_FILE))
    } else {
        ConsoleOutput::Discard
    };
    let mut config = VmConfig {
        vcpus: room.size.vcpus,
        max_vcpus: Some(room.most_vcpus),
        memory: MemoryConfig {
            size_mib: room.size.memory_mib,
            pluggable_mib: room.pluggable_mib,
            ..MemoryConfig::default()
        },
        boot: BootConfig::new(settings.kernel.clone()),
        console: ConsoleConfig { serial: settings.debug_console, output },
        disks: Vec::new(),
        nets,
        pmem: Vec::new(),
        shares: vec![ShareConfig::new(SHARE_TAG, share.into())],
        vsock: Some(VsockConfig { cid: GUEST_CID, socket: None }),
        rng: true,
        balloon: Some(BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() }),
        spare_slots: SPARE_SLOTS,
        seccomp: true,
        user: None,
    };
    match settings.root() {
        Root::Mapped(rootfs) => config.map_root(rootfs),
        Root::Initrd(initrd) => config.boot.initrd = Some(initrd),
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Size = Size { vcpus: 4, memory_mib: 8192 };

    fn resources(text: &str) -> LinuxResources {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_root_is_mapped_or_unpacked() {
        let of = |settings: &Settings| {
            let room = Room::of(settings, &resources("{}"), HOST);
            config(settings, &room, Path::new("/share"), Vec::new(), Path::new("/state"))
        };

        let mapped = of(&Settings { rootfs: Some("/r".into()), ..Settings::default() });
        let unpacked = of(&Settings { initrd: Some("/i".into()), ..Settings::default() });

        assert_eq!((mapped.pmem.len(), mapped.boot.initrd), (1, None));
        assert_eq!(mapped.pmem[0].path, Path::new("/r"));
        assert_eq!((unpacked.pmem.len(), unpacked.boot.initrd), (0, Some("/i".into())));
    }

    #[test]
    fn without_limits_the_settings_decide_and_then_the_host() {
        let settings = Settings { vcpus: Some(3), memory_mib: 512, ..Settings::default() };

        let of = |settings| Size::of(settings, &resources("{}"), HOST);

        assert_eq!(of(&settings), Size { vcpus: 3, memory_mib: 512 });
        assert_eq!(of(&Settings::default()), Size { vcpus: HOST.vcpus, memory_mib: 256 });
    }

    #[test]
    fn a_set_of_processors_bounds_those_of_the_guest() {
        let vcpus = |text| Size::of(&Settings::default(), &resources(text), HOST).vcpus;

        assert_eq!(vcpus(r#"{"cpu":{"cpus":"1"}}"#), 1);
        assert_eq!(vcpus(r#"{"cpu":{"cpus":"0-1,3"}}"#), 3);
        assert_eq!(vcpus(r#"{"cpu":{"cpus":"0-1,3","quota":200000,"period":100000}}"#), 2);
        assert_eq!(vcpus(r#"{"cpu":{"cpus":"nonsense"}}"#), HOST.vcpus);
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

    fn room(text: &str) -> Room {
        Room::of(&Settings::default(), &resources(text), HOST)
    }

    #[test]
    fn a_machine_can_grow_to_what_the_host_has() {
        assert_eq!(room("{}").pluggable_mib, 8192 - 256);
        // 64 MiB beside the limit, and whole pieces of 128 MiB.
        assert_eq!(room(r#"{"memory":{"limit":201326592}}"#).pluggable_mib, 8192 - 256);
        assert_eq!(room(r#"{"memory":{"limit":202375168}}"#).pluggable_mib, 8192 - 256 - 128);
    }

    #[test]
    fn a_larger_memory_limit_is_memory_added_and_a_smaller_one_memory_taken_back() {
        let room = room(r#"{"memory":{"limit":201326592}}"#);
        let change = |limit_mib: u64| {
            let text = format!(r#"{{"memory":{{"limit":{}}}}}"#, limit_mib << 20);
            room.change(&resources(&text)).map(|change| change.plugged_mib)
        };

        assert_eq!(change(192).unwrap(), Some(0));
        assert_eq!(change(193).unwrap(), Some(128));
        assert_eq!(change(1024).unwrap(), Some(896));
        assert_eq!(change(100).unwrap(), Some(0));
        assert!(change(8192).is_err());
    }

    #[test]
    fn a_machine_that_cannot_grow_says_so() {
        let small = Size { memory_mib: 256, ..HOST };
        let fixed = Room::of(&Settings::default(), &resources("{}"), small);
        let change = |limit: &str| fixed.change(&resources(limit));

        assert_eq!(change(r#"{"memory":{"limit":1048576}}"#).unwrap(), Change::default());
        let error = change(r#"{"memory":{"limit":1073741824}}"#).unwrap_err().to_string();
        assert!(error.contains("1024 MiB is more than"), "{error}");
        assert!(error.contains("grow from 256 MiB by 0 MiB"), "{error}");
    }

    #[test]
    fn a_machine_without_memory_limit_doubles_until_it_has_the_host_s() {
        let growing = room("{}");

        assert!(growing.grows);
        assert_eq!(growing.more(0), 256);
        assert_eq!(growing.more(256), 768);
        assert_eq!(growing.more(5000), 8192 - 256);
        assert!(!room(r#"{"memory":{"limit":201326592}}"#).grows);
    }

    #[test]
    fn a_quota_becomes_processors_online() {
        let room = room("{}");
        let vcpus = |quota: i64| {
            let text = format!(r#"{{"cpu":{{"quota":{quota},"period":100000}}}}"#);
            room.change(&resources(&text)).unwrap().vcpus
        };

        assert_eq!(vcpus(150_000), Some(2));
        assert_eq!(vcpus(50_000), Some(1));
        assert_eq!(vcpus(10_000_000), Some(HOST.vcpus));
        assert_eq!(vcpus(-1), None);
    }

    #[test]
    fn the_host_lets_a_machine_grow_and_never_squeezes_one_that_shrinks() {
        let room = room(r#"{"memory":{"limit":201326592}}"#);
        let host = |limit_mib: u64| {
            let text = format!(r#"{{"memory":{{"limit":{}}}}}"#, limit_mib << 20);
            let resources = resources(&text);
            let change = room.change(&resources).unwrap();
            room.host_update(&resources, change).memory().and_then(|memory| memory.limit())
        };

        assert_eq!(host(320), Some(i64::from(256 + 128 + VMM_OVERHEAD_MIB) << 20));
        assert_eq!(host(100), None);
    }

    #[test]
    fn the_host_never_limits_a_machine_that_had_no_limit() {
        let unlimited = room("{}");
        let change = Change { plugged_mib: Some(128), ..Change::default() };
        let limited = resources(r#"{"memory":{"limit":335544320}}"#);

        assert_eq!(unlimited.host_update(&limited, change).memory(), &None);
    }
}
