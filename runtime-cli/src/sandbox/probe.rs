//! A guest that only has to come up: whether virtual machines really run on this host.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;
use vmm::Vmm;

use super::boot::{self, Boot};
use super::machine::{self, Room, Size};
use super::process;
use super::signals::Signals;
use crate::settings::Settings;

/// Why the guest did not come up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The virtual machine.
    #[error(transparent)]
    Vm(#[from] vmm::Error),
    /// The way to the agent in it.
    #[error("make the connection to the guest")]
    Connect(#[source] io::Error),
    /// The signals that can interrupt the wait.
    #[error("collect signals")]
    Signals(#[source] Errno),
    /// The guest itself.
    #[error(transparent)]
    Boot(#[from] boot::Error),
}

/// Boots the guest of `settings` without a container; what there is to say about it.
pub fn boot(settings: &Settings) -> Result<String, Error> {
    let size = Size { vcpus: settings.vcpus.unwrap_or(1), memory_mib: settings.memory_mib };
    let room = Room::of(settings, &LinuxResources::default(), size);
    let quiet = Settings { debug_console: false, ..settings.clone() };
    let mut config = machine::config(&quiet, &room, Path::new("/"), Vec::new(), Path::new("/"));
    config.shares.clear();
    let mut signals = Signals::collect().map_err(Error::Signals)?;
    let (caller, _keep_open) = UnixStream::pair().map_err(Error::Connect)?;
    let (listening, mut agent) = process::listen(Vmm::new(config)?).map_err(Error::Connect)?;
    let vm = listening.start()?;
    let timeout_s = settings.boot_timeout_s;
    let mut guest =
        Boot { vm: &vm, agent: &mut agent, caller: &caller, signals: &mut signals, timeout_s };
    let up = guest.ready();
    vm.stop();
    Ok(up?)
}
