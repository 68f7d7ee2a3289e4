//! `coracle-perf`: what Coracle costs, beside what its peers cost in the same run.
//!
//! Run it in the lab with `LAB_ICOUNT=1` (`make perf` does): one emulated instruction is one
//! nanosecond there, so that a duration is a count of instructions and repeats within a few percent
//! whatever else the machine does. Elsewhere durations are what they are: compare them in one run.

mod block;
mod boot;
mod containers;
mod fs;
mod guest;
mod memory;
mod net;
mod report;
mod vsock;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::report::Report;

/// Measures Coracle beside its peers.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// How often each measurement is taken; the table shows the smallest, as all noise only adds.
    #[arg(long, global = true, default_value_t = 3)]
    runs: u32,
    /// Prints the figures as JSON instead of a table.
    #[arg(long, global = true)]
    json: bool,
    /// Folder with a guest image of Debian's kernel (`kernel`, `initrd`).
    #[arg(long, global = true, default_value = "/var/lib/coracle/guest-distro")]
    distro: PathBuf,
    /// Folder with a guest image of the tuned kernel.
    #[arg(long, global = true, default_value = "/var/lib/coracle/guest-tuned")]
    tuned: PathBuf,
    /// Says on stderr where exits come from and what resident memory consists of.
    #[arg(long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
enum Measurement {
    /// Boot, run and memory; the others take many minutes.
    All,
    /// Guest boot to agent ready, beside QEMU microvm to init, with exits to user space.
    Boot,
    /// `coracle run` of `true` beside `runc run`.
    Run,
    /// The host process's own memory beyond guest RAM, with the guest ready and idle.
    Memory,
    /// fio on a disk, beside QEMU microvm on the same one.
    Block,
    /// TCP through a tap, beside QEMU microvm on the same one.
    Net,
    /// Small files on a share, beside the same without a guest.
    Fs,
    /// The guest's sockets.
    Vsock,
    /// Boots one guest, says what it cost as JSON and ends: the other measurements start it.
    #[command(hide = true)]
    Guest,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if options.measurement == Measurement::Guest {
        return boot::guest(&options.tuned, options.verbose);
    }
    let wanted = |one| [one, Measurement::All].contains(&options.measurement);
    let mut report = Report::default();
    if wanted(Measurement::Boot) {
        boot::measure(&mut report, &options)?;
    }
    if wanted(Measurement::Run) {
        containers::measure(&mut report, &options.tuned, options.runs)?;
    }
    if wanted(Measurement::Memory) {
        memory::measure(&mut report, &options)?;
    }
    let (tuned, runs) = (&options.tuned, options.runs);
    match options.measurement {
        Measurement::Block => block::measure(&mut report, tuned, runs)?,
        Measurement::Net => net::measure(&mut report, tuned, runs)?,
        Measurement::Fs => fs::measure(&mut report, tuned, runs)?,
        Measurement::Vsock => vsock::measure(&mut report, tuned, runs)?,
        _ => {}
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}
