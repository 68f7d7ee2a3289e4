//! Opens and places every device the configuration asks for.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use arch::machine::PlatformDevice;
use arch::{Arch, Host};
use devices::clock::Clock;
use devices::listener::Listener;
use devices::serial::Serial;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{Balloon, Host as BalloonHost, Offer};
use devices::virtio::block::{Block, Disk, Ring};
use devices::virtio::console::Console;
use devices::virtio::fs::{Changes, Fs, Server, raise_file_limit};
use devices::virtio::mem::{Host as MemHost, Mem};
use devices::virtio::net::{Net, Tap, Vhost, VhostError};
use devices::virtio::pmem::Pmem;
use devices::virtio::rate_limit::RateLimiter;
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Host as VsockHost, Vsock};
use log::debug;
use vm_memory::GuestMemoryMmap;

use crate::config::{
    BalloonConfig, ConfigError, ConsoleConfig, ConsoleOutput, DiskConfig, DiskEngine, NetConfig,
    ShareConfig, UserConfig, VhostUse, VmConfig, VsockConfig,
};
use crate::console::{self, ConsoleLog};
use crate::error::Error;
use crate::jail::Jail;
use crate::memory::Pluggable;
use crate::opened::{self, Opened};
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
    /// What others change in a shared directory.
    pub changes: Option<Arc<Changes>>,
}

/// Opens where the guest's console goes.
pub fn open_console(config: &ConsoleConfig) -> Result<ConsoleLog, Error> {
    ConsoleLog::open(&config.output).map_err(|source| match &config.output {
        ConsoleOutput::File(path) => {
            Error::Open { what: "console.output.file", path: path.clone(), source }
        }
        _ => Error::Open { what: "console output", path: "standard output".into(), source },
    })
}

/// Places all devices in a fixed order, so that a configuration always gives the same machine.
pub fn place_all(
    config: &VmConfig,
    log: &ConsoleLog,
    jail: Option<&Jail>,
    files: &[MappedFile],
    pluggable: Option<Pluggable>,
    placement: &mut Placement<'_>,
) -> Result<Ends, Error> {
    place_platform(config, log, placement)?;
    let input = if config.console.serial { None } else { console::input(&config.console.output) };
    let console = Console::new(input, Box::new(log.clone()));
    let console = place("console", console, Loop::Vmm, placement)?;
    if config.rng {
        let source = File::open("/dev/urandom").map_err(device("rng"))?;
        place("rng", Rng::new(source), Loop::Vmm, placement)?;
    }
    let mut host = None;
    if let Some(vsock) = &config.vsock {
        host = Some(place_vsock(vsock, config.user, jail, placement)?);
    }
    for (index, disk) in config.disks.iter().enumerate() {
        place(&disk_name(&disk.id), open_disk(index, disk)?, Loop::Io, placement)?;
    }
    if !config.shares.is_empty() {
        raise_file_limit().map_err(device("shares"))?;
    }
    for (index, share) in config.shares.iter().enumerate() {
        place_share(share, jail.map(|jail| (jail, index)), placement)?;
    }
    for (index, net) in (0..).zip(&config.nets) {
        let device = open_net(index, net, placement.memory())?;
        place(&net_name(&net.tap), device, Loop::Vmm, placement)?;
    }
    for file in files {
        place(&file.name, Pmem::new(file.start.0, file.bytes), Loop::Vmm, placement)?;
    }
    let balloon =
        config.balloon.as_ref().map(|balloon| place_balloon(balloon, placement)).transpose()?;
    let pluggable = pluggable.map(|memory| place_mem(memory, placement)).transpose()?;
    for number in 0..config.spare_slots {
        let name = format!("(spare slot {number})");
        placement.reserve().map_err(error_at(&name))?;
    }
    let console = Some(console).filter(|_| !config.console.serial);
    let changes = config.shares.iter().find_map(|share| Some(share.telling.as_ref()?.to.clone()));
    Ok(Ends { console, vsock: host, balloon, pluggable, changes })
}

/// Places what is not virtio. The serial port is there only for who asks for it: each character on it is
/// an exit.
fn place_platform(
    config: &VmConfig,
    log: &ConsoleLog,
    placement: &mut Placement<'_>,
) -> Result<(), Error> {
    for device in Host::platform_devices() {
        match *device {
            PlatformDevice::Serial { space, base, gsi } if config.console.serial => {
                let name = error_at("serial port");
                let line = placement.irq_line(gsi).map_err(&name)?;
                let serial = Serial::new(line, Box::new(log.clone()));
                placement.place_serial(space, base, SERIAL_PORTS, serial).map_err(name)?;
            }
            PlatformDevice::Serial { .. } => {}
            PlatformDevice::Clock { base, size } => {
                placement.place_clock(base, size, Clock::new()).map_err(error_at("clock"))?;
            }
        }
    }
    Ok(())
}

/// What log lines and metrics call a disk.
pub fn disk_name(id: &str) -> String {
    format!("disk {id}")
}

/// What log lines and metrics call a network interface.
pub fn net_name(tap: &str) -> String {
    format!("net {tap}")
}

/// Opens disk number `index` of a configuration.
pub fn open_disk(index: usize, config: &DiskConfig) -> Result<Block, Error> {
    build_disk(config, Opened::of_disk(config)?, || open_ring(index, config))
}

