//! `linux.resources` to the files of the container's cgroup in the guest (cgroup v2).

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::sorted;

/// `cpu.max` period when only the quota is given, in microseconds (the kernel's default).
const DEFAULT_CPU_PERIOD_US: u64 = 100_000;

/// Controllers of the unified map whose resources are the host's: CPU and memory node numbers, and
/// block devices.
const HOST_CONTROLLERS: [&str; 2] = ["cpuset.", "io."];

/// Why limits make no sense.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A limit for memory and swap together needs one for memory.
    #[error("unable to set swap limit without memory limit: set a memory limit, too")]
    SwapWithoutMemory,
    /// The limit of both is below that of one.
    #[error("memory+swap limit {swap} should be >= memory limit {limit}")]
    SwapBelowMemory {
        /// For both, in bytes.
        swap: i64,
        /// For memory, in bytes.
        limit: i64,
    },
    /// A key of the unified map that is no file of the cgroup's folder.
    #[error("unified resource {0:?} must be a file name: no slashes")]
    UnifiedName(String),
}

/// Files and values, in the order of writing.
///
/// Left to the container's cgroup on the host, because the resource is there: `cpu.cpus` and
/// `cpu.mems` (numbers of the host's processors and memory nodes), `blockIO` and `rdma` (devices of
/// the host) and their keys in `unified`. Without effect: `devices` (no device of the host is in
/// the guest), `network` and the real-time limits of `cpu` (cgroup v1 only), and kernel memory.
pub fn cgroup_files(resources: &LinuxResources) -> Result<Vec<(String, String)>, Error> {
    let mut files = Vec::new();
    let mut write = |name: &str, value: String| files.push((name.to_string(), value));
    if let Some(memory) = resources.memory() {
        // The swap limit first: lowering memory.max may have to push pages there.
        if let Some(swap) = swap_limit(memory)? {
            write("memory.swap.max", limit_text(swap));
        }
        if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
            write("memory.max", limit_text(limit));
        }
        if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
            write("memory.low", limit_text(reservation));
        }
    }
    if let Some(cpu) = resources.cpu() {
        for (name, value) in cpu_files(cpu) {
            write(name, value);
        }
    }
    if let Some(limit) = resources.pids().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        write("pids.max", limit_text(limit));
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        write(&format!("hugetlb.{}.max", huge.page_size()), limit_text(huge.limit()));
    }
    // Last, so that what is said in the kernel's own words wins.
    for (name, value) in sorted(resources.unified().iter().flatten()) {
        if name.contains('/') || name.is_empty() {
            return Err(Error::UnifiedName(name));
        }
        if !is_host_file(&name) {
            write(&name, value);
        }
    }
    Ok(files)
}

/// Whether a key of the unified map is about the host's resources.
pub fn is_host_file(name: &str) -> bool {
    HOST_CONTROLLERS.iter().any(|prefix| name.starts_with(prefix)) && !name.contains('/')
}

/// cgroup v2 limits swap alone, where the OCI limit is for memory and swap together.
fn swap_limit(memory: &LinuxMemory) -> Result<Option<i64>, Error> {
    let limit = memory.limit().unwrap_or(0);
    match memory.swap().unwrap_or(0) {
        // As in cgroup v1, where unlimited memory makes the sum unlimited, too.
        0 if limit < 0 => Ok(Some(-1)),
        0 => Ok(None),
        swap if swap < 0 => Ok(Some(-1)),
        _ if limit <= 0 => Err(Error::SwapWithoutMemory),
        swap if swap < limit => Err(Error::SwapBelowMemory { swap, limit }),
        swap => Ok(Some(swap - limit)),
    }
}

fn cpu_files(cpu: &LinuxCpu) -> Vec<(&'static str, String)> {
    let mut files = Vec::new();
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        files.push(("cpu.weight", weight(shares).to_string()));
    }
    if let Some(idle) = cpu.idle() {
        files.push(("cpu.idle", idle.to_string()));
    }
    let quota = cpu.quota().unwrap_or(0);
    let period = cpu.period().unwrap_or(0);
    if quota != 0 || period != 0 {
        let period = if period == 0 { DEFAULT_CPU_PERIOD_US } else { period };
        let quota = if quota > 0 { quota.to_string() } else { "max".into() };
        files.push(("cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst() {
        files.push(("cpu.max.burst", burst.to_string()));
    }
    files
}

/// Shares, 2 to 262,144, to a weight, 1 to 10,000, as runc and crun convert them.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9_999 / 262_142
}

