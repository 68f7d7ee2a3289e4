//! The device nodes and links of a container's `/dev` (config-linux.md, Default Devices).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use agent_protocol::{Container, Device, Failed};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

use super::root::{Kind, Root, proc_path};
use crate::failure::{Context, failed};

/// Where the kernel lists block devices.
const DISKS: &str = "/sys/block";

/// Path, major and minor number of the devices every container has.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Name below `/dev` and target of the links every container has.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Fills `/dev`, unless the configuration brings its own by a bind mount.
pub fn add(root: &Root, container: &Container) -> Result<(), Failed> {
    let own = container.mounts.iter().any(|mount| {
        mount.flags & MsFlags::MS_BIND.bits() != 0
            && mount.destination.trim_end_matches('/') == "/dev"
    });
    if own {
        return Ok(());
    }
    for (path, major, minor) in DEFAULT_DEVICES {
        let path = path.to_owned();
        let kind = libc::S_IFCHR;
        let device = Device { path, kind, major, minor, mode: 0o666, uid: 0, gid: 0, disk: None };
        node(root, &device)?;
    }
    container.devices.iter().try_for_each(|device| node(root, device))?;
    links(root).context("create links in /dev")
}

fn node(root: &Root, device: &Device) -> Result<(), Failed> {
    let step = format!("create device node {}", device.path);
    let path = Path::new(&device.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed(format!("{step}: not a path of a file")));
    };
    let kind = SFlag::from_bits_truncate(device.kind);
    let number = match &device.disk {
        Some(serial) => disk(Path::new(DISKS), serial).context(&step)?,
        None => makedev(device.major.into(), device.minor.into()),
    };
    let mode = Mode::from_bits_truncate(device.mode);
    let parent = root.create(parent, Kind::Directory).context(&step)?;
    match mknodat(&parent, name, kind, mode, number) {
        // The image's own node, or one listed twice.
        Err(Errno::EEXIST) => return Ok(()),
        result => result.context(&step)?,
    }
    let owner = (Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)));
    fchownat(&parent, name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW).context(&step)?;
    fchmodat(&parent, name, mode, FchmodatFlags::FollowSymlink).context(&step)
}

/// The number of the disk with this serial number, of those listed in the folder `disks`.
fn disk(disks: &Path, serial: &str) -> io::Result<libc::dev_t> {
    for entry in fs::read_dir(disks)? {
        let folder = entry?.path();
        // Not every block device has a serial number.
        if fs::read_to_string(folder.join("serial")).is_ok_and(|text| text.trim() == serial) {
            let text = fs::read_to_string(folder.join("dev"))?;
            let (major, minor) = text.trim().split_once(':').ok_or(Errno::ENODEV)?;
            let number = |text: &str| text.parse().map_err(io::Error::other);
            return Ok(makedev(number(major)?, number(minor)?));
        }
    }
    Err(Errno::ENODEV.into())
}

fn links(root: &Root) -> nix::Result<()> {
    let dev = root.create(Path::new("/dev"), Kind::Directory)?;
    for (name, target) in LINKS {
        if name == "ptmx" {
            // The image's node would open the guest's terminals instead of the container's.
            let _ = unlinkat(&dev, name, UnlinkatFlags::NoRemoveDir);
        }
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the terminal `slave` the container's `/dev/console`.
pub fn bind_console(root: &Root, slave: &OwnedFd) -> nix::Result<()> {
    let target = root.create(Path::new("/dev/console"), Kind::File)?;
    let source = proc_path(slave);
    mount(
        Some(source.as_str()),
        proc_path(&target).as_str(),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_number() {
        let disks = tempfile::tempdir().unwrap();
        for (name, serial, number) in [("vda", "one", "254:0"), ("vdb", "two", "254:16")] {
            let folder = disks.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("serial"), serial).unwrap();
            fs::write(folder.join("dev"), format!("{number}\n")).unwrap();
        }
        fs::create_dir(disks.path().join("loop0")).unwrap();

        assert_eq!(disk(disks.path(), "two").unwrap(), makedev(254, 16));
        assert!(disk(disks.path(), "three").is_err());
    }
}
