//! What each of many idle containers costs the host, everything counted.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Background, Bundle, Runtime, rest};
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// How many containers.
const COUNT: usize = 8;
/// Most memory of one that we are content with, in MiB.
const GOAL_MIB: f64 = 20.0;
/// How long they idle before the host's memory is read: guests give back what is free after seconds.
const SETTLE: Duration = Duration::from_secs(8);

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["sleep", "1000000"])?;
    let coracle = Runtime::coracle(&bundle);
    let peer = options.peers().into_iter().find(|peer| peer.is_runtime());
    let peer = peer.as_ref().map(Runtime::of_peer);
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for run in 1..=options.runs {
        eprintln!("density: run {run} of {}, {COUNT} containers each", options.runs);
        ours.add(cost_mib(&coracle, &bundle)?);
        if let Some(peer) = &peer {
            theirs.add(cost_mib(peer, &bundle)?);
        }
    }
    report.samples("host memory of an idle container", ("MiB", &ours), Some(GOAL_MIB));
    if let Some(peer) = peer {
        let what = format!("host memory of an idle container of {}", peer.name);
        report.samples(&what, ("MiB", &theirs), None);
    }
    Ok(())
}

/// What of the host's memory is not available any more with [`COUNT`] containers, for each of them.
fn cost_mib(runtime: &Runtime, bundle: &Bundle) -> Result<f64> {
    // One that is there before has what all of them share.
    let _first = Background::start(runtime, bundle)?;
    rest(SETTLE);
    let before = available_kib()?;
    let containers: Vec<_> =
        (0..COUNT).map(|_| Background::start(runtime, bundle)).collect::<Result<_>>()?;
    rest(SETTLE);
    let after = available_kib()?;
    drop(containers);
    Ok((before - after) / 1024.0 / COUNT as f64)
}

/// The host's memory that is available, in KiB.
pub fn available_kib() -> Result<f64> {
    // So that it does not matter how much of the cache the kernel takes for reclaimable, and what it still
    // has of huge pages that were given back in part.
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()).context("MemAvailable")?;
    Ok(kib.parse()?)
}
