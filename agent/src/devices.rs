//! Network devices that come and go while the guest runs: the host attaches them to places where no
//! driver looks by itself, and takes them away only when the driver has let go of them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_protocol::{Failed, NetworkDevice};
use nix::errno::Errno;

use crate::failure::{Context, failed};

/// The driver of the places that the host attaches devices to (vmm/API.md).
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Where the kernel lists interfaces.
const INTERFACES: &str = "/sys/class/net";

/// A device without driver: the driver that had it, and its name there.
type Released = (PathBuf, String);

/// The devices that were let go of and are still there, by the names their interfaces had.
#[derive(Debug, Default)]
pub struct Devices {
    released: BTreeMap<String, Released>,
}

impl Devices {
    /// Takes the driver off the device of interface `name`, with which the interface goes.
    pub fn release(&mut self, name: &str) -> Result<(), Failed> {
        let step = format!("let go of the device of {name}");
        let (driver, device) = device_of(name).context(&step)?;
        fs::write(driver.join("unbind"), &device).context(&step)?;
        self.released.insert(name.to_owned(), (driver, device));
        Ok(())
    }

    /// Gives a device its driver, with which its interface comes.
    pub fn take(&mut self, device: &NetworkDevice) -> Result<(), Failed> {
        match device {
            NetworkDevice::Attached(names) => bind_any(names),
            NetworkDevice::Released(name) => {
                let released = self.released.remove(name);
                let (driver, device) =
                    released.ok_or_else(|| failed(format!("no device of {name:?} is left")))?;
                fs::write(driver.join("bind"), &device)
                    .context(format_args!("take the device that was {name} again"))
            }
        }
    }
}

/// The transport device that interface `name` is made of: the driver's folder, and its name there.
fn device_of(name: &str) -> io::Result<Released> {
    if name.contains('/') {
        return Err(Errno::EINVAL.into());
    }
    // `device` is the virtio device, whose parent is the place it is in.
    let place = fs::canonicalize(Path::new(INTERFACES).join(name).join("device"))?;
    let place = place.parent().ok_or(Errno::ENODEV)?;
    let driver = fs::canonicalize(place.join("driver"))?;
    let device = place.file_name().and_then(|name| name.to_str()).ok_or(Errno::ENODEV)?;
    Ok((driver, device.to_owned()))
}

/// Binds the one of `names` that is there.
fn bind_any(names: &[String]) -> Result<(), Failed> {
    let bind = Path::new(DRIVER).join("bind");
    for name in names {
        match fs::write(&bind, name) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            result => return result.context(format_args!("take the device {name}")),
        }
    }
    Err(failed(format!("none of the places {names:?} is there")))
}
