//! `docker run` of `true`, with each runtime.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use super::{in_turn, time_ms};
use crate::Options;
use crate::report::Report;

/// Made by the lab from this machine's busybox.
pub const IMAGE: &str = "busybox";

/// Measures and adds the rows; Docker must run, and know the runtime `coracle`.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    answers()?;
    for peer in options.peers() {
        let Some(runtime) = peer.docker_runtime() else { continue };
        let ours = || run_once("coracle");
        let [ours, theirs] = in_turn("docker", options.runs, ours, || run_once(runtime))?;
        report.pairs("docker run of true", ("ms", &ours), (&peer.to_string(), &theirs), None);
    }
    Ok(())
}

/// Fails if no Docker runs.
pub fn answers() -> Result<()> {
    let answers = Command::new("docker").arg("version").stdout(Stdio::null()).status();
    if !answers.is_ok_and(|status| status.success()) {
        bail!("no Docker answers: in the lab, do not set LAB_ENGINES=0");
    }
    Ok(())
}

fn run_once(runtime: &str) -> Result<f64> {
    let mut command = Command::new("docker");
    command.args(["run", "--rm", "--network", "none", "--runtime", runtime, IMAGE, "true"]);
    time_ms(command.stdin(Stdio::null()))
}
