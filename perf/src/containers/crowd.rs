//! Many idle containers of Docker's: the memory that everything takes for each, and `docker stats` of all.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use super::density::available_kib;
use super::docker::{IMAGE, answers};
use super::{fresh_id, rest, succeed, time_ms};
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// Most memory of one that we are content with, in MiB.
const GOAL_MIB: f64 = 20.0;
/// How long they idle before memory is read: guests give back what is free after seconds.
const SETTLE: Duration = Duration::from_secs(20);
/// How many are started at the same time.
const AT_ONCE: usize = 4;

/// What a crowd of one runtime's containers costs.
struct Cost {
    /// Proportional share of all processes' memory that came with each container, in MiB.
    pss_mib: f64,
    /// What of the host's memory is not available any more for each container, in MiB.
    host_mib: f64,
    /// How long `docker stats --no-stream` of all takes, in milliseconds.
    stats_ms: Samples,
}

/// Measures `count` containers of each runtime and adds the rows; Docker must run, and know the runtimes.
pub fn measure(report: &mut Report, options: &Options, count: usize) -> Result<()> {
    answers()?;
    let ours = cost("coracle", count, options.runs)?;
    let told = |what: &str| format!("{what}, {count} through Docker");
    let (pss, host) = (told("PSS of everything per idle container"), told("host memory of each"));
    report.alone(&pss, "MiB", ours.pss_mib, Some(GOAL_MIB));
    report.alone(&host, "MiB", ours.host_mib, Some(GOAL_MIB));
    for peer in options.peers() {
        let Some(runtime) = peer.docker_runtime() else { continue };
        let theirs = cost(runtime, count, options.runs)?;
        report.beside(&pss, ("MiB", ours.pss_mib), (runtime, theirs.pss_mib), None);
        report.beside(&host, ("MiB", ours.host_mib), (runtime, theirs.host_mib), None);
        let stats = told("docker stats of all");
        report.pairs(&stats, ("ms", &ours.stats_ms), (runtime, &theirs.stats_ms), None);
    }
    Ok(())
}

fn cost(runtime: &str, count: usize, runs: u32) -> Result<Cost> {
    // One that is there before has what all of them share.
    let _first = Crowd::start(runtime, 1)?;
    rest(SETTLE);
    let before = (all_pss_kib()?, available_kib()?);
    let crowd = Crowd::start(runtime, count)?;
    rest(SETTLE);
    let after = (all_pss_kib()?, available_kib()?);
    let mib_of_each = |kib: f64| kib / 1024.0 / count as f64;
    let mut stats_ms = Samples::default();
    for run in 0..=runs {
        let time = crowd.stats_ms()?;
        eprintln!("crowd: docker stats, run {run} of {runs}: {time:.0} ms");
        if run > 0 {
            stats_ms.add(time);
        }
    }
    Ok(Cost {
        pss_mib: mib_of_each(after.0 - before.0),
        host_mib: mib_of_each(before.1 - after.1),
        stats_ms,
    })
}

/// Containers that idle; dropping them removes them.
struct Crowd {
    names: Vec<String>,
}

impl Crowd {
    fn start(runtime: &str, count: usize) -> Result<Self> {
        let crowd = Crowd { names: (0..count).map(|_| fresh_id()).collect() };
        let next = AtomicUsize::new(0);
        let start_some = || -> Result<()> {
            while let Some(name) = crowd.names.get(next.fetch_add(1, Ordering::Relaxed)) {
                eprintln!("crowd: {runtime} {name}");
                let mut command = Command::new("docker");
                command.args(["run", "-d", "--runtime", runtime, "--name", name, IMAGE]);
                succeed(command.args(["sleep", "1000000"]).stdout(Stdio::null()))?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(start_some)).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Result<()>>| {
                thread.join().map_err(|_| anyhow!("a thread panicked"))?
            };
            threads.into_iter().try_for_each(join)
        })?;
        Ok(crowd)
    }

    fn stats_ms(&self) -> Result<f64> {
        let mut command = Command::new("docker");
        command.args(["stats", "--no-stream"]).args(&self.names);
        time_ms(command.stdout(Stdio::null()))
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        let mut command = Command::new("docker");
        command.args(["rm", "-f"]).args(&self.names).stdout(Stdio::null());
        if let Err(error) = succeed(&mut command) {
            eprintln!("crowd: {error:#}");
        }
    }
}

/// The proportional shares of all processes, which together are what all of them have in memory.
fn all_pss_kib() -> Result<f64> {
    let mut sum = 0.0;
    for process in fs::read_dir("/proc")? {
        // Kernel threads have no memory, and processes may end.
        let path = process?.path().join("smaps_rollup");
        let Ok(rollup) = fs::read_to_string(path) else { continue };
        sum += pss_kib(&rollup).unwrap_or(0.0);
    }
    if sum == 0.0 {
        bail!("no process's memory can be read: be root");
    }
    Ok(sum)
}

fn pss_kib(rollup: &str) -> Option<f64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proportional_share_is_read() {
        let rollup = "00400000-7fff rollup\nRss:  1744 kB\nPss:  417 kB\nPss_Anon:  96 kB\n";

        assert_eq!(pss_kib(rollup), Some(417.0));
        assert_eq!(pss_kib(""), None);
    }
}
