//! Opens and places every device the configuration asks for.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use arch::machine::PlatformDevice;
use arch::{Arch, Host};
use devices::serial::Serial;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{Balloon, Host as BalloonHost, Offer};
use devices::virtio::block::{Block, Disk};
use devices::virtio::console::Console;
use devices::virtio::fs::{Fs, Server};
use devices::virtio::mem::{Host as MemHost, Mem};
use devices::virtio::net::{Net, Tap};
use devices::virtio::pmem::Pmem;
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Host as VsockHost, Vsock};

use crate::config::{
    BalloonConfig, ConsoleConfig, ConsoleOutput, DiskConfig, NetConfig, ShareConfig, VmConfig,
};
use crate::console::{self, ConsoleLog};
use crate::error::Error;
use crate::placement::{Loop, Placement, PlacementError};
use crate::pmem::MappedFile;

/// Registers of a 16550, in bytes.
const SERIAL_PORTS: u64 = 8;

/// The host's ends of devices that have one.
pub struct Ends {
    /// Of the console, unless it is a serial port.
    pub console: Option<Arc<Mutex<Console>>>,
    /// Of the socket device.
    pub vsock: Option<VsockHost>,
    /// Of the balloon.
    pub balloon: Option<BalloonHost>,
    /// Of the memory that can be plugged in.
    pub pluggable: Option<MemHost>,
}

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
pub fn place_all(
    config: &VmConfig,
    log: &ConsoleLog,
    files: &[MappedFile],
    pluggable: Option<Range<u64>>,
    placement: &mut Placement<'_>,
) -> Result<Ends, Error> {
    if config.console.serial {
        place_serial(log, placement)?;
    }
    let input = if config.console.serial { None } else { console::input(&config.console.output) };
    let console = Console::new(input, Box::new(log.clone()));
    let console = place("console", console, Loop::Vmm, placement)?;
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
    config.shares.iter().try_for_each(|share| place_share(share, placement))?;
    config.nets.iter().try_for_each(|net| place_net(net, placement))?;
    for file in files {
        place(&file.name, Pmem::new(file.start.0, file.bytes), Loop::Vmm, placement)?;
    }
    let balloon =
        config.balloon.as_ref().map(|balloon| place_balloon(balloon, placement)).transpose()?;
    let pluggable = pluggable.map(|region| place_mem(&region, placement)).transpose()?;
    let console = Some(console).filter(|_| !config.console.serial);
    Ok(Ends { console, vsock: host, balloon, pluggable })
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
    place(&name, Block::new(disk, config.read_only, &config.id), Loop::Io, placement)?;
    Ok(())
}

fn place_share(config: &ShareConfig, placement: &mut Placement<'_>) -> Result<(), Error> {
    let name = format!("share {}", config.tag);
    let server = Server::open(&config.path, config.read_only).map_err(device(&name))?;
    place(&name, Fs::new(&config.tag, server), Loop::Io, placement)?;
    Ok(())
}

fn place_net(config: &NetConfig, placement: &mut Placement<'_>) -> Result<(), Error> {
    let name = format!("net {}", config.tap);
    let tap = Tap::open(&config.tap).map_err(device(&name))?;
    let mac = config.mac_bytes().expect("validate() checked the address");
    place(&name, Net::new(tap, mac), Loop::Vmm, placement)?;
    Ok(())
}

fn place_mem(region: &Range<u64>, placement: &mut Placement<'_>) -> Result<MemHost, Error> {
    let bytes = region.end - region.start;
    let mem = Mem::new(placement.memory().clone(), region.start, bytes);
    place("mem", mem, Loop::Vmm, placement).map(MemHost::of)
}

fn place_balloon(
    config: &BalloonConfig,
    placement: &mut Placement<'_>,
) -> Result<BalloonHost, Error> {
    let offer = Offer {
        deflate_on_oom: config.deflate_on_oom,
        statistics: config.statistics,
        free_page_hint: config.free_page_hinting,
        page_reporting: config.free_page_reporting,
    };
    let balloon = Balloon::new(offer, config.target_mib);
    place("balloon", balloon, Loop::Vmm, placement).map(BalloonHost::of)
}

/// Places `device` and returns it as the threads share it.
fn place<D: VirtioDevice + 'static>(
    name: &str,
    device: D,
    served_by: Loop,
    placement: &mut Placement<'_>,
) -> Result<Arc<Mutex<D>>, Error> {
    let device = Arc::new(Mutex::new(device));
    placement.place(name, device.clone(), served_by).map_err(error_at(name))?;
    Ok(device)
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
