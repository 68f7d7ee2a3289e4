//! What a boot costs that repeats however busy the machine is.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use arch::payload;
use arch::peer::QEMU;
use tempfile::NamedTempFile;

use crate::boot::to_ready;
use crate::guest_time::Watch;
use crate::peer::Peer;
use crate::report::Report;
use crate::samples::Samples;
use crate::vmm_peer::coracle_vmm;
use crate::{Options, environment, syscalls};

/// Most exits to user space until the agent is ready, with a container's devices.
const GOAL_EXITS: f64 = 200.0;
/// Most system calls before the first entry into a guest.
const GOAL_SYSTEM_CALLS: f64 = 150.0;
/// Most guest memory touched when the agent is ready, in MiB.
const GOAL_TOUCHED_MIB: f64 = 24.0;
/// Most processor time before a tiny guest runs, in milliseconds.
const GOAL_STARTUP_MS: f64 = 2.0;
/// The row that two measurements have.
const SYSTEM_CALLS: &str = "system calls before the guest runs";

/// Exit codes of coracle-vmm whose guest ended, as guests of each architecture can.
const POWER_OFF: i32 = 0;
const TRIPLE_FAULT: i32 = 4;

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
    to_ready(&options.tuned, false, || Ok(()))?;
    let (ready_ms, mut costs) = of_boot(options)?;
    if environment::counts_instructions() {
        let name = "instructions to agent, tuned kernel";
        costs.push(Cost { name, unit: "M", value: ready_ms, goal: None });
    }
    Ok(costs)
}

/// How many milliseconds a boot takes, and what each of its costs is.
fn of_boot(options: &Options) -> Result<(f64, Vec<Cost>)> {
    let (ready_ms, boot, ()) = to_ready(&options.tuned, options.verbose, || Ok(()))?;
    let cost = |name, unit, value, goal| Cost { name, unit, value, goal };
    let touched_mib = boot.memory.guest_ram_kib as f64 / 1024.0;
    let calls = system_calls()?;
    let costs = vec![
        cost(
            "exits to user space to agent, tuned kernel",
            "exits",
            boot.exits as f64,
            Some(GOAL_EXITS),
        ),
        cost(SYSTEM_CALLS, "calls", calls, Some(GOAL_SYSTEM_CALLS)),
        cost("guest memory touched at ready", "MiB", touched_mib, Some(GOAL_TOUCHED_MIB)),
        cost("allocations to agent, tuned kernel", "calls", boot.allocations as f64, None),
    ];
    Ok((ready_ms, costs))
}

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    eprintln!("costs: one boot");
    for Cost { name, unit, value, goal } in of_boot(options)?.1 {
        report.alone(name, unit, value, goal);
    }
    if report.counts_instructions() {
        let watch = Watch::start()?;
        let (.., guests) = to_ready(&options.tuned, false, || watch.stop())?;
        for (reason, count) in &guests.exits {
            let what = format!("exits of the guest to agent, {reason}");
            report.alone(&what, "exits", f64::from(*count), None);
        }
    }
    Ok(())
}

/// Measures what it takes until a guest of two instructions runs, and adds the rows.
pub fn startup(report: &mut Report, options: &Options) -> Result<()> {
    let kernel = tiny_kernel()?;
    let qemu = options.qemu();
    let (mut elapsed, mut processor) = (Samples::default(), Samples::default());
    let mut of_qemu = Samples::default();
    for run in 0..=options.runs {
        let mut machine = tiny_machine(kernel.path())?;
        let processor_ms = syscalls::processor_ms_before_first_entry(&machine)?;
        let elapsed_ms = time_to_end(&mut machine)?;
        let bare = qemu.as_ref().map(bare_qemu);
        let bare_ms = bare.as_ref().map(syscalls::processor_ms_before_first_entry).transpose()?;
        if run > 0 {
            elapsed.add(elapsed_ms);
            processor.add(processor_ms);
            bare_ms.into_iter().for_each(|ms| of_qemu.add(ms));
        }
    }
    report.samples("a machine with a tiny guest, start to end", ("ms", &elapsed), None);
    let what = "processor time before a tiny guest runs";
    report.samples(what, ("ms", &processor), Some(GOAL_STARTUP_MS));
    if let Some(qemu) = qemu {
        // How fast this machine is just now does not change it.
        let what = "processor time before a tiny guest runs, beside a bare machine";
        let name = qemu.to_string();
        report.pairs(what, ("ms", &processor), (&name, &of_qemu), None);
    }
    report.alone(SYSTEM_CALLS, "calls", system_calls()?, Some(GOAL_SYSTEM_CALLS));
    Ok(())
}

/// How many system calls `coracle-vmm` makes before its guest runs.
fn system_calls() -> Result<f64> {
    let kernel = tiny_kernel()?;
    Ok(syscalls::before_first_entry(&tiny_machine(kernel.path())?)? as f64)
}

fn tiny_kernel() -> Result<NamedTempFile> {
    let mut kernel = NamedTempFile::new().context("make a kernel of a few instructions")?;
    kernel.write_all(&payload::kernel(payload::END))?;
    Ok(kernel)
}

fn tiny_machine(kernel: &Path) -> Result<Command> {
    let mut command = Command::new(coracle_vmm()?);
    command.arg("--kernel").arg(kernel).args(["--memory", "256"]).stdin(Stdio::null());
    Ok(command)
}

/// QEMU's machine without a device or a kernel: its first instruction is its firmware's.
fn bare_qemu(qemu: &Peer) -> Command {
    let mut command = Command::new(qemu.program());
    command
        .args(["-M", QEMU.machine, "-cpu", QEMU.bare_processor, "-smp", "1", "-m", "256"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command
}

fn time_to_end(machine: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let output = machine.output()?;
    let elapsed_ms = started.elapsed().as_secs_f64() * 1e3;
    match output.status.code() {
        Some(TRIPLE_FAULT | POWER_OFF) => Ok(elapsed_ms),
        _ => bail!("coracle-vmm: {}", String::from_utf8_lossy(&output.stderr)),
    }
}
