//! `update`: change the limits of a container.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use coracle::sandbox::{self, Client};
use coracle::state::Status;
use coracle::{bundle, translate};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use super::Globals;

#[derive(clap::Args)]
pub struct Args {
    /// File with an OCI resources object, or - for stdin; the other options are then ignored
    #[arg(long, short = 'r', value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// CPU period in microseconds
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU time per period in microseconds
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// CPU shares
    #[arg(long, value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// Real-time CPU period in microseconds; without effect, as with runc on cgroup v2
    #[arg(long, value_name = "US")]
    cpu_rt_period: Option<u64>,
    /// Real-time CPU time per period in microseconds; without effect, as with runc on cgroup v2
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,
    /// Processors of the host to use
    #[arg(long, value_name = "CPUS")]
    cpuset_cpus: Option<String>,
    /// Memory nodes of the host to use
    #[arg(long, value_name = "NODES")]
    cpuset_mems: Option<String>,
    /// Memory limit in bytes, or with a unit such as 64m
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    memory: Option<String>,
    /// Memory that is kept from reclaim, in bytes
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    memory_reservation: Option<String>,
    /// Limit of memory and swap together, in bytes; -1 for none
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    memory_swap: Option<String>,
    /// Most processes
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Accepted as runc has it; the host's caches are not the guest's
    #[arg(long, value_name = "SCHEMA", hide = true)]
    l3_cache_schema: Option<String>,
    /// Accepted as runc has it; the host's memory bandwidth is not the guest's
    #[arg(long, value_name = "SCHEMA", hide = true)]
    mem_bw_schema: Option<String>,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    let (dir, state) = globals.container(&args.id)?;
    ensure!(state.status != Status::Stopped, "container not running");
    let resources = match &args.resources {
        Some(path) => read(path)?,
        None => from_flags(args)?,
    };
    let files = translate::cgroup_files(&resources)?;
    let client = Client::connect(&dir)?;
    let room = client.room()?;
    let change = room.change(&resources)?;
    sandbox::limit(&state, &resources, &room, change)?;
    Ok(client.update(change, files)?)
}

fn read(path: &Path) -> anyhow::Result<LinuxResources> {
    let mut text = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut text).context("read resources from stdin")?;
    } else {
        text = std::fs::read(path).with_context(|| format!("open {}", path.display()))?;
    }
    Ok(bundle::parse(path, &text)?)
}

fn from_flags(args: &Args) -> anyhow::Result<LinuxResources> {
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(args.memory.as_deref().map(bytes).transpose()?)
        .set_reservation(args.memory_reservation.as_deref().map(bytes).transpose()?)
        .set_swap(args.memory_swap.as_deref().map(bytes).transpose()?);
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(args.cpu_share)
        .set_quota(args.cpu_quota)
        .set_period(args.cpu_period)
        .set_realtime_runtime(args.cpu_rt_runtime)
        .set_realtime_period(args.cpu_rt_period)
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    let mut resources = LinuxResources::default();
    resources.set_memory(Some(memory).filter(|memory| *memory != LinuxMemory::default()));
    resources.set_cpu(Some(cpu).filter(|cpu| *cpu != LinuxCpu::default()));
    if let Some(limit) = args.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    if let Some(weight) = args.blkio_weight {
        let mut block_io = LinuxBlockIo::default();
        block_io.set_weight(Some(weight));
        resources.set_block_io(Some(block_io));
    }
    Ok(resources)
}

/// A size in bytes, with a binary unit if it has one (`64m`, `1GiB`), or -1.
fn bytes(text: &str) -> anyhow::Result<i64> {
    let invalid = || format!("invalid size {text:?}: use bytes, or a number with k, m, g or t");
    if text == "-1" {
        return Ok(-1);
    }
    let lower = text.to_ascii_lowercase();
    let unit_start = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(unit_start);
    let shift = match unit {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => anyhow::bail!(invalid()),
    };
    let number: i64 = number.parse().ok().with_context(invalid)?;
    number.checked_mul(1 << shift).with_context(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn resources(line: &[&str]) -> LinuxResources {
        let words = ["update"].iter().chain(line).chain(&["box"]);
        from_flags(&<Line as clap::Parser>::try_parse_from(words).unwrap().args).unwrap()
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(bytes("4096").unwrap(), 4096);
        assert_eq!(bytes("64m").unwrap(), 64 << 20);
        assert_eq!(bytes("1GiB").unwrap(), 1 << 30);
        assert_eq!(bytes("-1").unwrap(), -1);
        assert!(bytes("x").is_err() && bytes("-2").is_err() && bytes("9999999t").is_err());
    }

    #[test]
    fn nothing_asked_is_nothing_changed() {
        assert_eq!(resources(&[]), LinuxResources::default());
    }

    #[test]
    fn flags_become_limits() {
        let resources = resources(&[
            "--memory",
            "64m",
            "--memory-swap",
            "-1",
            "--cpu-quota",
            "-1",
            "--pids-limit",
            "9",
        ]);

        let memory = resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(64 << 20), Some(-1)));
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(-1));
        assert_eq!(resources.pids().unwrap().limit(), 9);
    }

    #[test]
    fn resources_in_a_file_are_checked_for_unknown_fields() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"memory": {"limt": 1}}"#).unwrap();

        let error = read(file.path()).unwrap_err();

        assert!(error.to_string().contains("unknown field memory.limt"), "{error}");
    }
}
