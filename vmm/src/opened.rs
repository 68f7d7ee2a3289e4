//! Open files of a disk or of a network interface: all that takes a privilege, so that another process can
//! do it for one that has none left.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use devices::virtio::block::DiskFiles;
use devices::virtio::net::{Missing, Tap, TapError, Vhost, VhostError};
use log::debug;

use crate::attachment::AttachError;
use crate::config::{ConfigError, DiskConfig, NetConfig, VhostUse};
use crate::error::{Error, chain};
use crate::peripherals::{device, disk_name, net_name};

/// What a device works with that is to be attached.
#[derive(Debug, Default)]
pub struct Opened {
    /// Of a disk: the image, and the image for direct I/O if it is used. Of an interface: the tap once for
    /// each pair of queues, and vhost-net as often if it is used.
    pub files: Vec<OwnedFd>,
    /// Largest payload of a frame of the tap, in bytes, if it is known.
    pub mtu: Option<u16>,
}

impl Opened {
    /// Opens what a disk of `config` needs.
    pub fn disk(config: &DiskConfig) -> Result<Self, AttachError> {
        config
            .validate()
            .map_err(Error::from)
            .and_then(|()| Opened::of_disk(config))
            .map_err(refused)
    }

    /// Opens what a network interface of `config` needs.
    pub fn net(config: &NetConfig) -> Result<Self, AttachError> {
        config
            .validate()
            .map_err(Error::from)
            .and_then(|()| Opened::of_net(0, config))
            .map_err(refused)
    }

    /// Opens what a disk needs whose `config` is checked.
    pub(crate) fn of_disk(config: &DiskConfig) -> Result<Self, Error> {
        let DiskFiles { file, direct } = DiskFiles::open(&config.path, config.access())
            .map_err(device(&disk_name(&config.id)))?;
        let files = [file].into_iter().chain(direct).map(OwnedFd::from).collect();
        Ok(Opened { files, mtu: None })
    }

    /// Opens what network interface number `index` of a configuration needs, whose `config` is checked.
    pub(crate) fn of_net(index: usize, config: &NetConfig) -> Result<Self, Error> {
        let taps = open_taps(config).map_err(|error| cannot_open_tap(index, config, error))?;
        let (mut files, mtus): (Vec<_>, Vec<_>) = taps.into_iter().map(Tap::into_parts).unzip();
        let vhost = open_vhost(config).map_err(|error| no_vhost(index, &error))?;
        files.extend(vhost.into_iter().map(OwnedFd::from));
        Ok(Opened { files, mtu: mtus.into_iter().next().flatten() })
    }

    /// The files of a disk.
    pub(crate) fn into_disk_files(self) -> io::Result<DiskFiles> {
        let mut files = self.files.into_iter().map(File::from);
        let file = files.next().ok_or_else(incomplete)?;
        Ok(DiskFiles { file, direct: files.next() })
    }

    /// The tap of an interface once for each of `pairs` of queues, and vhost-net as often or not at all.
    pub(crate) fn into_taps(self, pairs: u16) -> io::Result<(Vec<Tap>, Vec<File>)> {
        let pairs = usize::from(pairs);
        let count = self.files.len();
        if count != pairs && count != 2 * pairs {
            return Err(incomplete());
        }
        let mut files = self.files.into_iter();
        let taps = files.by_ref().take(pairs).map(|fd| Tap::from_parts(fd, self.mtu)).collect();
        Ok((taps, files.map(File::from).collect()))
    }
}

fn incomplete() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "what was opened for it is not what it needs")
}

/// Refuses a tap that cannot be opened, as far as a look can tell, for interface number `index`.
pub fn check_tap(index: usize, config: &NetConfig) -> Result<(), Error> {
    Tap::check(&config.tap, missing(config)).map_err(|error| cannot_open_tap(index, config, error))
}

/// The tap of `config`, once for each of its queue pairs.
fn open_taps(config: &NetConfig) -> Result<Vec<Tap>, TapError> {
    match config.queue_pairs {
        1 => Tap::open(&config.tap, missing(config)).map(|tap| vec![tap]),
        several => Tap::open_queues(&config.tap, several.into(), missing(config)),
    }
}

fn missing(config: &NetConfig) -> Missing {
    if config.create { Missing::Create } else { Missing::Refuse }
}

fn cannot_open_tap(index: usize, config: &NetConfig, error: TapError) -> Error {
    match error {
        TapError::Missing(tap) => Error::Config(ConfigError {
            field: format!("nets[{index}].tap"),
            rule: format!(
                "must name a tap of this network namespace, and {tap:?} is none (make it with `ip \
                 tuntap`, or set `create`)"
            ),
        }),
        error => device(&net_name(&config.tap))(error),
    }
}

/// Says that the host's kernel does not serve network interface number `index` of a configuration.
pub fn no_vhost(index: usize, error: &VhostError) -> Error {
    let rule = format!("must not be on, as the host's kernel does not do it: {}", chain(error));
    Error::Config(ConfigError { field: format!("nets[{index}].vhost"), rule })
}

/// The host's kernel as who may serve the queues of the taps, if `config` asks for it or it just is there.
fn open_vhost(config: &NetConfig) -> Result<Vec<File>, VhostError> {
    let open = || Vhost::open_files(config.queue_pairs.into());
    match config.vhost {
        VhostUse::On => open(),
        VhostUse::Auto if config.is_limited() => Ok(Vec::new()),
        VhostUse::Auto => Ok(open().unwrap_or_else(|error| {
            debug!("net {}: {error}", config.tap);
            Vec::new()
        })),
        VhostUse::Off => Ok(Vec::new()),
    }
}

/// Why a device is not attached that could not be opened: the field is one of the device.
pub fn refused(error: Error) -> AttachError {
    match error {
        Error::Config(ConfigError { field, rule }) => {
            AttachError::Config(ConfigError { field: of_device(&field), rule })
        }
        error => AttachError::Open(Box::new(error)),
    }
}

/// The field of a device that `field` names as one of a whole machine: `nets[0].tap` is `tap`.
fn of_device(field: &str) -> String {
    field.rsplit_once("].").map_or(field, |(_, field)| field).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_a_machine_becomes_one_of_the_device() {
        assert_eq!(of_device("nets[0].receive_limit.bytes_burst"), "receive_limit.bytes_burst");
        assert_eq!(of_device("tap"), "tap");
    }

    #[test]
    fn what_is_missing_is_noticed() {
        assert!(Opened::default().into_disk_files().is_err());
        assert!(Opened::default().into_taps(1).is_err());
    }
}
