//! What `coracle-perf` has a guest do, and says of it one `FIGURE <name> <number>` a line: less than
//! the tools of the field do, but the same with and without a guest, and static.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

/// Files of one directory.
const FILES: u32 = 1000;
/// Size of each, in bytes.
const FILE_BYTES: usize = 4096;
/// Round trips that are timed.
const ROUND_TRIPS: u32 = 2000;
/// Bytes that are read or written at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Whatever number the guest has (VMADDR_CID_ANY).
const ANY_CID: u32 = u32::MAX;

/// Carries out one load.
#[derive(Parser)]
enum Load {
    /// Creates small files, asks for their status, reads and removes them.
    Files { folder: PathBuf },
    /// Exchanges single bytes over TCP with a server that sends back what it gets.
    RoundTrips { server: SocketAddr },
    /// Serves three ports of the guest's sockets: one sends back, one reads `bytes`, one writes them.
    Vsock { echo: u32, sink: u32, source: u32, bytes: u64 },
}

fn main() -> Result<()> {
    match Load::parse() {
        Load::Files { folder } => files(&folder),
        Load::RoundTrips { server } => round_trips(server),
        Load::Vsock { echo: echo_port, sink, source, bytes } => {
            let servers = [
                thread::spawn(move || listen(echo_port, echo)),
                thread::spawn(move || listen(sink, |stream| swallow(stream, bytes))),
                thread::spawn(move || listen(source, |stream| send(stream, bytes))),
            ];
            servers.into_iter().try_for_each(|one| one.join().expect("a server does not panic"))
        }
    }
}

fn files(folder: &Path) -> Result<()> {
    let contents = [7; FILE_BYTES];
    each_file("create", folder, |path| fs::write(path, contents))?;
    each_file("status", folder, |path| fs::metadata(path).map(drop))?;
    each_file("read", folder, |path| fs::read(path).map(drop))?;
    each_file("remove", folder, |path| fs::remove_file(path))
}

fn each_file(name: &str, folder: &Path, act: impl Fn(&Path) -> io::Result<()>) -> Result<()> {
    let started = Instant::now();
    for file in 0..FILES {
        act(&folder.join(format!("file-{file}")))?;
    }
    say(name, started, FILES);
    Ok(())
}

fn round_trips(server: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    let mut byte = [1];
    let started = Instant::now();
    for _ in 0..ROUND_TRIPS {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    say("round-trip", started, ROUND_TRIPS);
    Ok(())
}

/// Microseconds that each of `count` took.
fn say(name: &str, started: Instant, count: u32) {
    println!("FIGURE {name} {:.3}", started.elapsed().as_secs_f64() * 1e6 / f64::from(count));
}

fn listen(port: u32, serve: impl Fn(UnixStream) -> io::Result<()>) -> Result<()> {
    let listener =
        socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(listener.as_raw_fd(), &VsockAddr::new(ANY_CID, port))?;
    socket::listen(&listener, Backlog::new(1)?)?;
    loop {
        let fd = socket::accept(listener.as_raw_fd())?;
        // SAFETY: the descriptor was just made and has no other owner.
        let stream = unsafe { OwnedFd::from_raw_fd(fd) };
        // A client that goes away ends its own connection only. The type is the one of the standard
        // library for a stream socket; that its family is another does not matter to it.
        let _ = serve(UnixStream::from(stream));
    }
}

fn echo(mut stream: UnixStream) -> io::Result<()> {
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            count => stream.write_all(&bytes[..count])?,
        }
    }
}

/// Reads `bytes` and says so with one byte.
fn swallow(mut stream: UnixStream, bytes: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            count => left = left.saturating_sub(count as u64),
        }
    }
    stream.write_all(&[1])
}

fn send(mut stream: UnixStream, bytes: u64) -> io::Result<()> {
    let chunk = vec![1; CHUNK_BYTES];
    for _ in 0..bytes / chunk.len() as u64 {
        stream.write_all(&chunk)?;
    }
    Ok(())
}
