//! `events`: counters of a container, and its running out of memory, as JSON lines.

use std::thread;
use std::time::Duration;

use agent_protocol::{InterfaceStats, Stats};
use anyhow::{Context, bail, ensure};
use coracle::sandbox::Client;
use coracle::state::Status;
use serde_json::{Map, Value, json};

use super::Globals;

/// How often the container is looked at for running out of memory, between two intervals.
const OOM_POLL: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Args {
    /// Time between two statistics, such as 500ms, 5s or 1m
    #[arg(long, default_value = "5s")]
    interval: String,
    /// Print the statistics once and exit
    #[arg(long)]
    stats: bool,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    let interval = parse_duration(&args.interval)?;
    ensure!(!interval.is_zero(), "duration interval must be greater than 0");
    let (dir, state) = globals.container(&args.id)?;
    if state.status == Status::Stopped {
        bail!("container with id {} is not running", state.id);
    }
    let client = Client::connect(&dir)?;
    let mut stats = client.stats()?;
    print(&state.id, "stats", Some(&stats))?;
    if args.stats {
        return Ok(());
    }
    let mut waited = Duration::ZERO;
    loop {
        let step = interval.saturating_sub(waited).min(OOM_POLL);
        thread::sleep(step);
        waited += step;
        // The events of a container end with it.
        let Ok(newer) = client.stats() else { return Ok(()) };
        if newer.oom_kills > stats.oom_kills {
            print(&state.id, "oom", None)?;
        }
        stats = newer;
        if waited >= interval {
            waited = Duration::ZERO;
            print(&state.id, "stats", Some(&stats))?;
        }
    }
}

fn print(id: &str, kind: &str, stats: Option<&Stats>) -> anyhow::Result<()> {
    let mut event = Map::from_iter([("type".into(), kind.into()), ("id".into(), id.into())]);
    if let Some(stats) = stats {
        event.insert("data".into(), data(stats));
    }
    super::print(&format!("{}\n", Value::Object(event)))
}

/// The counters in the shape of runc's `events`.
fn data(stats: &Stats) -> Value {
    let (periods, throttled_periods, throttled_us) = stats.cpu_throttling;
    let raw: Map<String, Value> =
        stats.memory_stat.iter().map(|(name, value)| (name.clone(), (*value).into())).collect();
    json!({
        "cpu": {
            "usage": {
                "total": nanoseconds(stats.cpu_usage_us),
                "kernel": nanoseconds(stats.cpu_system_us),
                "user": nanoseconds(stats.cpu_user_us),
            },
            "throttling": {
                "periods": periods,
                "throttledPeriods": throttled_periods,
                "throttledTime": nanoseconds(throttled_us),
            },
        },
        "cpuset": {},
        "memory": {
            "usage": {
                "limit": stats.memory_limit,
                "usage": stats.memory_usage,
                "max": stats.memory_peak,
                "failcnt": stats.oom_kills,
            },
            "swap": {"limit": 0, "failcnt": 0},
            "kernel": {"limit": 0, "failcnt": 0},
            "kernelTCP": {"limit": 0, "failcnt": 0},
            "raw": raw,
        },
        "pids": {"current": stats.pids_current, "limit": pids_limit(stats.pids_limit)},
        "blkio": {},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": stats.interfaces.iter().map(interface).collect::<Vec<_>>(),
    })
}

fn interface(interface: &InterfaceStats) -> Value {
    let [rx_bytes, rx_packets, rx_errors, rx_dropped] = interface.received;
    let [tx_bytes, tx_packets, tx_errors, tx_dropped] = interface.sent;
    json!({
        "Name": interface.name,
        "RxBytes": rx_bytes,
        "RxPackets": rx_packets,
        "RxErrors": rx_errors,
        "RxDropped": rx_dropped,
        "TxBytes": tx_bytes,
        "TxPackets": tx_packets,
        "TxErrors": tx_errors,
        "TxDropped": tx_dropped,
    })
}

fn nanoseconds(microseconds: u64) -> u64 {
    microseconds.saturating_mul(1000)
}

/// runc says 0 for no limit here.
fn pids_limit(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

/// A duration as Go writes one: numbers with units, one after the other.
fn parse_duration(text: &str) -> anyhow::Result<Duration> {
    let invalid = || format!("invalid duration {text:?}: use a number and a unit, such as 5s");
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').with_context(invalid)?;
        let (number, tail) = rest.split_at(digits);
        let unit_end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, next) = tail.split_at(unit_end);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => bail!(invalid()),
        };
        let number: f64 = number.parse().ok().with_context(invalid)?;
        let part = Duration::try_from_secs_f64(number * seconds).ok().with_context(invalid)?;
        total = total.checked_add(part).with_context(invalid)?;
        rest = next;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_in_go() {
        assert_eq!(parse_duration("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(parse_duration("1m30s").unwrap(), Duration::from_secs(90));
        assert_eq!(parse_duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert!(parse_duration("5").is_err());
        assert!(parse_duration("5 s").is_err());
        assert!(parse_duration("s").is_err());
    }

    #[test]
    fn counters_have_the_shape_of_runc() {
        let stats = Stats {
            cpu_usage_us: 3,
            memory_usage: 4096,
            memory_stat: vec![("anon".into(), 7)],
            pids_current: 2,
            pids_limit: u64::MAX,
            ..Stats::default()
        };

        let data = data(&stats);

        assert_eq!(data["cpu"]["usage"]["total"], 3000);
        assert_eq!(data["memory"]["usage"]["usage"], 4096);
        assert_eq!(data["memory"]["raw"]["anon"], 7);
        assert_eq!(data["pids"], json!({"current": 2, "limit": 0}));
    }
}