/// The disk of `config`, of which `opened` are the files, with the ring that `ring` has for it.
pub fn build_disk(
    config: &DiskConfig,
    opened: Opened,
    ring: impl FnOnce() -> Result<Option<Ring>, Error>,
) -> Result<Block, Error> {
    let name = disk_name(&config.id);
    let files = opened.into_disk_files().map_err(device(&name))?;
    let disk = Disk::of(files, config.read_only).map_err(device(&name))?;
    let limiter = RateLimiter::new(config.rate_limit.limits()).map_err(device(&name))?;
    let ring = if config.engine == DiskEngine::Sync { None } else { ring()? };
    Ok(Block::new(disk, &config.id, config.queues, limiter, ring))
}

/// A ring for disk number `index` of a configuration, which is not to do without.
pub fn open_ring(index: usize, config: &DiskConfig) -> Result<Option<Ring>, Error> {
    match Ring::open() {
        Ok(ring) => Ok(Some(ring)),
        Err(error) if config.engine == DiskEngine::IoUring => Err(no_ring(index, &error)),
        // Kernels without, and hosts that forbid it, are as common as those that have it.
        Err(error) => {
            debug!("{}: {error}", disk_name(&config.id));
            Ok(None)
        }
    }
}

/// Says that disk number `index` of a configuration has no ring.
pub fn no_ring(index: usize, error: &io::Error) -> Error {
    let rule = format!("must not be io_uring, as this host does not offer it: {error}");
    Error::Config(ConfigError { field: format!("disks[{index}].engine"), rule })
}

/// Opens the directory in the jail, if there is one, where it has the number given with it: from
/// there no name leads anywhere else.
fn place_share(
    config: &ShareConfig,
    jail: Option<(&Jail, usize)>,
    placement: &mut Placement<'_>,
) -> Result<(), Error> {
    let name = format!("share {}", config.tag);
    let mut options = config.options();
    let mut region_start = 0;
    if config.dax_mib != 0 {
        let (window, start) = placement.dax().open(config.dax_bytes()).map_err(device(&name))?;
        options.window = Some(window);
        region_start = start;
    }
    let open = |path: &Path| Server::with_options(path, options);
    let server = match jail {
        Some((jail, index)) => jail.run(|| open(&Jail::path_of(index))).map_err(device(&name))?,
        None => open(&config.path),
    };
    let server = server.map_err(device(&name))?;
    let fs = Fs::new(&config.tag, server)
        .with_window_at(region_start)
        .and_then(Fs::with_deferred_forgetting)
        .map_err(device(&name))?;
    place(&name, fs, Loop::Io, placement)?;
    Ok(())
}

/// The device's thread finds the sockets of the host in the jail, if there is one.
fn place_vsock(
    config: &VsockConfig,
    user: Option<UserConfig>,
    jail: Option<&Jail>,
    placement: &mut Placement<'_>,
) -> Result<VsockHost, Error> {
    let vsock = match &config.socket {
        Some(path) => {
            let listen = || {
                let socket = Listener::bind(path)?;
                user.map_or(Ok(()), |user| socket.give_to(user.uid, user.gid))?;
                Ok(socket)
            };
            let socket = listen().map_err(|source| Error::Listen {
                field: "vsock.socket",
                path: path.clone(),
                source,
            })?;
            let seen_at = jail.map_or_else(|| path.clone(), |_| Jail::socket_path(path));
            let (socket, file) = socket.without_file(seen_at);
            file.into_iter().for_each(|file| placement.keep(file));
            Vsock::with_socket(config.cid, socket)
        }
        None => Vsock::new(config.cid),
    };
    let (vsock, handle) = vsock.map_err(device("vsock"))?;
    place("vsock", vsock, Loop::Vmm, placement)?;
    Ok(handle)
}

/// Opens network interface number `index` of a configuration, for a driver that works on `memory`.
pub fn open_net(
    index: usize,
    config: &NetConfig,
    memory: &GuestMemoryMmap,
) -> Result<Net<Tap>, Error> {
    build_net(index, config, Opened::of_net(index, config)?, memory)
}

/// Network interface number `index` of a configuration, of which `opened` are the files, for a driver that
/// works on `memory`.
pub fn build_net(
    index: usize,
    config: &NetConfig,
    opened: Opened,
    memory: &GuestMemoryMmap,
) -> Result<Net<Tap>, Error> {
    let name = net_name(&config.tap);
    let (taps, vhost) = opened.into_taps(config.queue_pairs).map_err(device(&name))?;
    let mac = config.mac_bytes().expect("validate() checked the address");
    let vhost = start_vhost(config, vhost, &taps, memory)
        .map_err(|error| opened::no_vhost(index, &error))?;
    let receive = RateLimiter::new(config.receive_limit.limits()).map_err(device(&name))?;
    let transmit = RateLimiter::new(config.transmit_limit.limits()).map_err(device(&name))?;
    let net = Net::new(taps, mac).limited(receive, transmit);
    Ok(match vhost {
        Some(vhost) => net.served_by(vhost),
        None => net,
    })
}

/// The host's kernel as the one who serves the queues of `taps`, if it was opened and can.
fn start_vhost(
    config: &NetConfig,
    files: Vec<File>,
    taps: &[Tap],
    memory: &GuestMemoryMmap,
) -> Result<Option<Vhost>, VhostError> {
    if files.is_empty() {
        return Ok(None);
    }
    match Vhost::new(files, taps, memory) {
        Err(error) if config.vhost != VhostUse::On => {
            debug!("net {}: {error}", config.tap);
            Ok(None)
        }
        outcome => outcome.map(Some),
    }
}

fn place_mem(region: Pluggable, placement: &mut Placement<'_>) -> Result<MemHost, Error> {
    let mem = Mem::new(region.addresses().clone(), Box::new(region));
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
pub fn device<E>(name: &str) -> impl FnOnce(E) -> Error
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |source| Error::Device { name: name.to_owned(), source: Box::new(source) }
}
