//! Whole containers, beside those of runc or crun from the same bundle.

mod crowd;
mod density;
mod docker;
mod exec;
mod idle;
mod parallel;
mod phases;
mod start;
mod stdio;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::peer::Peer;
use crate::samples::Samples;

pub use crowd::measure as crowd;
pub use density::measure as density;
pub use docker::measure as docker;
pub use exec::measure as exec;
pub use idle::measure as idle;
pub use parallel::measure as parallel;
pub use phases::{Phase, measure as phases};
pub use start::measure as start;
pub use stdio::measure as stdio;

/// Coracle's settings, in the bundle's folder: with templates, and without.
const SETTINGS: &str = "coracle.json";
const BOOTING: &str = "booting.json";

/// What a container's root has of busybox.
const APPLETS: [&str; 5] = ["sh", "true", "sleep", "cat", "echo"];

/// An OCI runtime with a command line as runc has it.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// What rows call it.
    pub name: String,
    program: PathBuf,
    settings: Option<PathBuf>,
}

impl Runtime {
    /// Coracle, with settings that name a guest image beside the bundle.
    pub fn coracle(bundle: &Bundle) -> Self {
        let settings = Some(bundle.folder.path().join(SETTINGS));
        Runtime { name: "coracle".to_owned(), program: "coracle".into(), settings }
    }

    /// The same, but each guest boots instead of going on from a template.
    pub fn booting(bundle: &Bundle) -> Self {
        let settings = Some(bundle.folder.path().join(BOOTING));
        Runtime { settings, ..Runtime::coracle(bundle) }
    }

    /// One that Coracle is compared with.
    pub fn of_peer(peer: &Peer) -> Self {
        Runtime { name: peer.to_string(), program: peer.program().to_owned(), settings: None }
    }

    /// A command line of it, without input.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.stdin(Stdio::null());
        if let Some(settings) = &self.settings {
            command.env("CORACLE_CONFIG", settings);
        }
        command
    }
}

/// A bundle of busybox, as `runc spec` has it.
#[derive(Debug)]
pub struct Bundle {
    folder: TempDir,
}

impl Bundle {
    /// A bundle that runs `command`; Coracle boots the guest image in `image` for it.
    pub fn new(image: &Path, command: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let root = folder.path().join("rootfs");
        for directory in ["bin", "proc", "sys", "dev"] {
            fs::create_dir_all(root.join(directory))?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))
            .context("/bin/busybox of busybox-static is what containers run")?;
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        let made = Command::new("runc").arg("spec").current_dir(folder.path()).status()?;
        if !made.success() {
            bail!("runc spec: {made}");
        }
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(command);
        fs::write(&path, config.to_string())?;
        let rootfs = image.join("rootfs.erofs");
        let (root, file) =
            if rootfs.exists() { ("rootfs", rootfs) } else { ("initrd", image.join("initrd")) };
        let mut settings = json!({ "kernel": image.join("kernel"), root: file });
        fs::write(folder.path().join(SETTINGS), settings.to_string())?;
        settings["templates"] = Value::Null;
        fs::write(folder.path().join(BOOTING), settings.to_string())?;
        Ok(Bundle { folder })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The command line by which `runtime` runs a container `id` of it.
    pub fn run(&self, runtime: &Runtime, options: &[&str], id: &str) -> Command {
        let mut command = runtime.command();
        command.arg("run").args(options).arg("--bundle").arg(self.path()).arg(id);
        command
    }
}

/// Waits while nothing happens. Where instructions are counted, a process keeps the clock from jumping
/// ahead, at the price of as many instructions as nanoseconds; here it may jump.
pub fn rest(duration: Duration) {
    let idler = std::env::var("LAB_IDLER").ok().and_then(|pid| pid.parse().ok());
    let idler = idler.map(Pid::from_raw);
    // It may be gone, and then there is nothing to stop.
    let send = |signal| idler.map(|pid| kill(pid, signal));
    let _ = send(Signal::SIGSTOP);
    thread::sleep(duration);
    let _ = send(Signal::SIGCONT);
}

/// An id that no other container of this process has.
pub fn fresh_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("perf-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Waits for `command`, which must succeed.
pub fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// How long `command` takes, which must succeed, in milliseconds.
pub fn time_ms(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    succeed(command)?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

/// How long a container of `bundle` takes from the command to its end, in milliseconds.
pub fn run_once(runtime: &Runtime, bundle: &Bundle) -> Result<f64> {
    time_ms(&mut bundle.run(runtime, &[], &fresh_id()))
}

/// What `ours` and `theirs` give, in milliseconds, each in turn, `runs` times after a round that warms
/// caches and is not counted.
pub fn in_turn(
    what: &str,
    runs: u32,
    ours: impl Fn() -> Result<f64>,
    theirs: impl Fn() -> Result<f64>,
) -> Result<[Samples; 2]> {
    let mut samples: [Samples; 2] = Default::default();
    for run in 0..=runs {
        let pair = [ours()?, theirs()?];
        eprintln!("{what}: run {run} of {runs}: {pair:.1?} ms");
        if run > 0 {
            samples.iter_mut().zip(pair).for_each(|(side, value)| side.add(value));
        }
    }
    Ok(samples)
}

/// A container that runs in the background; dropping it ends it.
#[derive(Debug)]
pub struct Background {
    runtime: Runtime,
    id: String,
}

impl Background {
    /// Starts one of `bundle`.
    pub fn start(runtime: &Runtime, bundle: &Bundle) -> Result<Self> {
        let id = fresh_id();
        let mut command = bundle.run(runtime, &["--detach"], &id);
        // Its output is its own: who reads ours shall not wait for the container's end.
        succeed(command.stdout(Stdio::null()))?;
        Ok(Background { runtime: runtime.clone(), id })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its process on the host.
    pub fn pid(&self) -> Result<u32> {
        let output = self.runtime.command().arg("state").arg(&self.id).output()?;
        let state: Value = serde_json::from_slice(&output.stdout).context("read its state")?;
        let pid = state["pid"].as_u64().context("its state has a pid")?;
        Ok(pid.try_into()?)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let mut command = self.runtime.command();
        match command.args(["delete", "--force"]).arg(&self.id).status() {
            Ok(status) if status.success() => {}
            failed => eprintln!("{} delete {}: {failed:?}", self.runtime.name, self.id),
        }
    }
}
