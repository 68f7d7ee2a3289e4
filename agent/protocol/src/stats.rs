//! What the agent tells of a container that runs: its processes and its counters.

use serde::{Deserialize, Serialize};

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Pid in the guest's root pid namespace.
    pub pid: i32,
    /// Parent's pid.
    pub ppid: i32,
    /// User id.
    pub uid: u32,
    /// CPU time used, in milliseconds.
    pub cpu_ms: u64,
    /// Controlling terminal, or empty.
    pub tty: String,
    /// Command line, arguments separated by spaces, or the name in brackets.
    pub command: String,
}

/// Counters of a container, from its cgroup in the guest. `u64::MAX` limits mean unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// CPU time in microseconds (cpu.stat).
    pub cpu_usage_us: u64,
    /// Of it in user mode.
    pub cpu_user_us: u64,
    /// Of it in the kernel.
    pub cpu_system_us: u64,
    /// Scheduling periods, periods throttled, microseconds throttled.
    pub cpu_throttling: (u64, u64, u64),
    /// memory.current, in bytes.
    pub memory_usage: u64,
    /// memory.peak, in bytes, or 0 where the kernel has none.
    pub memory_peak: u64,
    /// memory.max, in bytes.
    pub memory_limit: u64,
    /// memory.stat: name and value.
    pub memory_stat: Vec<(String, u64)>,
    /// `oom_kill` of memory.events.
    pub oom_kills: u64,
    /// pids.current.
    pub pids_current: u64,
    /// pids.max.
    pub pids_limit: u64,
    /// Per interface of the guest: name, then received and sent (bytes, packets, errors, dropped).
    pub interfaces: Vec<InterfaceStats>,
}

/// Counters of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStats {
    /// Interface name.
    pub name: String,
    /// Received: bytes, packets, errors, dropped.
    pub received: [u64; 4],
    /// Sent: bytes, packets, errors, dropped.
    pub sent: [u64; 4],
}
