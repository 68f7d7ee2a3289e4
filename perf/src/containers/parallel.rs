//! Many containers that are started at once.

use std::thread;

use anyhow::{Result, anyhow};

use super::{Bundle, Runtime, run_once};
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// How many.
const COUNT: usize = 50;
/// Most times the median that the slowest of a hundred may take.
const GOAL: f64 = 3.0;

/// Measures and adds the row.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["true"])?;
    let runtime = Runtime::coracle(&bundle);
    // Warms caches.
    start_together(&runtime, &bundle, 1)?;
    let mut times = Samples::default();
    for run in 1..=options.runs {
        eprintln!("parallel: run {run} of {}, {COUNT} containers", options.runs);
        start_together(&runtime, &bundle, COUNT)?.into_iter().for_each(|time| times.add(time));
    }
    report.samples(&format!("run of true, {COUNT} at once"), ("ms", &times), None);
    if let Some(spread) = times.spread() {
        let what = format!("p99 against the median, {COUNT} at once");
        report.alone(&what, "ratio", spread.p99 / spread.median, Some(GOAL));
    }
    Ok(())
}

fn start_together(runtime: &Runtime, bundle: &Bundle, count: usize) -> Result<Vec<f64>> {
    thread::scope(|scope| {
        let one = || run_once(runtime, bundle);
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(one)).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<f64>>| {
            thread.join().map_err(|_| anyhow!("a thread panicked"))?
        };
        threads.into_iter().map(join).collect()
    })
}
