//! The process that holds one virtual machine, and how the verbs talk to it.
//!
//! `create` starts this program once more as [`SANDBOX_VERB`] (`launch.rs`). That process becomes
//! the container on the host (`process.rs`): it carries the container's stdio, lives in its network
//! namespace and cgroup, holds the virtual machine, serves later verbs over a socket in the state
//! folder (`serve.rs`, `control.rs`), and exits with the exit code of the container's program. An
//! `exec` is one more process, [`EXEC_VERB`], that stands for a process in the guest (`exec.rs`).
//!
//! Descriptors passed with `--preserve-fds` stay on the host: a descriptor of one kernel means
//! nothing to another.

mod agent;
mod boot;
mod cgroup;
mod client;
mod console;
mod control;
mod disks;
mod error;
mod exec;
mod folder;
mod growth;
mod hairpin;
mod hooks;
mod launch;
mod machine;
mod namespaces;
mod netlink;
mod network;
mod oom;
mod pidfd;
mod probe;
mod process;
mod requests;
mod resize;
mod resolver;
mod rewire;
mod serve;
mod share;
mod signals;
mod start;
mod stdio;
mod streams;
mod telling;
mod template;
mod view;

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

pub use client::Client;
pub use error::Error;
pub use exec::{ExecOptions, ExecOutcome, exec};
use machine::{Change, Room};
pub use oom::{VICTIM_VERB, victim};
pub use probe::boot;

use crate::bundle::Bundle;
use crate::logging::{LogOptions, chain};
use crate::settings::Settings;
use crate::state::{self, ContainerDir, State};
use folder::Later;
use launch::Launched;
use pidfd::Pidfd;

/// Hidden verb of the process that holds a virtual machine; its arguments are the number of an
/// inherited descriptor and, for those who read `ps`, the container id. Its body is [`main`].
pub const SANDBOX_VERB: &str = "sandbox-process";

/// Hidden verb of the process that stands for an `exec`, with the same arguments. Its body is
/// [`exec_main`].
pub const EXEC_VERB: &str = "exec-process";

/// How long a killed process may take to be gone: it waits for its files and devices.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// What `create` was asked for, beside the bundle.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CreateOptions {
    /// Where the sandbox's pid is written.
    pub pid_file: Option<PathBuf>,
    /// Where the master of a new terminal is sent.
    pub console_socket: Option<PathBuf>,
    /// `--no-pivot`; without effect, as the guest's agent chooses how to change the root.
    pub no_pivot: bool,
    /// `--preserve-fds`; without effect, see above.
    pub preserve_fds: u32,
    /// Whether systemd makes the host cgroup.
    pub systemd_cgroup: bool,
    /// Where the sandbox logs.
    pub log: LogOptions,
    /// The guest.
    pub settings: Settings,
    /// When the verb began, in nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
}

/// Creates the container of `bundle` in the new folder `dir` and returns the pid of its sandbox
/// process, a child of this one. On failure nothing is left, the folder included.
pub fn create(dir: &ContainerDir, bundle: &Bundle, options: &CreateOptions) -> Result<i32, Error> {
    let created = created(dir, bundle, options);
    if created.is_err() && dir.path().exists() {
        // The process has taken everything back, unless it was killed on the way. Only what it has
        // noted down is its own.
        let destroyed = dir.load().map_err(Error::from).and_then(|state| destroy(dir, &state));
        match destroyed {
            Ok(()) | Err(Error::State(state::Error::Missing(_))) => {}
            Err(error) => log::warn!("{}", chain(&error)),
        }
        folder::remove(dir);
    }
    created
}

fn created(dir: &ContainerDir, bundle: &Bundle, options: &CreateOptions) -> Result<i32, Error> {
    let mut options = options.clone();
    options.console_socket = options.console_socket.as_deref().map(absolute);
    options.log.path = options.log.path.as_deref().map(absolute);
    let settings = &mut options.settings;
    settings.kernel = absolute(&settings.kernel);
    settings.rootfs = settings.rootfs.as_deref().map(absolute);
    settings.initrd = settings.initrd.as_deref().map(absolute);
    let pid_file = options.pid_file.take();
    let order = process::Order {
        root: dir.path().parent().map(absolute).unwrap_or_default(),
        id: dir.id().to_string(),
        bundle: bundle.path.clone(),
        options,
    };
    let mut launched = Launched::start(SANDBOX_VERB, dir.id().as_str(), &order)?;
    launched.wait_ready()?;
    let pid = launched.pid();
    if let Some(path) = pid_file {
        if let Err(error) = write_pid_file(&path, pid) {
            launched.abandon();
            return Err(error);
        }
    }
    launched.commit()?;
    Ok(pid)
}

