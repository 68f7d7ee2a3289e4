//! `docker run` of `true`, with each runtime.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, bail};

use super::succeed;
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// Made by the lab from this machine's busybox.
const IMAGE: &str = "busybox";

/// Measures and adds the rows; Docker must run, and know the runtime `coracle`.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let answers = Command::new("docker").arg("version").stdout(Stdio::null()).status();
    if !answers.is_ok_and(|status| status.success()) {
        bail!("no Docker answers: in the lab, do not set LAB_ENGINES=0");
    }
    for peer in options.peers() {
        let Some(runtime) = peer.docker_runtime() else { continue };
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for run in 0..=options.runs {
            let pair = [run_once("coracle")?, run_once(runtime)?];
            eprintln!("docker: run {run} of {}: {pair:.1?} ms", options.runs);
            if run > 0 {
                ours.add(pair[0]);
                theirs.add(pair[1]);
            }
        }
        report.pairs("docker run of true", ("ms", &ours), (&peer.to_string(), &theirs), None);
    }
    Ok(())
}

fn run_once(runtime: &str) -> Result<f64> {
    let mut command = Command::new("docker");
    command.args(["run", "--rm", "--network", "none", "--runtime", runtime, IMAGE, "true"]);
    let started = Instant::now();
    succeed(command.stdin(Stdio::null()))?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}
