//! `coracle run` of `true`, beside `runc run` of the same bundle.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::report::Report;

/// Coracle's settings, in the bundle's folder.
const SETTINGS: &str = "coracle.json";

/// Measures and adds the row.
pub fn measure(report: &mut Report, image: &Path, runs: u32) -> Result<()> {
    let bundle = Bundle::new(image, &["true"])?;
    let mut best = [f64::INFINITY; 2];
    // The first round warms caches and is not counted.
    for run in 0..=runs {
        eprintln!("run: run {run} of {runs}");
        let times = [run_once("runc", &bundle)?, run_once("coracle", &bundle)?];
        if run > 0 {
            for (best, value) in best.iter_mut().zip(times) {
                *best = best.min(value);
            }
        }
    }
    let [runc, coracle] = best;
    report.beside("run of true, tuned kernel", ("ms", coracle), ("runc", runc), None);
    Ok(())
}

fn run_once(runtime: &str, bundle: &Bundle) -> Result<f64> {
    let started = Instant::now();
    bundle.run(runtime, &[])?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

/// A container of `coracle` that does nothing; dropping it ends it.
pub struct Idle {
    bundle: Bundle,
}

impl Idle {
    /// Starts it from the guest image in `image`.
    pub fn start(image: &Path) -> Result<Self> {
        let bundle = Bundle::new(image, &["sleep", "1000"])?;
        bundle.run("coracle", &["--detach"])?;
        Ok(Idle { bundle })
    }

    /// Its process on the host.
    pub fn pid(&self) -> Result<u32> {
        let output = self.bundle.command("coracle").arg("state").arg(&self.bundle.id).output()?;
        let state: Value = serde_json::from_slice(&output.stdout).context("read its state")?;
        let pid = state["pid"].as_u64().context("its state has a pid")?;
        Ok(pid.try_into()?)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let mut command = self.bundle.command("coracle");
        match command.args(["delete", "--force"]).arg(&self.bundle.id).status() {
            Ok(status) if status.success() => {}
            failed => eprintln!("coracle delete {}: {failed:?}", self.bundle.id),
        }
    }
}

/// A bundle of busybox, as `runc spec` has it, and the id of the container made from it.
struct Bundle {
    folder: TempDir,
    id: String,
}

impl Bundle {
    /// A bundle that runs `command`, an applet of busybox and its arguments.
    fn new(image: &Path, command: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let root = folder.path().join("rootfs");
        for directory in ["bin", "proc", "sys", "dev"] {
            fs::create_dir_all(root.join(directory))?;
        }
        fs::copy("/bin/busybox", root.join("bin").join(command[0]))?;
        let made = Command::new("runc").arg("spec").current_dir(folder.path()).status()?;
        if !made.success() {
            bail!("runc spec: {made}");
        }
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(command);
        fs::write(&path, config.to_string())?;
        let settings = json!({ "kernel": image.join("kernel"), "initrd": image.join("initrd") });
        fs::write(folder.path().join(SETTINGS), settings.to_string())?;
        Ok(Bundle { folder, id: format!("perf-{}", std::process::id()) })
    }

    /// `runtime` with settings that name our guest image.
    fn command(&self, runtime: &str) -> Command {
        let mut command = Command::new(runtime);
        command.env("CORACLE_CONFIG", self.folder.path().join(SETTINGS));
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, runtime: &str, options: &[&str]) -> Result<()> {
        let mut command = self.command(runtime);
        command.arg("run").args(options).arg("--bundle").arg(self.folder.path()).arg(&self.id);
        let status = command.status().with_context(|| format!("start {runtime}"))?;
        if !status.success() {
            bail!("{runtime} run: {status}");
        }
        Ok(())
    }
}
