//! A container's counters, as its cgroup and the guest's interfaces have them.

use std::fs;

use agent_protocol::{InterfaceStats, Stats};

use super::cgroup::{Cgroup, value};

/// Reads what there is; a controller the kernel lacks counts as 0.
pub fn read(cgroup: &Cgroup) -> Stats {
    let file = |name: &str| cgroup.read(name).unwrap_or_default();
    let (cpu, memory_stat) = (file("cpu.stat"), file("memory.stat"));
    let counter = |name: &str| value(&cpu, name).unwrap_or(0);
    Stats {
        cpu_usage_us: counter("usage_usec"),
        cpu_user_us: counter("user_usec"),
        cpu_system_us: counter("system_usec"),
        cpu_throttling: (counter("nr_periods"), counter("nr_throttled"), counter("throttled_usec")),
        memory_usage: number(&file("memory.current")),
        memory_peak: number(&file("memory.peak")),
        memory_limit: number(&file("memory.max")),
        memory_stat: pairs(&memory_stat),
        oom_kills: value(&file("memory.events"), "oom_kill").unwrap_or(0),
        pids_current: number(&file("pids.current")),
        pids_limit: number(&file("pids.max")),
        interfaces: interfaces(&fs::read_to_string("/proc/net/dev").unwrap_or_default()),
    }
}

/// The value of a file with one number or `max`; a missing file is an empty text and counts as 0.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

fn pairs(text: &str) -> Vec<(String, u64)> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

/// `/proc/net/dev`: after the name eight columns of what was received, then eight of what was sent.
fn interfaces(text: &str) -> Vec<InterfaceStats> {
    let interface = |line: &str| {
        let (name, columns) = line.split_once(':')?;
        let columns: Vec<u64> = columns.split_whitespace().filter_map(|c| c.parse().ok()).collect();
        let counters = |from: usize| columns.get(from..from + 4)?.try_into().ok();
        let (received, sent) = (counters(0)?, counters(8)?);
        Some(InterfaceStats { name: name.trim().to_owned(), received, sent })
    };
    text.lines().filter_map(interface).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEV: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       2    0    0    0     0          0         0      100       2    0    0    0     0       0          0
  eth0: 5000 40 1 2 0 0 0 0 7000 50 3 4 0 0 0 0
";

    #[test]
    fn interface_counters_are_taken_from_both_halves() {
        let found = interfaces(DEV);

        assert_eq!(found.len(), 2);
        assert_eq!(found[1].name, "eth0");
        assert_eq!(found[1].received, [5000, 40, 1, 2]);
        assert_eq!(found[1].sent, [7000, 50, 3, 4]);
    }

    #[test]
    fn no_limit_is_the_largest_number_and_no_file_is_none() {
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number("4096\n"), 4096);
        assert_eq!(number(""), 0);
    }
}
