//! Device nodes to make in the container.

use agent_protocol::Device;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::{Error, text};

/// Mode of a node whose configuration gives none (runc's default).
const DEFAULT_MODE: u32 = 0o666;

/// Nodes that work in every guest, because its kernel implements them: memory devices, terminals,
/// tunnels, FUSE and what makes loop devices, as (major, minor or any).
const GUEST_DEVICES: &[(i64, Option<i64>)] =
    &[(1, None), (5, None), (10, Some(200)), (10, Some(229)), (10, Some(237)), (136, None)];

/// Block devices that a guest makes by itself.
const LOOP_MAJOR: i64 = 7;

/// The nodes of `linux.devices`.
///
/// A node in the guest stands for a device of the guest: what somebody asked for and the guest does not
/// have is refused. Whoever calls this gives the guest disks for block devices.
///
/// Where `resources` allow all devices, the engine lists all that the host has. Then only those are made
/// that the guest has, too: an init that finds a virtual terminal starts a login there, again and again.
pub fn translate(
    devices: &[LinuxDevice],
    resources: Option<&LinuxResources>,
) -> Result<Vec<Device>, Error> {
    if resources.is_some_and(allow_all) {
        let own = |device: &&LinuxDevice| match device.typ() {
            LinuxDeviceType::B => device.major() == LOOP_MAJOR,
            _ => is_guest_device(device),
        };
        return devices.iter().filter(own).map(device).collect();
    }
    if let Some(foreign) = devices.iter().find(|device| !is_guest_device(device)) {
        // Whatever is wrong with its numbers is told first.
        let Device { path, major, minor, .. } = device(foreign)?;
        return Err(Error::Unsupported {
            property: format!("device {path} ({major}:{minor}) of the host"),
            remedy: "a character device of the host cannot be passed to a virtual machine, only block \
                     devices can: leave it out, or run this container with runc",
        });
    }
    devices.iter().map(device).collect()
}

/// Whether `resources` allow all devices of the host, as `--privileged` does: nobody asked for one of them.
pub fn allow_all(resources: &LinuxResources) -> bool {
    resources.devices().iter().flatten().any(allows_all)
}

fn allows_all(rule: &LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    let all_types = rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A);
    rule.allow() && all_types && any(rule.major()) && any(rule.minor())
}

fn is_guest_device(device: &LinuxDevice) -> bool {
    let known = |(major, minor): &(i64, Option<i64>)| {
        device.major() == *major && minor.is_none_or(|minor| device.minor() == minor)
    };
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => GUEST_DEVICES.iter().any(known),
        // Given to the guest as disks, if at all.
        LinuxDeviceType::B => true,
        LinuxDeviceType::A => false,
    }
}

fn device(device: &LinuxDevice) -> Result<Device, Error> {
    let path = text(device.path(), "linux.devices.path")?;
    let invalid = |property: &str, value: String, rule| Error::Invalid {
        property: format!("linux.devices {path} {property}"),
        value,
        rule,
    };
    if !device.path().is_absolute() {
        return Err(invalid("path", path.clone(), "it must be absolute"));
    }
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(invalid("type", "a".into(), "a node is one of b, c, u and p"));
        }
    };
    let number = |property, value: i64| {
        u32::try_from(value)
            .map_err(|_| invalid(property, value.to_string(), "it must be a device number"))
    };
    Ok(Device {
        kind,
        major: number("major", device.major())?,
        minor: number("minor", device.minor())?,
        mode: device.file_mode().unwrap_or(DEFAULT_MODE) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
        path,
        disk: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(json: &str) -> Result<Vec<Device>, Error> {
        translate(&serde_json::from_str::<Vec<LinuxDevice>>(json).unwrap(), None)
    }

    #[test]
    fn a_privileged_container_has_the_nodes_of_devices_that_its_guest_has() {
        let json = r#"[{"path": "/dev/tty0", "type": "c", "major": 4, "minor": 0},
                       {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                       {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                       {"path": "/dev/loop0", "type": "b", "major": 7, "minor": 0}]"#;
        let devices: Vec<LinuxDevice> = serde_json::from_str(json).unwrap();
        let all = r#"{"devices": [{"allow": true, "access": "rwm"}]}"#;
        let resources: LinuxResources = serde_json::from_str(all).unwrap();

        let made = translate(&devices, Some(&resources)).unwrap();

        let paths: Vec<_> = made.iter().map(|device| device.path.as_str()).collect();
        assert_eq!(paths, ["/dev/fuse", "/dev/loop0"]);
    }

    #[test]
    fn a_node_keeps_its_numbers_mode_and_owner() {
        let json = r#"[{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229,
                        "fileMode": 8624, "uid": 1, "gid": 2}]"#;

        let expected = Device {
            path: "/dev/fuse".into(),
            kind: libc::S_IFCHR,
            major: 10,
            minor: 229,
            mode: 0o660,
            uid: 1,
            gid: 2,
            disk: None,
        };
        assert_eq!(translated(json).unwrap(), [expected]);
    }

    #[test]
    fn a_node_without_mode_is_for_all() {
        let json = r#"[{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]"#;

        let devices = translated(json).unwrap();

        assert_eq!((devices[0].kind, devices[0].mode), (libc::S_IFBLK, 0o666));
    }

    #[test]
    fn a_character_device_that_only_the_host_has_is_refused_with_a_remedy() {
        let json = r#"[{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]"#;

        let error = translated(json).unwrap_err().to_string();

        assert!(error.contains("/dev/kvm (10:232)") && error.contains("leave it out"), "{error}");
    }

    #[test]
    fn wildcards_and_relative_paths_are_no_nodes() {
        assert!(translated(r#"[{"path": "/dev/x", "type": "a"}]"#).is_err());
        assert!(translated(r#"[{"path": "dev/x", "type": "c"}]"#).is_err());
        assert!(translated(r#"[{"path": "/dev/x", "type": "c", "major": -1}]"#).is_err());
    }
}
