//! Tells when the containers will soon need more memory than the guest has, so that the host can add it.
//!
//! A mark below that is set for all of them (`memory.high`; Documentation/admin-guide/cgroup-v2.rst,
//! Memory Interface Files): whoever reaches it drops what the kernel can read again, and is slowed down
//! while the host is asked. Nothing is looked at while nobody reaches it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::container::cgroup::{read, value, write};

const MARK: &str = "memory.high";

const KIB: u64 = 1 << 10;

/// What the kernel and the agent need beside the containers, in bytes, and more for every eighth of
/// the guest's memory.
const RESERVE_BYTES: u64 = 16 << 20;

/// The mark, and how often it was reached.
#[derive(Debug)]
pub struct Growth {
    cgroup: PathBuf,
    events: File,
    times: u64,
    mark_bytes: u64,
    asked: bool,
}

impl Growth {
    /// Sets the mark for the containers, which are below `cgroup`.
    pub fn start(cgroup: PathBuf) -> io::Result<Self> {
        let events = File::open(cgroup.join("memory.events"))?;
        let mut growth = Self { cgroup, events, times: 0, mark_bytes: 0, asked: false };
        growth.set(true)?;
        Ok(growth)
    }

    /// Sets the mark anew for the memory that the guest has by now, or none if there is no `more`.
    pub fn set(&mut self, more: bool) -> io::Result<()> {
        self.asked = false;
        self.mark_bytes = mark_bytes(&fs::read_to_string("/proc/meminfo")?);
        let mark = if more { self.mark_bytes.to_string() } else { "max".into() };
        write(&self.cgroup.join(MARK), &mark)
    }

    /// Whether the host has to be asked now. It has to be called whenever the descriptor polls as
    /// POLLPRI, and rearms it.
    pub fn is_short(&mut self) -> bool {
        let times = value(&read(&self.events).unwrap_or_default(), "high").unwrap_or(self.times);
        let reached = times > self.times;
        self.times = times;
        if !reached || self.asked {
            return false;
        }
        let current = fs::read_to_string(self.cgroup.join("memory.current")).unwrap_or_default();
        let current = current.trim().parse().unwrap_or(0);
        let statistics = fs::read_to_string(self.cgroup.join("memory.stat")).unwrap_or_default();
        self.asked = is_needed(current, &statistics, self.mark_bytes);
        self.asked
    }
}

impl AsFd for Growth {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// How much the containers may have of the memory in `/proc/meminfo`.
fn mark_bytes(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total = total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let total = total.unwrap_or(0).saturating_mul(KIB);
    (total / 8 * 7).saturating_sub(RESERVE_BYTES)
}

/// Whether the memory in use is more than a cache: files that are read once must not make the guest as
/// large as the host, which keeps them as well.
fn is_needed(current: u64, statistics: &str, mark_bytes: u64) -> bool {
    let cached = ["active_file", "inactive_file", "slab_reclaimable"];
    let cached: u64 = cached.iter().filter_map(|name| value(statistics, name)).sum();
    current.saturating_sub(cached) > mark_bytes / 2
}

/// Whether this kernel can tell, that is, has the memory controller for the cgroup.
pub fn is_possible(cgroup: &Path) -> bool {
    cgroup.join(MARK).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_leaves_room_for_the_kernel() {
        assert_eq!(mark_bytes("MemTotal:         262144 kB\nMemFree: 1 kB\n"), (224 - 16) << 20);
        assert_eq!(mark_bytes("nonsense"), 0);
    }

    #[test]
    fn a_cache_is_no_need() {
        let files = "anon 10000\nactive_file 60000\ninactive_file 20000\nslab_reclaimable 5000\n";

        assert!(!is_needed(100_000, files, 100_000));
        assert!(is_needed(100_000, "anon 90000\nactive_file 4000\n", 100_000));
    }

    #[test]
    fn it_is_told_once_until_the_mark_is_set_anew() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("memory.events", "low 0\nhigh 0\nmax 0\n");
        write("memory.high", "max");
        write("memory.current", "99999999999");
        let mut growth = Growth::start(folder.path().to_owned()).unwrap();

        assert!(!growth.is_short());
        write("memory.events", "low 0\nhigh 3\nmax 0\n");
        assert!(growth.is_short());
        write("memory.events", "low 0\nhigh 4\nmax 0\n");
        assert!(!growth.is_short());
        growth.set(true).unwrap();
        write("memory.events", "low 0\nhigh 5\nmax 0\n");
        assert!(growth.is_short());
    }
}
