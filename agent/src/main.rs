//! PID 1 of the guest: makes the guest ready, connects to the host and serves until the host is
//! done, then powers off.
//!
//! `coracle-agent serve CONTROL_FD STDIO_FD CGROUP_ROOT` serves on descriptors it inherited and
//! leaves the machine alone: that is how tests run it.

mod container;
mod control;
mod devices;
mod failure;
mod greeting;
mod growth;
mod init;
mod kmsg;
mod lifecycle;
mod limits;
mod network;
mod processors;
mod reaper;
mod redirection;
mod repeating;
mod resolver;
mod resumed;
mod sandbox;
mod server;
mod stdio;

use std::env;
use std::error::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use agent_protocol::{CONTROL_PORT, STDIO_PORT};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
};

use failure::Context;
use server::{Server, uptime_us};

/// The address of the host (vsock(7)).
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Stdio streams the kernel holds until the agent accepts them, which it does not while it freezes
/// or removes a cgroup. The kernel refuses more.
const BACKLOG: i32 = 1024;

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT` of linux/vm_sockets.h, with the kernel's own kind of timeval.
const CONNECT_TIMEOUT: libc::c_int = 6;
/// How long the host may take to answer, in seconds: it gives up a guest that is not ready long before.
const CONNECT_TIMEOUT_S: libc::time_t = 600;

/// Where the kernel shows the firmware tables that tell it how to switch the machine off.
const POWER_CONTROL: [&str; 2] = ["/sys/firmware/acpi", "/sys/firmware/devicetree/base"];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.first().is_some_and(|verb| verb == "serve") {
        return serve_inherited(&arguments[1..]);
    }
    if std::process::id() != 1 {
        eprintln!("coracle-agent: this is the first process of a Coracle guest, not a command");
        return ExitCode::FAILURE;
    }
    if let Err(error) = serve_host() {
        log::error!("{error}");
    }
    power_off()
}

fn serve_host() -> Result<(), Box<dyn Error>> {
    let started_us = uptime_us()?;
    init::prepare().inspect_err(|_| kmsg::install())?;
    // Listening first: the host may open streams as soon as it knows that the agent is there.
    let listener = vsock().context("make a vsock socket")?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, STDIO_PORT))?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    loop {
        let control = vsock()?;
        be_patient(&control).context("have a connection wait")?;
        connect(control.as_raw_fd(), &VsockAddr::new(HOST_CID, CONTROL_PORT))
            .context("connect to the host")?;
        let cgroups = PathBuf::from(init::CGROUPS);
        let mut server = Server::new(control, listener.try_clone()?, cgroups, started_us)?;
        match server.run() {
            // This guest goes on from a template, and that had another host.
            Err(error) if !server.was_asked() => log::info!("connect anew: {error}"),
            outcome => return Ok(outcome?),
        }
    }
}

fn vsock() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

/// Has the kernel wait for the host's answer for longer than the two seconds that it waits of its own
/// accord: a host on which many guests start at once may take them, and has its own patience.
fn be_patient(socket: &OwnedFd) -> nix::Result<()> {
    let wait = libc::timeval { tv_sec: CONNECT_TIMEOUT_S, tv_usec: 0 };
    let bytes = libc::socklen_t::try_from(size_of_val(&wait)).expect("it is small");
    let value = (&raw const wait).cast();
    // SAFETY: the value is a timeval of that size, and outlives the call that reads it.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::AF_VSOCK, CONNECT_TIMEOUT, value, bytes)
    };
    Errno::result(set).map(drop)
}

fn power_off() -> ExitCode {
    init::finish();
    // A kernel that cannot switch off halts instead, for good, and does not say so before: on a
    // machine that is described neither by ACPI nor by a device tree only a reset ends the guest.
    if POWER_CONTROL.iter().any(|path| Path::new(path).exists()) {
        let _ = reboot(RebootMode::RB_POWER_OFF);
    }
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    ExitCode::FAILURE
}

fn serve_inherited(arguments: &[String]) -> ExitCode {
    kmsg::install_stderr();
    let [control, listener, cgroups] = arguments else {
        eprintln!("usage: coracle-agent serve CONTROL_FD STDIO_FD CGROUP_ROOT");
        return ExitCode::FAILURE;
    };
    match serve_descriptors(control, listener, cgroups) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coracle-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve_descriptors(control: &str, listener: &str, cgroups: &str) -> Result<(), Box<dyn Error>> {
    let (control, listener): (RawFd, RawFd) = (control.parse()?, listener.parse()?);
    if control < 3 || listener < 3 || control == listener {
        return Err("descriptors have to be two, and above standard error".into());
    }
    // SAFETY: whoever started this process gave it these descriptors; nothing else here owns them.
    let owned = |number| unsafe { OwnedFd::from_raw_fd(number) };
    let cgroups = PathBuf::from(cgroups);
    container::cgroup::prepare(&cgroups)?;
    limits::raise()?;
    Ok(Server::new(owned(control), owned(listener), cgroups, uptime_us()?)?.run()?)
}
