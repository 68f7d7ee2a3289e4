//! TCP between a guest and the host over a tap: throughput by iperf3 and the time of a round trip,
//! beside `virtio-net` of QEMU microvm on the same tap, served by the VMMs and by the host's kernel.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Result, bail};

use crate::guest::{self, Device, Guest};
use crate::report::Report;

/// Most of the peer's time that a byte or a round trip may take.
const GOAL: f64 = 1.0;
const TAP: &str = "perf0";
const HOST: &str = "192.168.242.1";
const ECHO_PORT: u16 = 7;

const SCRIPT: &str = "
ip link set lo up; ip link set eth0 up; ip address add 192.168.242.2/24 dev eth0
tcp() {
  name=$1; shift
  iperf3 --client 192.168.242.1 --format m --time 1 \"$@\" > /tmp/iperf3 || cat /tmp/iperf3
  awk -v name=$name '/receiver/ {for (i = 2; i <= NF; i++) if ($i == \"Mbits/sec\")
    print \"FIGURE\", name, 8388608 / ($(i - 1))}' /tmp/iperf3
}
tcp transmit
tcp receive --reverse
coracle-perf-load round-trips 192.168.242.1:7
";

/// Measures and adds the rows.
pub fn measure(report: &mut Report, image: &Path, runs: u32) -> Result<()> {
    let _tap = Tap::new()?;
    let _server = Server::new()?;
    serve_echo(TcpListener::bind((HOST, ECHO_PORT))?);
    let guest = Guest::new(image, SCRIPT, &["iperf3", "coracle-perf-load"])?;
    for (vhost, by) in [(false, "by the VMM"), (true, "by vhost")] {
        let device = Device::Net { tap: TAP, vhost };
        for (name, ours, theirs) in guest::pairs(&guest, device, runs)? {
            let unit = if name == "round-trip" { "us" } else { "us/MiB" };
            let what = format!("TCP {name}, {by}");
            report.beside(&what, (unit, ours), ("qemu microvm", theirs), Some(GOAL));
        }
    }
    Ok(())
}

/// Sends back what it gets, to one client after the other.
fn serve_echo(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that goes away ends its own connection only.
            let _ = echo(stream);
        }
    });
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            count => stream.write_all(&bytes[..count])?,
        }
    }
}

/// The server of iperf3, for as long as this lives.
struct Server(Child);

impl Server {
    fn new() -> Result<Self> {
        let mut command = Command::new("iperf3");
        Ok(Server(command.args(["--server", "--bind", HOST]).stdout(Stdio::null()).spawn()?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The tap, for as long as this lives.
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        ip(&format!("tuntap add {TAP} mode tap vnet_hdr"))?;
        let tap = Tap;
        ip(&format!("address add {HOST}/24 dev {TAP}"))?;
        ip(&format!("link set {TAP} up"))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(error) = ip(&format!("link delete {TAP}")) {
            eprintln!("{error}");
        }
    }
}

fn ip(arguments: &str) -> Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status()?;
    if !status.success() {
        bail!("ip {arguments}: {status}");
    }
    Ok(())
}
