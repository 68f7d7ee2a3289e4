//! `run` of `true`, from the command to its end.

use anyhow::Result;

use super::{Bundle, Runtime, in_turn, run_once};
use crate::Options;
use crate::report::Report;

/// Most of runc's time that a container in a virtual machine may take.
const GOAL: f64 = 3.0;

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["true"])?;
    let coracle = Runtime::coracle(&bundle);
    for peer in options.peers().iter().filter(|peer| peer.is_runtime()) {
        let peer = Runtime::of_peer(peer);
        let [ours, theirs] = in_turn(
            "start",
            options.runs,
            || run_once(&coracle, &bundle),
            || run_once(&peer, &bundle),
        )?;
        let goal = (peer.name == "runc").then_some(GOAL);
        report.pairs("run of true", ("ms", &ours), (&peer.name, &theirs), goal);
    }
    Ok(())
}
