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
    let ways = [
        ("run of true", Runtime::coracle(&bundle), Some(GOAL)),
        ("run of true, booting", Runtime::booting(&bundle), None),
    ];
    for peer in options.peers().iter().filter(|peer| peer.is_runtime()) {
        let peer = Runtime::of_peer(peer);
        for (what, coracle, goal) in &ways {
            let [ours, theirs] = in_turn(
                what,
                options.runs,
                || run_once(coracle, &bundle),
                || run_once(&peer, &bundle),
            )?;
            let goal = goal.filter(|_| peer.name == "runc");
            report.pairs(what, ("ms", &ours), (&peer.name, &theirs), goal);
        }
    }
    Ok(())
}
