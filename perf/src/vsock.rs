//! The guest's sockets through the unix socket of the socket device: throughput and round trip.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::guest::{Device, Guest, Machine};
use crate::report::Report;

/// Ports that the guest serves: one sends back, one swallows, one sends.
const ECHO: u32 = 5000;
const SINK: u32 = 5001;
const SOURCE: u32 = 5002;

/// Bytes of a transfer.
const TRANSFER_BYTES: u64 = 64 << 20;
/// Round trips that are timed.
const ROUND_TRIPS: u32 = 2000;
/// How long the guest may take to listen: its boot.
const BOOT: Duration = Duration::from_secs(60);

/// Measures and adds the rows.
pub fn measure(report: &mut Report, image: &Path, runs: u32) -> Result<()> {
    let load = format!("coracle-perf-load vsock {ECHO} {SINK} {SOURCE} {TRANSFER_BYTES}");
    let guest = Guest::new(image, &load, &["coracle-perf-load"])?;
    let mut best = [f64::INFINITY; 3];
    for run in 0..=runs {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("vsock");
        let _running = guest.start(Machine::Coracle, Device::Vsock { socket: &socket })?;
        let figures = [round_trip_us(&socket)?, to_guest(&socket)?, from_guest(&socket)?];
        eprintln!("vsock: run {run} of {runs}: {figures:.2?}");
        if run > 0 {
            best.iter_mut().zip(figures).for_each(|(best, value)| *best = best.min(value));
        }
    }
    report.alone("vsock round trip", "us", best[0], None);
    report.alone("vsock to the guest", "us/MiB", best[1], None);
    report.alone("vsock from the guest", "us/MiB", best[2], None);
    Ok(())
}

/// A stream to a port of the guest, once it listens.
fn dial(socket: &Path, port: u32) -> Result<UnixStream> {
    let deadline = Instant::now() + BOOT;
    while Instant::now() < deadline {
        if let Ok(mut stream) = UnixStream::connect(socket) {
            stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
            let mut answer = String::new();
            // One byte at a time, as what follows the line belongs to the stream.
            BufReader::with_capacity(1, &stream).read_line(&mut answer).unwrap_or_default();
            if answer.starts_with("OK ") {
                return Ok(stream);
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!("the guest does not listen on port {port}")
}

fn round_trip_us(socket: &Path) -> Result<f64> {
    let mut stream = dial(socket, ECHO)?;
    let mut byte = [1];
    let started = Instant::now();
    for _ in 0..ROUND_TRIPS {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS))
}

/// Microseconds a MiB until the guest has read all, which it says with one byte.
fn to_guest(socket: &Path) -> Result<f64> {
    let mut stream = dial(socket, SINK)?;
    let started = Instant::now();
    std::io::copy(&mut std::io::repeat(1).take(TRANSFER_BYTES), &mut stream)?;
    stream.read_exact(&mut [0])?;
    Ok(us_per_mib(started))
}

fn from_guest(socket: &Path) -> Result<f64> {
    let stream = dial(socket, SOURCE)?;
    let started = Instant::now();
    let bytes = std::io::copy(&mut &stream, &mut std::io::sink())?;
    if bytes != TRANSFER_BYTES {
        bail!("the guest sent {bytes} bytes");
    }
    Ok(us_per_mib(started))
}

fn us_per_mib(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e6 / (TRANSFER_BYTES >> 20) as f64
}
