//! Small files on a shared directory of a guest, beside the same directory without a guest between.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::guest::{Device, Figure, Guest, Machine};
use crate::report::Report;

/// How many times longer than without a guest an operation may take.
const GOAL: f64 = 3.0;

const SCRIPT: &str = "
mount -t virtiofs data /mnt
coracle-perf-load files /mnt
";

/// Measures and adds the rows.
pub fn measure(report: &mut Report, image: &Path, runs: u32) -> Result<()> {
    let guest = Guest::new(image, SCRIPT, &["coracle-perf-load"])?;
    let mut best: Vec<(String, f64, f64)> = Vec::new();
    // The first round warms caches and is not counted.
    for run in 0..=runs {
        let folder = tempfile::tempdir()?;
        let native = native(folder.path())?;
        let folder = tempfile::tempdir()?;
        let shared = guest.run(Machine::Coracle, Device::Share { path: folder.path() })?;
        for ((name, ours), (_, theirs)) in shared.iter().zip(&native) {
            eprintln!("run {run} of {runs}: {name} {ours:.2}, without a guest {theirs:.2}");
        }
        if run == 1 {
            best.extend(shared.iter().map(|(name, _)| (name.clone(), f64::MAX, f64::MAX)));
        }
        for (best, ((_, ours), (_, theirs))) in best.iter_mut().zip(shared.iter().zip(&native)) {
            (best.1, best.2) = (best.1.min(*ours), best.2.min(*theirs));
        }
    }
    for (name, ours, theirs) in best {
        let what = format!("share: {name} a small file");
        report.beside(&what, ("us", ours), ("the host's own", theirs), Some(GOAL));
    }
    Ok(())
}

fn native(folder: &Path) -> Result<Vec<Figure>> {
    let mut load = Command::new("coracle-perf-load");
    let output = load.arg("files").arg(folder).output().context("start coracle-perf-load")?;
    if !output.status.success() {
        bail!("coracle-perf-load: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8(output.stdout)?;
    let figure = |line: &str| {
        let [_, name, value] = line.split(' ').collect::<Vec<_>>()[..] else { return None };
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(text.lines().filter_map(figure).collect())
}
