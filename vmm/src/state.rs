//! A whole machine as plain data, and the part of a running one that knows how to say where it stands.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use arch::{Arch, Host};
use devices::serial::{self, Serial};
use devices::virtio::mmio::{MmioTransport, TransportState};
use devices::virtio::state::RestoreError;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::VmConfig;
use crate::error::Error;
use crate::event_loop::EventLoop;

/// The only layout of [`MachineState`] that this VMM writes and reads.
const VERSION: u32 = 4;

/// Where a machine stands, apart from its memory: all that [`crate::Vmm::restore`] needs beside the
/// configuration to build another one that goes on.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    version: Version,
    memory_mib: u32,
    pluggable_mib: u32,
    most_vcpus: u8,
    pub(crate) vcpus: Vec<<Host as Arch>::VcpuState>,
    pub(crate) board: <Host as Arch>::BoardState,
    pub(crate) devices: DeviceStates,
}

/// Where the devices stand, in the order in which they were placed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DeviceStates {
    serials: Vec<serial::State>,
    /// Each with the name of its device.
    virtio: Vec<(String, TransportState)>,
}

/// Says of which layout a state is; reading one of another layout fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version;

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(VERSION)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u32::deserialize(deserializer)? {
            VERSION => Ok(Version),
            other => Err(serde::de::Error::custom(format_args!(
                "machine state of version {other}, of which this VMM knows nothing: it reads {VERSION}"
            ))),
        }
    }
}

/// What a machine cannot be saved for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsaved {
    /// Its processors run.
    Running,
    /// It has ended.
    Ended,
    /// A device came to it while it ran, or a driver has not let go of one that was detached.
    Attached,
    /// Memory came to it while it ran.
    Grown,
    /// A copy of its memory was asked for, and that is in a file already.
    InFile,
}

impl fmt::Display for Unsaved {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Unsaved::Running => "it is running: pause it first",
            Unsaved::Ended => "it has ended",
            Unsaved::Attached => {
                "a device is attached to it (detach it first), or a driver has not let go of one that \
                 was detached"
            }
            Unsaved::Grown => "memory is plugged into it: request its removal first",
            Unsaved::InFile => "its memory is in a file: save it with that",
        })
    }
}

impl MachineState {
    pub(crate) fn new(
        shape: Shape,
        vcpus: Vec<<Host as Arch>::VcpuState>,
        board: <Host as Arch>::BoardState,
        devices: DeviceStates,
    ) -> Self {
        let Shape { memory_mib, pluggable_mib, most_vcpus, .. } = shape;
        let version = Version;
        MachineState { version, memory_mib, pluggable_mib, most_vcpus, vcpus, board, devices }
    }

    /// Refuses a configuration of another machine, as far as devices do not find out themselves.
    pub(crate) fn compare(&self, config: &VmConfig) -> Result<(), Error> {
        let vcpus = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
        for (field, saved, found) in [
            ("vcpus", vcpus, config.vcpus.into()),
            ("max_vcpus", self.most_vcpus.into(), config.most_vcpus().into()),
            ("memory.size_mib", self.memory_mib, config.memory.size_mib),
            ("memory.pluggable_mib", self.pluggable_mib, config.memory.pluggable_mib),
        ] {
            if saved != found {
                return Err(Error::OtherMachine { field, saved, found });
            }
        }
        Ok(())
    }
}

/// What of a configuration a state must match.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    memory_mib: u32,
    pluggable_mib: u32,
    /// How many vCPUs the guest was told of.
    pub(crate) most_vcpus: u8,
    /// Whether the guest may write to a mapped file, of which nobody else ever sees anything.
    pub(crate) has_private_pmem: bool,
    /// Whether the guest may have mapped files, of which the state says nothing.
    pub(crate) has_window: bool,
}

impl Shape {
    pub(crate) fn of(config: &VmConfig) -> Self {
        let memory = &config.memory;
        Shape {
            memory_mib: memory.size_mib,
            pluggable_mib: memory.pluggable_mib,
            most_vcpus: config.most_vcpus(),
            has_private_pmem: config.pmem.iter().any(|pmem| !pmem.read_only),
            has_window: config.shares.iter().any(|share| share.dax_mib != 0),
        }
    }
}

/// The devices of a machine, for who wants to know where they stand.
#[derive(Default)]
pub(crate) struct Devices {
    pub(crate) serials: Vec<Arc<Mutex<Serial>>>,
    /// Each with the name of its device.
    pub(crate) transports: Vec<(String, Arc<Mutex<MmioTransport>>)>,
    /// Whether they stand still. Locked before any device.
    still: Mutex<bool>,
}

impl Devices {
    /// Brings all devices to a standstill, with `loops`, which serve them, and says where they stand.
    /// No vCPU may run.
    pub(crate) fn save(&self, loops: &[EventLoop]) -> DeviceStates {
        let mut still = lock(&self.still);
        loops.iter().for_each(EventLoop::park);
        *still = true;
        DeviceStates {
            serials: self.serials.iter().map(|serial| lock(serial).save()).collect(),
            virtio: self
                .transports
                .iter()
                .map(|(name, transport)| (name.clone(), lock(transport).save()))
                .collect(),
        }
    }

    /// Lets the devices go on, if they stand still.
    pub(crate) fn resume(&self, loops: &[EventLoop]) {
        let mut still = lock(&self.still);
        if std::mem::take(&mut *still) {
            self.transports.iter().for_each(|(_, transport)| lock(transport).resume());
            loops.iter().for_each(EventLoop::unpark);
        }
    }

    /// Makes fresh devices go on from `states`.
    pub(crate) fn restore(&self, states: &DeviceStates) -> Result<(), Error> {
        let failed = |name: &str| {
            let name = name.to_owned();
            move |source| Error::Restore { name, source }
        };
        count("serial ports", states.serials.len(), self.serials.len())?;
        for (serial, state) in self.serials.iter().zip(&states.serials) {
            lock(serial)
                .restore(state)
                .map_err(RestoreError::Backend)
                .map_err(failed("serial port"))?;
        }
        count("devices", states.virtio.len(), self.transports.len())?;
        for ((name, transport), (saved, state)) in self.transports.iter().zip(&states.virtio) {
            if name != saved {
                return Err(Error::OtherDevice { saved: saved.clone(), found: name.clone() });
            }
            lock(transport).restore(state).map_err(failed(name))?;
        }
        Ok(())
    }
}

fn count(field: &'static str, saved: usize, found: usize) -> Result<(), Error> {
    let small = |count| u32::try_from(count).unwrap_or(u32::MAX);
    if saved == found {
        return Ok(());
    }
    Err(Error::OtherMachine { field, saved: small(saved), found: small(found) })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no device panics while it holds its lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_nobody_knows_is_refused_by_its_number() {
        let error = serde_json::from_str::<Version>("7").unwrap_err().to_string();
        let reads = format!("it reads {VERSION}");
        assert!(error.contains("version 7") && error.contains(&reads), "{error}");

        let bytes = postcard::to_stdvec(&7u32).unwrap();
        assert!(postcard::from_bytes::<Version>(&bytes).is_err());
        let bytes = postcard::to_stdvec(&Version).unwrap();
        assert_eq!(postcard::from_bytes(&bytes), Ok(Version));
    }
}
