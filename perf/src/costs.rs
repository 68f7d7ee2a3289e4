//! What a boot costs that repeats however busy the machine is.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use arch::payload;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use vmm::{VmConfig, Vmm};

use crate::boot::to_ready;
use crate::report::Report;
use crate::samples::Samples;
use crate::{Options, environment, syscalls};

/// Most exits to user space until the agent is ready, with a container's devices.
const GOAL_EXITS: f64 = 200.0;
/// Most system calls before the first entry into a guest.
const GOAL_SYSTEM_CALLS: f64 = 150.0;
/// Most guest memory touched when the agent is ready, in MiB.
const GOAL_TOUCHED_MIB: f64 = 24.0;
/// Most processor time until a tiny guest runs, in milliseconds.
const GOAL_STARTUP_MS: f64 = 2.0;

/// One cost.
pub struct Cost {
    /// What it is.
    pub name: &'static str,
    /// In this unit.
    pub unit: &'static str,
    /// How much.
    pub value: f64,
    /// Most that we are content with.
    pub goal: Option<f64>,
}

/// What each of one boot's costs is, and how many instructions it takes in all, in the second boot.
pub fn of_warm_boot(options: &Options) -> Result<Vec<Cost>> {
    to_ready(&options.tuned, false)?;
    let (ready_ms, mut costs) = of_boot(options)?;
    if environment::counts_instructions() {
        let name = "instructions to agent, tuned kernel";
        costs.push(Cost { name, unit: "M", value: ready_ms, goal: None });
    }
    Ok(costs)
}

/// How many milliseconds a boot takes, and what each of its costs is.
fn of_boot(options: &Options) -> Result<(f64, Vec<Cost>)> {
    let (ready_ms, boot) = to_ready(&options.tuned, options.verbose)?;
    let cost = |name, unit, value, goal| Cost { name, unit, value, goal };
    let touched_mib = boot.memory.guest_ram_kib as f64 / 1024.0;
    let calls = syscalls::before_first_entry(&tiny_guest_command()?)? as f64;
    let costs = vec![
        cost("exits to agent, tuned kernel", "exits", boot.exits as f64, Some(GOAL_EXITS)),
        cost("system calls before the guest runs", "calls", calls, Some(GOAL_SYSTEM_CALLS)),
        cost("guest memory touched at ready", "MiB", touched_mib, Some(GOAL_TOUCHED_MIB)),
    ];
    Ok((ready_ms, costs))
}

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    eprintln!("costs: one boot");
    for Cost { name, unit, value, goal } in of_boot(options)?.1 {
        report.alone(name, unit, value, goal);
    }
    Ok(())
}

/// What the hidden verb says.
#[derive(Debug, Serialize, Deserialize)]
struct Startup {
    processor_us: i64,
}

/// Measures how long it takes until a guest of one instruction runs, and adds the rows.
pub fn startup(report: &mut Report, options: &Options) -> Result<()> {
    let (mut elapsed, mut processor) = (Samples::default(), Samples::default());
    for run in 0..=options.runs {
        let started = Instant::now();
        let output = tiny_guest_command()?.stdin(Stdio::null()).output()?;
        let elapsed_ms = started.elapsed().as_secs_f64() * 1e3;
        if !output.status.success() {
            bail!("the guest's process: {}", String::from_utf8_lossy(&output.stderr));
        }
        let Startup { processor_us } = serde_json::from_slice(&output.stdout)?;
        if run > 0 {
            elapsed.add(elapsed_ms);
            processor.add(processor_us as f64 / 1e3);
        }
    }
    report.samples("a machine with a tiny guest, start to end", ("ms", &elapsed), None);
    let what = "processor time until a tiny guest runs";
    report.samples(what, ("ms", &processor), Some(GOAL_STARTUP_MS));
    let calls = syscalls::before_first_entry(&tiny_guest_command()?)? as f64;
    report.alone("system calls before the guest runs", "calls", calls, Some(GOAL_SYSTEM_CALLS));
    Ok(())
}

fn tiny_guest_command() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("tiny-guest");
    Ok(command)
}

/// Runs a guest that ends at once, and says what it took to start it.
pub fn tiny_guest() -> Result<()> {
    vmm::use_one_heap();
    let mut kernel = NamedTempFile::new().context("make a kernel of a few instructions")?;
    kernel.write_all(&payload::kernel(payload::END))?;
    let mut config = VmConfig::new(kernel.path().to_owned());
    config.memory.size_mib = 256;
    config.rng = false;
    let vm = Vmm::new(config)?.start()?;
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let processor_us = (usage.user_time() + usage.system_time()).num_microseconds();
    vm.wait();
    println!("{}", serde_json::to_string(&Startup { processor_us })?);
    Ok(())
}
