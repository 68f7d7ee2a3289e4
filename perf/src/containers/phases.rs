//! What a start spends its time on, as the product itself tells.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Background, Bundle, Runtime};
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// One phase, as `coracle logs --phases --json` has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// When it began, in nanoseconds since the start of the first one.
    pub start_ns: u64,
    /// How long it took, in nanoseconds.
    pub took_ns: u64,
}

/// Measures, adds a row for each phase, and gives the phases of the last run for the plot.
pub fn measure(report: &mut Report, options: &Options) -> Result<Vec<Phase>> {
    let bundle = Bundle::new(&options.tuned, &["sleep", "1000000"])?;
    add_rows(report, options, "phase of a boot", &Runtime::booting(&bundle), &bundle)?;
    add_rows(report, options, "phase", &Runtime::coracle(&bundle), &bundle)
}

fn add_rows(
    report: &mut Report,
    options: &Options,
    kind: &str,
    coracle: &Runtime,
    bundle: &Bundle,
) -> Result<Vec<Phase>> {
    let mut runs = Vec::new();
    for run in 0..=options.runs {
        eprintln!("{kind}: run {run} of {}", options.runs);
        let container = Background::start(coracle, bundle)?;
        let mut command = coracle.command();
        let output = command.args(["logs", "--phases", "--json", container.id()]).output()?;
        if !output.status.success() {
            bail!("coracle logs: {}", String::from_utf8_lossy(&output.stderr));
        }
        let phases: Vec<Phase> = serde_json::from_slice(&output.stdout).context("its phases")?;
        if run > 0 {
            runs.push(phases);
        }
    }
    let last = runs.last().cloned().unwrap_or_default();
    for (index, phase) in last.iter().enumerate() {
        let times = runs.iter().filter_map(|phases| phases.get(index));
        let times: Samples = times.map(|phase| phase.took_ns as f64 / 1e6).collect();
        report.samples(&format!("{kind}: {}", phase.name), ("ms", &times), None);
    }
    Ok(last)
}
