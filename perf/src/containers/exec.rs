//! `exec` of `true` in a container that idles.

use anyhow::Result;

use super::{Background, Bundle, Runtime, in_turn, time_ms};
use crate::Options;
use crate::report::Report;

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["sleep", "1000000"])?;
    let coracle = Runtime::coracle(&bundle);
    let our_container = Background::start(&coracle, &bundle)?;
    for peer in options.peers().iter().filter(|peer| peer.is_runtime()) {
        let peer = Runtime::of_peer(peer);
        let their_container = Background::start(&peer, &bundle)?;
        let [ours, theirs] = in_turn(
            "exec",
            options.runs,
            || exec(&coracle, &our_container),
            || exec(&peer, &their_container),
        )?;
        report.pairs("exec of true", ("ms", &ours), (&peer.name, &theirs), None);
    }
    Ok(())
}

fn exec(runtime: &Runtime, container: &Background) -> Result<f64> {
    time_ms(runtime.command().args(["exec", container.id(), "true"]))
}
