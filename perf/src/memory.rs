//! The host process's own memory beyond guest RAM.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::Options;
use crate::containers::{Background, Bundle, Runtime, rest};
use crate::guest::{Device, Guest, Machine};
use crate::report::Report;

/// Most anonymous memory we are content with, in KiB: of a machine with a console and nothing else, and of
/// a container.
const GOAL_ANONYMOUS_KIB: [f64; 2] = [300.0, 600.0];
/// Most resident memory we are content with, in KiB.
const GOAL_RESIDENT_KIB: f64 = 5.0 * 1024.0;
/// What is at least this large and in no core dump is guest RAM: nothing else we map is anywhere near, and an
/// untouched thread stack is far below it.
const GUEST_RAM_BYTES: u64 = 64 << 20;
/// In the name of a mapping that is a part of guest RAM, in the place in it that its offset says.
const TEMPLATES: &str = "/templates/";
/// In the name of the file that guests map their root from.
const ROOT: &str = "/rootfs.erofs";
/// The RAM that a container's guest starts with, in bytes: the settings' default.
const START_RAM_BYTES: u64 = 256 << 20;

/// Most RAM of a guest that we are content with when its agent is ready, in MiB.
const GOAL_GUEST_RAM_MIB: f64 = 24.0;

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
    /// Those that are the guest's own, not its template's, in KiB.
    pub guest_anonymous_kib: u64,
    /// Resident pages of the root that the guest maps, in KiB: they are in the host's page cache once, for all
    /// guests.
    pub guest_root_kib: u64,
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
        let ram = [booted_ram(smaps), vec![template_ram(smaps)]].concat();
        let (mut mapping, mut start, mut guest_ram) = (String::new(), 0, false);
        for line in smaps.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let [name, value, rest @ ..] = &words[..] else { continue };
            if !name.ends_with(':') {
                // Range, permissions, offset, device, inode and, if it has one, a name.
                mapping = format!("{value} {}", rest.get(3).unwrap_or(&"anonymous"));
                start = start_of(name);
                continue;
            }
            let kib = value.parse().unwrap_or(0);
            match *name {
                "Size:" => guest_ram = ram.iter().any(|ram| ram.contains(&start)),
                "Rss:" if guest_ram => own.guest_ram_kib += kib,
                "Rss:" if mapping.ends_with(ROOT) => own.guest_root_kib += kib,
                "Rss:" if kib > 0 => {
                    own.resident_kib += kib;
                    *own.by_mapping_kib.entry(mapping.clone()).or_default() += kib;
                }
                "Anonymous:" if !guest_ram => own.anonymous_kib += kib,
                "Anonymous:" => own.guest_anonymous_kib += kib,
                _ => {}
            }
        }
        own
    }
}

/// Where a mapping starts, of its range.
fn start_of(range: &str) -> u64 {
    range_of(range).map_or(0, |range| range.start)
}

fn range_of(range: &str) -> Option<Range<u64>> {
    let (start, end) = range.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Where RAM of guests is that booted. Advice about parts of it makes several mappings of one.
fn booted_ram(smaps: &str) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut range = None;
    for line in smaps.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match &words[..] {
            ["VmFlags:", flags @ ..] if flags.contains(&"dd") => match (found.last_mut(), &range) {
                (Some(last), Some(Range { start, end })) if last.end == *start => last.end = *end,
                (_, range) => found.extend(range.clone()),
            },
            [first, ..] if !first.ends_with(':') => range = range_of(first),
            _ => {}
        }
    }
    found.retain(|ram| ram.end - ram.start >= GUEST_RAM_BYTES);
    found
}

/// Where the RAM of a guest is that went on from a template; nowhere if it booted.
fn template_ram(smaps: &str) -> Range<u64> {
    let of_template = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [range, _, offset, _, _, name, ..] = &words[..] else { return None };
        let offset = u64::from_str_radix(offset, 16).ok()?;
        name.contains(TEMPLATES).then(|| start_of(range).saturating_sub(offset))
    };
    let start = smaps.lines().find_map(of_template);
    start.map_or(0..0, |start| start..start + START_RAM_BYTES)
}

