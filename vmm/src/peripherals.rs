//! Opens and places every device the configuration asks for.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};

use arch::machine::PlatformDevice;
use arch::{Arch, Host};
use devices::serial::Serial;
use devices::virtio::VirtioDevice;
use devices::virtio::block::{Block, Disk};
use devices::virtio::console::Console;
use devices::virtio::fs::{Fs, Server};
use devices::virtio::net::{Net, Tap};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Host as VsockHost, Vsock};

use crate::config::{ConsoleConfig, ConsoleOutput, DiskConfig, NetConfig, ShareConfig, VmConfig};
use crate::console::{self, ConsoleLog};
use crate::error::Error;
use crate::jail::Jail;
use crate::placement::{Loop, Placement, PlacementError};

/// Registers of a 16550, in bytes.
const SERIAL_PORTS: u64 = 8;

/// Opens where the guest's console goes.
pub fn open_console(config: &ConsoleConfig) -> Result<ConsoleLog, Error> {
    ConsoleLog::open(&config.output).map_err(|source| match &config.output {
        ConsoleOutput::File(path) => {
            Error::Open { what: "console output", path: path.clone(), source }
        }
        _ => Error::Open { what: "console output", path: "standard output".into(), source },
    })
}

/// Places all devices in a fixed order, so that a configuration always gives the same machine.
/// Returns the host's end of the socket device.
pub fn place_all(
    config: &VmConfig,
    log: &ConsoleLog,
    jail: Option<&Jail>,
    placement: &mut Placement<'_>,
) -> Result<Option<VsockHost>, Error> {
    if config.console.serial {
        place_serial(log, placement)?;
    }
    let input = if config.console.serial { None } else { console::input(&config.console.output) };
    place("console", Console::new(input, Box::new(log.clone())), Loop::Vmm, placement)?;
    if config.rng {
        let source = File::open("/dev/urandom").map_err(device("rng"))?;
        place("rng", Rng::new(source), Loop::Vmm, placement)?;
    }
    let mut host = None;
    if let Some(vsock) = &config.vsock {
        let (vsock, handle) = Vsock::new(vsock.cid).map_err(device("vsock"))?;
        place("vsock", vsock, Loop::Vmm, placement)?;
        host = Some(handle);
    }
    config.disks.iter().try_for_each(|disk| place_disk(disk, placement))?;
    for (index, share) in config.shares.iter().enumerate() {
        place_share(share, jail.map(|jail| (jail, index)), placement)?;
    }
    config.nets.iter().try_for_each(|net| place_net(net, placement))?;
    Ok(host)
}

/// The serial port is there only for who asks for it: each character on it is an exit.
fn place_serial(log: &ConsoleLog, placement: &mut Placement<'_>) -> Result<(), Error> {
    for device in Host::platform_devices() {
        let PlatformDevice::Serial { space, base, gsi } = *device;
        let name = error_at("serial port");
        let line = placement.irq_line(gsi).map_err(&name)?;
        let serial = Serial::new(line, Box::new(log.clone()));
        placement.place_at(space, base, SERIAL_PORTS, serial).map_err(name)?;
    }
    Ok(())
}

fn place_disk(config: &DiskConfig, placement: &mut Placement<'_>) -> Result<(), Error> {
    let name = format!("disk {}", config.id);
    let disk = Disk::open(&config.path, config.read_only).map_err(device(&name))?;
    place(&name, Block::new(disk, config.read_only, &config.id), Loop::Io, placement)
}

/// Opens the directory in the jail, if there is one, where it has the number given with it: from
/// there no name leads anywhere else.
fn place_share(
    config: &ShareConfig,
    jail: Option<(&Jail, usize)>,
    placement: &mut Placement<'_>,
) -> Result<(), Error> {
    let name = format!("share {}", config.tag);
    let open = |path: &Path| Server::open(path, config.read_only);
    let server = match jail {
        Some((jail, index)) => jail.run(|| open(&Jail::path_of(index))).map_err(device(&name))?,
        None => open(&config.path),
    };
    let server = server.map_err(device(&name))?;
    place(&name, Fs::new(&config.tag, server), Loop::Io, placement)
}

fn place_net(config: &NetConfig, placement: &mut Placement<'_>) -> Result<(), Error> {
    let name = format!("net {}", config.tap);
    let tap = Tap::open(&config.tap).map_err(device(&name))?;
    let mac = config.mac_bytes().expect("validate() checked the address");
    place(&name, Net::new(tap, mac), Loop::Vmm, placement)
}

fn place(
    name: &str,
    device: impl VirtioDevice + 'static,
    served_by: Loop,
    placement: &mut Placement<'_>,
) -> Result<(), Error> {
    placement.place(name, Arc::new(Mutex::new(device)), served_by).map_err(error_at(name))
}

/// Names the device that could not be placed.
fn error_at(name: &str) -> impl Fn(PlacementError) -> Error {
    move |source| Error::Place { name: name.to_owned(), source }
}

/// Wraps whatever a device's constructor says went wrong.
fn device<E>(name: &str) -> impl FnOnce(E) -> Error
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |source| Error::Device { name: name.to_owned(), source: Box::new(source) }
}
