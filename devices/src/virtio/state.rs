//! Where a device stands, as plain data: what a new device needs to go on in its place.

use serde::{Deserialize, Serialize};

use super::{ActivateError, balloon, fs};

/// Where a device stands in one of its queues; both count up to 2^16 and start over (virtio 1.2,
/// sections 2.7.6 and 2.7.8).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Entry of the available ring that comes next.
    pub next_available: u16,
    /// Entry of the used ring that is filled next.
    pub next_used: u16,
}

/// What a device knows beside its place in the queues, for each kind that knows something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Nothing.
    None,
    /// A console.
    Console {
        /// `cols` and `rows` of its configuration space.
        size: [u8; 4],
    },
    /// A network device.
    Net {
        /// How many queue pairs its driver uses.
        pairs: u16,
    },
    /// A socket device; the streams themselves end.
    Vsock {
        /// Whether the guest knew of streams, and must hear that they are gone.
        had_streams: bool,
        /// The port of the host's next stream: the guest must not take it for one that ended.
        next_source_port: u32,
    },
    /// A file system device.
    Fs(fs::State),
    /// A balloon.
    Balloon {
        /// Its configuration space.
        config: [u8; balloon::CONFIG_BYTES],
        /// Number of the last round of hints.
        last_round: u32,
        /// Whether the driver's hints are those of that round.
        in_round: bool,
    },
    /// Memory that is plugged in and out.
    Mem {
        /// How much the host wants plugged, in bytes.
        requested_bytes: u64,
        /// A bit for each block, from the lowest one on: whether it is plugged.
        plugged: Vec<u64>,
    },
}

/// Why a device cannot go on in the place of the one that was saved.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Type, features or queues are not those the driver knows.
    #[error("its driver knows another device: {what} was {saved:#x} and is {found:#x}")]
    Other {
        /// What differs.
        what: &'static str,
        /// What the driver knows.
        saved: u64,
        /// What this device is or has.
        found: u64,
    },
    /// The queues are not in the guest's memory, or the device cannot start with them.
    #[error("start it: {0}")]
    Start(String),
    /// The state is that of another kind of device.
    #[error("the state is one of another kind of device")]
    Kind,
    /// The host's side of the device does not do what it did.
    #[error("bring the host's side of the device to where it was")]
    Backend(#[source] std::io::Error),
}

impl From<ActivateError> for RestoreError {
    fn from(error: ActivateError) -> Self {
        RestoreError::Start(error.to_string())
    }
}
