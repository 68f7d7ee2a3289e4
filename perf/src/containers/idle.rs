//! How often the threads of a container wake up that has nothing to do, and its guest is left.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Background, Bundle, Runtime, rest};
use crate::Options;
use crate::guest_time::Watch;
use crate::report::Report;

/// Most wake-ups a second that we are content with: none, to the nearest whole number. Once a minute the
/// guest's kernel asks the host for entropy.
const GOAL: f64 = 0.5;
/// How long the guest has to come to rest: it asks for entropy more often while it is young.
const SETTLE: Duration = Duration::from_secs(120);
/// How long its threads are watched.
const WATCH: Duration = Duration::from_secs(120);

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["sleep", "1000000"])?;
    let container = Background::start(&Runtime::coracle(&bundle), &bundle)?;
    let pid = container.pid()?;
    rest(SETTLE);
    let watch = report.counts_instructions().then(Watch::start).transpose()?;
    let before = wake_ups(pid)?;
    rest(WATCH);
    let after = wake_ups(pid)?;
    let guests = watch.map(Watch::stop).transpose()?;
    let mut all = 0;
    for (thread, count) in &after {
        let more = count - before.get(thread).unwrap_or(&0);
        all += more;
        if options.verbose {
            eprintln!("idle: {more:>6} wake-ups in {} s of {}", WATCH.as_secs(), thread.1);
        }
    }
    let per_second = f64::from(all) / WATCH.as_secs_f64();
    report.alone("wake-ups while the guest is idle", "1/s", per_second, Some(GOAL));
    if let Some(guests) = guests {
        let per_second = f64::from(guests.all_exits()) / WATCH.as_secs_f64();
        report.alone("exits while the guest is idle", "1/s", per_second, None);
    }
    Ok(())
}

/// How often each thread of `pid` slept so far, by its number and name.
fn wake_ups(pid: u32) -> Result<BTreeMap<(String, String), u32>> {
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        let status = fs::read_to_string(task.path().join("status"))?;
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.map(|value| value.trim().to_owned()).context("status of a thread")
        };
        let key = (task.file_name().to_string_lossy().into_owned(), value("Name:")?);
        threads.insert(key, value("voluntary_ctxt_switches:")?.parse()?);
    }
    Ok(threads)
}