/// Body of the hidden verb [`SANDBOX_VERB`].
pub fn main(fd: RawFd) -> ! {
    take_name();
    std::process::exit(process::main(fd))
}

/// Body of the hidden verb [`EXEC_VERB`].
pub fn exec_main(fd: RawFd) -> ! {
    take_name();
    std::process::exit(exec::main(fd))
}

/// What `ps` and `docker top` show: a process that was started from `/proc/self/exe` is called `exe`.
fn take_name() {
    // There is no log yet, and the kernel takes every name.
    let _ = nix::sys::prctl::set_name(c"coracle");
}

/// Has the program of a created container run by its sandbox process, which `client` is connected to, then
/// runs the poststart hooks, as runc does in the process of `start` since 1.2: however long they take, the
/// container is served meanwhile.
pub fn start(dir: &ContainerDir, client: &Client) -> Result<(), Error> {
    // Whoever waits for the container's end may remove it at once.
    let hooks = folder::hooks(dir, Later::Poststart).map_err(Error::Hooks)?;
    let state = dir.load()?;
    client.start()?;
    hooks::run_poststart(&hooks, &state);
    Ok(())
}

/// Kills the sandbox process of a container, if it still runs, and waits until it is gone.
pub fn end(state: &State) -> Result<(), Error> {
    let Some(pid) = state.pid.filter(|_| state.has_process()) else { return Ok(()) };
    let process = match Pidfd::open(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        other => other.map_err(Error::Wait)?,
    };
    // It may have ended, and its pid be another's, since it was looked at.
    if !state.has_process() {
        return Ok(());
    }
    process.kill().map_err(Error::Wait)?;
    let gone = process.wait(Some(KILL_TIMEOUT)).map_err(Error::Wait)?;
    if gone { Ok(()) } else { Err(Error::Unkillable(pid)) }
}

/// Removes what a container has on the host, but for its state folder: its sandbox process, if
/// it still runs, and its cgroup. Then runs the poststop hooks.
pub fn destroy(dir: &ContainerDir, state: &State) -> Result<(), Error> {
    end(state)?;
    if let Some(path) = &state.netns {
        network::tidy(path);
    }
    if let Some(path) = &state.cgroup_path {
        let name = cgroup::Name { path: path.clone(), systemd: state.systemd_cgroup };
        cgroup::remove(&name, &state.id)?;
    }
    let poststop = folder::hooks(dir, Later::Poststop).map_err(Error::Hooks)?;
    hooks::run_poststop(&poststop, state, None);
    Ok(())
}

/// Changes what the host grants the sandbox of a container, whose machine has `room` and becomes what
/// `change` says.
pub fn limit(
    state: &State,
    resources: &LinuxResources,
    room: &Room,
    change: Change,
) -> Result<(), Error> {
    let changes = room.host_update(resources, change);
    match &state.cgroup_path {
        Some(path) if changes != LinuxResources::default() => {
            let name = cgroup::Name { path: path.clone(), systemd: state.systemd_cgroup };
            Ok(cgroup::limit(&name, &state.id, &changes)?)
        }
        _ => Ok(()),
    }
}

/// A path that still means the same in a process with another working directory.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

/// Writes a pid file as engines expect it: complete from the moment it exists, without line feed.
fn write_pid_file(path: &Path, pid: i32) -> Result<(), Error> {
    let written = || {
        let folder = absolute(path).parent().map(Path::to_path_buf).unwrap_or_default();
        let readable = Permissions::from_mode(0o644);
        let mut file = tempfile::Builder::new().permissions(readable).tempfile_in(folder)?;
        write!(file, "{pid}")?;
        file.persist(path)?;
        io::Result::Ok(())
    };
    written().map_err(|source| Error::PidFile { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_holds_the_pid_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");

        write_pid_file(&path, 4711).unwrap();

        assert_eq!(std::fs::read_to_string(&path).unwrap(), "4711");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