/// Measures and adds the rows: of a machine alone, and of a whole container's process.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let guest = Guest::new(&options.tuned, "figure up 1", &[])?;
    let mut machine = guest.start(Machine::Coracle, Device::None)?;
    machine.figures()?;
    rest(SETTLE);
    let memory = OwnMemory::of(machine.pid())?;
    drop(machine);
    add_rows(report, "machine without devices", &memory, GOAL_ANONYMOUS_KIB[0], options.verbose);
    let bundle = Bundle::new(&options.tuned, &["sleep", "1000000"])?;
    let runtime = Runtime::coracle(&bundle);
    // The first guest of its shape boots, and leaves the template that the next one starts from.
    drop(Background::start(&runtime, &bundle)?);
    let container = Background::start(&runtime, &bundle)?;
    rest(SETTLE);
    let memory = OwnMemory::of(container.pid()?)?;
    add_rows(report, "container", &memory, GOAL_ANONYMOUS_KIB[1], options.verbose);
    let mib = |kib: u64| kib as f64 / 1024.0;
    let (resident, own) = (mib(memory.guest_ram_kib), mib(memory.guest_anonymous_kib));
    let what = "guest RAM touched, idle container from a template";
    report.alone(what, "MiB", resident, Some(GOAL_GUEST_RAM_MIB));
    report.alone("of which it shares with no other guest", "MiB", own, None);
    let root = mib(memory.guest_root_kib);
    report.alone("root mapped by all guests, as an idle container has it", "MiB", root, None);
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

    const SMAPS: &str = "7f0000000000-7f0001000000 rw-p 0 00:00 0\nSize:  16384 kB\nRss: 1000 kB\n\
         Anonymous: 1000 kB\nVmFlags: rd wr dd nh\n\
         7f0001000000-7f0010000000 rw-p 0 00:00 0\nSize:  245760 kB\nRss: 8000 kB\n\
         Anonymous: 8000 kB\nVmFlags: rd wr dd\n\
         7f0010000000-7f0010002000 rw-p 0 00:00 0\nSize: 8 kB\nRss: 0 kB\nAnonymous: 0 kB\n\
         VmFlags: rd wr\n\
         55000-56000 r-xp 0 fe:00 1 /x\nSize: 100 kB\nRss: 40 kB\nAnonymous: 8 kB\nVmFlags: rd ex\n\
         7f1000000000-7f1000200000 rw-p 0 fe:00 2 /guest/rootfs.erofs\nSize: 2048 kB\nRss: 20 kB\n\
         Anonymous: 0 kB\nVmFlags: rd wr\n";

    #[test]
    fn guest_ram_does_not_count() {
        let own = OwnMemory::parse(SMAPS);

        assert_eq!((own.anonymous_kib, own.resident_kib), (8, 40));
        assert_eq!(own.guest_root_kib, 20);
        assert_eq!(own.guest_ram_kib, 9000);
    }

    #[test]
    fn all_of_a_guest_s_ram_is_found_around_what_it_has_of_a_template() {
        let smaps = "10000000-10200000 rw-p 0 00:00 0\nSize: 2048 kB\nRss: 4 kB\nAnonymous: 4 kB\n\
             10200000-10400000 rw-p 200000 00:01 7 /var/lib/coracle/templates/ab\nSize: 2048 kB\n\
             Rss: 12 kB\nAnonymous: 8 kB\n\
             20000000-20200000 rw-p 0 00:00 0\nSize: 2048 kB\nRss: 32 kB\nAnonymous: 16 kB\n";

        let own = OwnMemory::parse(smaps);

        assert_eq!((own.guest_ram_kib, own.guest_anonymous_kib), (16, 12));
        assert_eq!((own.resident_kib, own.anonymous_kib), (32, 16));
    }

    #[test]
    fn resident_pages_are_told_apart_by_mapping() {
        let own = OwnMemory::parse(SMAPS);

        assert_eq!(own.by_mapping_kib, [("r-xp /x".to_owned(), 40)].into());
    }
}
