//! `coracle-perf`: what Coracle costs, beside what its peers cost in the same run.
//!
//! Run it in the lab with `LAB_ICOUNT=1` (`make perf` does): one emulated instruction is one
//! nanosecond there, so that a duration is a count of instructions and repeats within a few percent
//! whatever else the machine does. Elsewhere durations are what they are: compare them in one run.

mod agent_peer;
mod baseline;
mod block;
mod boot;
mod containers;
mod costs;
mod environment;
mod fs;
mod guest;
mod guest_time;
mod memory;
mod net;
mod peer;
mod plot;
mod report;
mod samples;
mod syscalls;
mod vmm_peer;
mod vsock;

use std::alloc::System;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use arch::peer::QEMU;
use clap::{Parser, Subcommand};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

use crate::containers::Phase;
use crate::environment::Environment;
use crate::peer::{Kind, Peer};
use crate::report::Report;

/// Programs whose versions say what was compared.
const PROGRAMS: [&str; 4] = ["coracle", "runc", "crun", QEMU.program];

/// Counts what a guest's process takes from its heap.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Measures Coracle beside its peers.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// How often each measurement is taken, after one round that warms caches.
    #[arg(long, global = true, default_value_t = 3)]
    runs: u32,
    /// Whom to stand beside, as NAME or NAME=PROGRAM; may be given again: runc, crun, kata (by Docker),
    /// qemu-microvm (on Arm qemu-virt), firecracker, cloud-hypervisor [default: runc and QEMU, if
    /// installed].
    #[arg(long = "peer", global = true, value_name = "NAME[=PROGRAM]")]
    peers: Vec<Peer>,
    /// Prints the figures as JSON instead of a table.
    #[arg(long, global = true)]
    json: bool,
    /// Writes the figures as JSON to report.json in this folder, and plots as SVG to plots/ in it.
    #[arg(long, global = true, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Adds the figures of this report.json, which was written where this run does not take place.
    #[arg(long, global = true, value_name = "FILE")]
    add: Option<PathBuf>,
    /// Folder with a guest image of Debian's kernel (`kernel`, `initrd`).
    #[arg(long, global = true, default_value = "/var/lib/coracle/guest-distro")]
    distro: PathBuf,
    /// Folder with a guest image of the tuned kernel.
    #[arg(long, global = true, default_value = "/var/lib/coracle/guest-tuned")]
    tuned: PathBuf,
    /// Says on stderr where exits come from, what resident memory consists of, and who wakes up.
    #[arg(long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
enum Measurement {
    /// Boot, costs, start, exec, phases, memory, density, idle and parallel; the others take long.
    All,
    /// Guest boot to agent ready, and to init beside other VMMs: time, and exits in the counting lab.
    Boot,
    /// What repeats on a busy machine until the agent is ready: exits, system calls, allocations, memory
    /// touched.
    Costs,
    /// `run` of `true`, beside other runtimes.
    Start,
    /// The same through Docker.
    Docker,
    /// `exec` of `true` in a container that idles, beside other runtimes.
    Exec,
    /// Bytes through the standard input and output of a container, beside other runtimes.
    Stdio,
    /// What each of several idle containers costs the host.
    Density,
    /// Many idle containers of Docker's: memory of everything, `docker stats` of all; beside other runtimes.
    Crowd {
        /// How many.
        #[arg(long, default_value_t = 100)]
        containers: usize,
    },
    /// How often the threads of an idle container wake up, and its guest is left.
    Idle,
    /// Fifty containers that start at once.
    Parallel,
    /// What a start spends its time on.
    Phases,
    /// From the start of the process to the guest's first instruction; needs no lab.
    Startup,
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
    /// Compares the costs with those in FILE; fails if one has grown beyond its tolerance.
    Check {
        /// What `--update` wrote.
        file: PathBuf,
        /// Writes what is measured into the file instead.
        #[arg(long)]
        update: bool,
    },
    /// Boots one guest, says what it cost as JSON and ends: the other measurements start it.
    #[command(hide = true)]
    Guest,
}

impl Options {
    /// Whom to stand beside.
    fn peers(&self) -> Vec<Peer> {
        if self.peers.is_empty() { Peer::usual() } else { self.peers.clone() }
    }

    /// QEMU, if it is one of them.
    fn qemu(&self) -> Option<Peer> {
        self.peers().into_iter().find(|peer| peer.kind == Kind::Qemu)
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    match &options.measurement {
        Measurement::Guest => return boot::guest(&options.tuned, options.verbose),
        Measurement::Check { file, update } => return baseline::check(&options, file, *update),
        _ => {}
    }
    if let Some(missing) = options.peers.iter().find(|peer| !peer.is_there()) {
        bail!("{missing}: no program {:?}: install it, or name its path", missing.program());
    }
    let mut report = Report::new(Environment::of(&PROGRAMS), options.runs as usize);
    let phases = measure(&mut report, &options)?;
    if let Some(path) = &options.add {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let other = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        report.add(other);
    }
    if let Some(folder) = &options.output {
        write(&report, &phases, folder)?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}

/// Takes the measurements that are wanted; the phases of a start, if they are among them.
fn measure(report: &mut Report, options: &Options) -> Result<Vec<Phase>> {
    let mut phases = Vec::new();
    let (tuned, runs) = (&options.tuned, options.runs);
    match options.measurement {
        Measurement::All => {
            boot::measure(report, options)?;
            costs::measure(report, options)?;
            containers::start(report, options)?;
            containers::exec(report, options)?;
            phases = containers::phases(report, options)?;
            memory::measure(report, options)?;
            containers::density(report, options)?;
            containers::idle(report, options)?;
            containers::parallel(report, options)?;
        }
        Measurement::Boot => boot::measure(report, options)?,
        Measurement::Costs => costs::measure(report, options)?,
        Measurement::Start => containers::start(report, options)?,
        Measurement::Docker => containers::docker(report, options)?,
        Measurement::Exec => containers::exec(report, options)?,
        Measurement::Stdio => containers::stdio(report, options)?,
        Measurement::Density => containers::density(report, options)?,
        Measurement::Crowd { containers } => containers::crowd(report, options, containers)?,
        Measurement::Idle => containers::idle(report, options)?,
        Measurement::Parallel => containers::parallel(report, options)?,
        Measurement::Phases => phases = containers::phases(report, options)?,
        Measurement::Startup => costs::startup(report, options)?,
        Measurement::Memory => memory::measure(report, options)?,
        Measurement::Block => block::measure(report, tuned, runs)?,
        Measurement::Net => net::measure(report, tuned, runs)?,
        Measurement::Fs => fs::measure(report, tuned, runs)?,
        Measurement::Vsock => vsock::measure(report, tuned, runs)?,
        Measurement::Check { .. } | Measurement::Guest => {
            unreachable!("main() is done with these")
        }
    }
    Ok(phases)
}

fn write(report: &Report, phases: &[Phase], folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let text = serde_json::to_string_pretty(report)? + "\n";
    let path = folder.join("report.json");
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    let plots = folder.join("plots");
    std::fs::create_dir_all(&plots).with_context(|| format!("create {}", plots.display()))?;
    plot::ratios(report, &plots.join("ratios.svg"))?;
    if !phases.is_empty() {
        plot::waterfall(phases, &plots.join("phases.svg"))?;
    }
    Ok(())
}
