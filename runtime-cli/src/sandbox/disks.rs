//! Block devices of the host that a container is given: the guest has a disk for each.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_protocol::Device;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};
use vmm::DiskConfig;

use crate::translate;

/// Where the kernel lists block devices by their numbers.
const BY_NUMBER: &str = "/sys/dev/block";

/// Most disks of a guest: each takes an interrupt line.
const MAX_DISKS: usize = 8;

/// Why a block device cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host does not have it.
    #[error("find block device {major}:{minor} of {path} on the host")]
    Find {
        /// The node in the container.
        path: String,
        /// Its numbers.
        major: u32,
        /// Its numbers.
        minor: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There are too many.
    #[error(
        "{0} block devices are more than a virtual machine can have: give it up to {MAX_DISKS}"
    )]
    TooMany(usize),
}

/// A disk for each block device among `devices`, which then stand for the disks. None where `resources`
/// allow all devices of the host, as `--privileged` does: nobody asked for one of them, and a guest
/// that writes to the host's own disk is no container any more.
pub(super) fn of(
    devices: &mut [Device],
    resources: &LinuxResources,
) -> Result<Vec<DiskConfig>, Error> {
    if translate::allow_all_devices(resources) {
        return Ok(Vec::new());
    }
    let rules = resources.devices().as_deref().unwrap_or_default();
    let blocks: Vec<_> = devices.iter_mut().filter(|device| device.kind == libc::S_IFBLK).collect();
    if blocks.len() > MAX_DISKS {
        return Err(Error::TooMany(blocks.len()));
    }
    blocks.into_iter().enumerate().map(|(number, device)| disk(number, device, rules)).collect()
}

fn disk(
    number: usize,
    device: &mut Device,
    rules: &[LinuxDeviceCgroup],
) -> Result<DiskConfig, Error> {
    let (major, minor) = (device.major, device.minor);
    let path = node(major, minor);
    let path =
        path.map_err(|source| Error::Find { path: device.path.clone(), major, minor, source })?;
    let id = format!("coracle-{number}");
    device.disk = Some(id.clone());
    let read_only = !rules.iter().any(|rule| allows_writing(rule, device));
    Ok(DiskConfig { read_only, ..DiskConfig::new(&id, path) })
}

/// The host's node of a block device.
fn node(major: u32, minor: u32) -> io::Result<PathBuf> {
    let uevent = fs::read_to_string(format!("{BY_NUMBER}/{major}:{minor}/uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    Ok(Path::new("/dev").join(name.ok_or(io::ErrorKind::NotFound)?))
}

fn allows_writing(rule: &LinuxDeviceCgroup, device: &Device) -> bool {
    let is_its =
        |number: Option<i64>, own: u32| number.is_none_or(|it| it < 0 || it == i64::from(own));
    rule.allow()
        && rule.typ() != Some(LinuxDeviceType::C)
        && is_its(rule.major(), device.major)
        && is_its(rule.minor(), device.minor)
        && rule.access().as_ref().is_none_or(|access| access.contains('w'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: u32, major: u32) -> Device {
        let path = "/dev/x".to_owned();
        Device { path, kind, major, minor: 0, mode: 0o660, uid: 0, gid: 0, disk: None }
    }

    fn resources(rules: &str) -> LinuxResources {
        serde_json::from_str(&format!(r#"{{"devices": [{rules}]}}"#)).unwrap()
    }

    #[test]
    fn character_devices_are_no_disks() {
        let mut devices = [device(libc::S_IFCHR, 1)];

        assert_eq!(of(&mut devices, &LinuxResources::default()).unwrap(), []);
    }

    #[test]
    fn a_privileged_container_gets_none_of_the_host_s_disks() {
        let mut devices = [device(libc::S_IFBLK, 8)];

        let disks = of(&mut devices, &resources(r#"{"allow": true, "access": "rwm"}"#)).unwrap();

        assert_eq!((disks.len(), &devices[0].disk), (0, &None));
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_named() {
        let mut devices = [device(libc::S_IFBLK, 4095)];

        let error =
            of(&mut devices, &resources(r#"{"allow": false, "access": "rwm"}"#)).unwrap_err();

        assert_eq!(error.to_string(), "find block device 4095:0 of /dev/x on the host");
    }

    #[test]
    fn who_may_only_read_gets_a_disk_to_read() {
        let rule = |access: &str| {
            let text = format!(
                r#"{{"allow": true, "type": "b", "major": 8, "minor": 0, "access": "{access}"}}"#
            );
            serde_json::from_str::<LinuxDeviceCgroup>(&text).unwrap()
        };

        assert!(allows_writing(&rule("rwm"), &device(libc::S_IFBLK, 8)));
        assert!(!allows_writing(&rule("r"), &device(libc::S_IFBLK, 8)));
        assert!(!allows_writing(&rule("rwm"), &device(libc::S_IFBLK, 9)));
    }
}
