//! `run` of `true`, from the command to its end.

use std::time::Instant;

use anyhow::Result;

use super::{Bundle, Runtime, fresh_id, succeed};
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// Most of runc's time that a container in a virtual machine may take.
const GOAL: f64 = 3.0;

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["true"])?;
    let coracle = Runtime::coracle(&bundle);
    for peer in options.peers().iter().filter(|peer| peer.is_runtime()) {
        let peer = Runtime::of_peer(peer);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        // The first round warms caches and is not counted.
        for run in 0..=options.runs {
            let pair = [run_once(&coracle, &bundle)?, run_once(&peer, &bundle)?];
            eprintln!("start: run {run} of {}: {pair:.1?} ms", options.runs);
            if run > 0 {
                ours.add(pair[0]);
                theirs.add(pair[1]);
            }
        }
        let goal = (peer.name == "runc").then_some(GOAL);
        report.pairs("run of true", ("ms", &ours), (&peer.name, &theirs), goal);
    }
    Ok(())
}

fn run_once(runtime: &Runtime, bundle: &Bundle) -> Result<f64> {
    let started = Instant::now();
    succeed(&mut bundle.run(runtime, &[], &fresh_id()))?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}
