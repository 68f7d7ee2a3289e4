//! The host process's own memory beyond guest RAM.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::containers::{Background, Bundle, Runtime, rest};
use crate::report::Report;
use crate::{Options, boot};

/// Most anonymous memory we are content with, in KiB: of a machine with the devices that its agent needs,
/// and of a container.
const GOAL_ANONYMOUS_KIB: [f64; 2] = [300.0, 600.0];
/// Most resident memory we are content with, in KiB.
const GOAL_RESIDENT_KIB: f64 = 5.0 * 1024.0;
/// A mapping of at least this size is guest RAM: nothing else we map is anywhere near, and an
/// untouched thread stack is far below it.
const GUEST_RAM_KIB: u64 = 64 * 1024;

/// How long a container idles before its memory is read.
const SETTLE: Duration = Duration::from_secs(1);

/// Memory of a process without guest RAM.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnMemory {
    /// Anonymous pages, in KiB.
    pub anonymous_kib: u64,
    /// All resident pages, in KiB.
    pub resident_kib: u64,
    /// Resident pages of guest RAM, in KiB.
    pub guest_ram_kib: u64,
    /// Resident pages by what is mapped and how, in KiB; unnamed memory is `anonymous`.
    pub by_mapping_kib: BTreeMap<String, u64>,
}

impl OwnMemory {
    /// Reads `/proc/PID/smaps` of process `pid`.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let smaps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Ok(OwnMemory::parse(&smaps))
    }

    fn parse(smaps: &str) -> Self {
        let mut own = OwnMemory::default();
        let (mut mapping, mut guest_ram) = (String::new(), false);
        for line in smaps.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let [name, value, rest @ ..] = &words[..] else { continue };
            if !name.ends_with(':') {
                // Range, permissions, offset, device, inode and, if it has one, a name.
                mapping = format!("{value} {}", rest.get(3).unwrap_or(&"anonymous"));
                continue;
            }
            let kib = value.parse().unwrap_or(0);
            match *name {
                "Size:" => guest_ram = kib >= GUEST_RAM_KIB,
                "Rss:" if guest_ram => own.guest_ram_kib += kib,
                "Rss:" if kib > 0 => {
                    own.resident_kib += kib;
                    *own.by_mapping_kib.entry(mapping.clone()).or_default() += kib;
                }
                "Anonymous:" if !guest_ram => own.anonymous_kib += kib,
                _ => {}
            }
        }
        own
    }
}

/// Measures and adds the rows: of a virtual machine alone, and of a whole container's process.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let (_, boot) = boot::to_ready(&options.tuned, options.verbose)?;
    add_rows(report, "virtual machine", &boot.memory, GOAL_ANONYMOUS_KIB[0], options.verbose);
    let bundle = Bundle::new(&options.tuned, &["sleep", "1000000"])?;
    let container = Background::start(&Runtime::coracle(&bundle), &bundle)?;
    rest(SETTLE);
    let memory = OwnMemory::of(container.pid()?)?;
    add_rows(report, "container", &memory, GOAL_ANONYMOUS_KIB[1], options.verbose);
    Ok(())
}

fn add_rows(report: &mut Report, of: &str, memory: &OwnMemory, goal: f64, verbose: bool) {
    let (anonymous, resident) = (memory.anonymous_kib as f64, memory.resident_kib as f64);
    let what = format!("own anonymous memory, {of}");
    report.alone(&what, "KiB", anonymous, Some(goal));
    let what = format!("own resident memory, {of}");
    report.alone(&what, "KiB", resident, Some(GOAL_RESIDENT_KIB));
    if verbose {
        for (mapping, kib) in &memory.by_mapping_kib {
            eprintln!("{of}: {kib:>6} KiB of {mapping}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "7f0000000000-7f0010000000 rw-p 0 00:00 0\nSize:  262144 kB\nRss: 9000 kB\n\
         Anonymous: 9000 kB\n55-56 r-xp 0 fe:00 1 /x\nSize: 100 kB\nRss: 40 kB\n\
         Anonymous: 8 kB\n";

    #[test]
    fn guest_ram_does_not_count() {
        let own = OwnMemory::parse(SMAPS);

        assert_eq!((own.anonymous_kib, own.resident_kib), (8, 40));
        assert_eq!(own.guest_ram_kib, 9000);
    }

    #[test]
    fn resident_pages_are_told_apart_by_mapping() {
        let own = OwnMemory::parse(SMAPS);

        assert_eq!(own.by_mapping_kib, [("r-xp /x".to_owned(), 40)].into());
    }
}