/// A number, or `max` for the specification's -1.
fn limit_text(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(json: &str) -> Result<Vec<(String, String)>, Error> {
        cgroup_files(&serde_json::from_str(json).unwrap())
    }

    fn written(json: &str) -> Vec<String> {
        files(json).unwrap().into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    #[test]
    fn docker_run_memory_forbids_more_than_as_much_swap() {
        let json = r#"{"memory": {"limit": 67108864, "swap": 134217728}}"#;

        assert_eq!(written(json), ["memory.swap.max=67108864", "memory.max=67108864"]);
    }

    #[test]
    fn equal_limits_forbid_swap() {
        let json = r#"{"memory": {"limit": 4096, "swap": 4096}}"#;

        assert_eq!(written(json), ["memory.swap.max=0", "memory.max=4096"]);
    }

    #[test]
    fn unlimited_memory_makes_swap_unlimited() {
        let expected = ["memory.swap.max=max", "memory.max=max"];

        assert_eq!(written(r#"{"memory": {"limit": -1}}"#), expected);
    }

    #[test]
    fn zero_means_not_set() {
        let json = r#"{"memory": {"limit": 0, "swap": 0, "reservation": 0}, "pids": {"limit": 0},
                       "cpu": {"shares": 0, "quota": 0, "period": 0}}"#;

        assert_eq!(written(json), [""; 0]);
    }

    #[test]
    fn swap_without_memory_is_refused() {
        let error = files(r#"{"memory": {"swap": 4096}}"#).unwrap_err();

        assert!(matches!(error, Error::SwapWithoutMemory));
    }

    #[test]
    fn less_memory_and_swap_than_memory_is_refused() {
        let error = files(r#"{"memory": {"limit": 8192, "swap": 4096}}"#).unwrap_err();

        assert_eq!(error.to_string(), "memory+swap limit 4096 should be >= memory limit 8192");
    }

    #[test]
    fn docker_run_cpus_becomes_a_quota() {
        let json = r#"{"cpu": {"shares": 1024, "quota": 150000, "period": 100000}}"#;

        assert_eq!(written(json), ["cpu.weight=39", "cpu.max=150000 100000"]);
    }

    #[test]
    fn a_negative_quota_is_none() {
        assert_eq!(written(r#"{"cpu": {"quota": -1}}"#), ["cpu.max=max 100000"]);
    }

    #[test]
    fn shares_map_end_to_end_to_weights() {
        assert_eq!(weight(2), 1);
        assert_eq!(weight(262_144), 10_000);
        assert_eq!(weight(u64::MAX), 10_000);
    }

    #[test]
    fn pids_and_huge_pages_are_limited_in_the_guest() {
        let json =
            r#"{"pids": {"limit": 64}, "hugepageLimits": [{"pageSize": "2MB", "limit": 9}]}"#;

        assert_eq!(written(json), ["pids.max=64", "hugetlb.2MB.max=9"]);
    }

    #[test]
    fn unlimited_pids_are_written_as_max() {
        assert_eq!(written(r#"{"pids": {"limit": -1}}"#), ["pids.max=max"]);
    }

    #[test]
    fn what_belongs_to_the_host_is_left_to_the_host() {
        let json = r#"{"cpu": {"cpus": "0-3", "mems": "0"}, "blockIO": {"weight": 500},
                       "unified": {"cpuset.cpus": "3", "io.weight": "10"}}"#;

        assert_eq!(written(json), [""; 0]);
    }

    #[test]
    fn the_unified_map_comes_last_and_sorted() {
        let json = r#"{"pids": {"limit": 1}, "unified": {"pids.max": "2", "memory.high": "3"}}"#;

        assert_eq!(written(json), ["pids.max=1", "memory.high=3", "pids.max=2"]);
    }

    #[test]
    fn a_unified_key_cannot_leave_the_cgroup() {
        assert!(files(r#"{"unified": {"../pids.max": "2"}}"#).is_err());
    }
}
