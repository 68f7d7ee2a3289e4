//! `exec` of `true` in a container that idles.

use std::time::Instant;

use anyhow::Result;

use super::{Background, Bundle, Runtime, succeed};
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["sleep", "1000000"])?;
    let coracle = Runtime::coracle(&bundle);
    let our_container = Background::start(&coracle, &bundle)?;
    for peer in options.peers().iter().filter(|peer| peer.is_runtime()) {
        let peer = Runtime::of_peer(peer);
        let their_container = Background::start(&peer, &bundle)?;
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for run in 0..=options.runs {
            let pair = [exec(&coracle, &our_container)?, exec(&peer, &their_container)?];
            eprintln!("exec: run {run} of {}: {pair:.1?} ms", options.runs);
            if run > 0 {
                ours.add(pair[0]);
                theirs.add(pair[1]);
            }
        }
        report.pairs("exec of true", ("ms", &ours), (&peer.name, &theirs), None);
    }
    Ok(())
}

fn exec(runtime: &Runtime, container: &Background) -> Result<f64> {
    let mut command = runtime.command();
    let started = Instant::now();
    succeed(command.args(["exec", container.id(), "true"]))?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}
