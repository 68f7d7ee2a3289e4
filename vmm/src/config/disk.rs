//! A block device, as plain data.

use std::collections::BTreeSet;
use std::path::PathBuf;

use devices::virtio::block::{Access, MAX_QUEUES};
use serde::{Deserialize, Serialize};

use super::{ConfigError, Problems, RateLimitConfig, one};

/// Longest disk id, in bytes (virtio 1.2, section 5.2.6: the serial number of a block device).
pub(super) const MAX_DISK_ID_BYTES: usize = 20;

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The serial number the guest sees, at most 20 bytes.
    pub id: String,
    /// A raw image file or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// Whether data goes past the host's page cache. The host's file system must be able to; requests
    /// that are not aligned as it wants go through the page cache all the same.
    #[serde(default)]
    pub direct: bool,
    /// Request queues, 1 to [`MAX_QUEUES`]. One thread serves them all, but a guest with several
    /// vCPUs can give each its own.
    #[serde(default = "one")]
    pub queues: u16,
    /// Who carries requests out.
    #[serde(default)]
    pub engine: DiskEngine,
    /// How much the guest may read and write in all, through all queues; nothing limits it by
    /// default. Every request counts as an operation, zeros that the host writes for the guest count
    /// as bytes, discards do not.
    #[serde(default)]
    pub rate_limit: RateLimitConfig,
}

/// Who carries the requests of a disk out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskEngine {
    /// The host's kernel where it lets us have an io_uring, else as `Sync`.
    #[default]
    Auto,
    /// The host's kernel, with up to 64 requests in flight; without an io_uring the VM is not built.
    IoUring,
    /// The device's thread, one request after the other.
    Sync,
}

impl DiskConfig {
    /// A disk the guest may write, with every other choice left to its default.
    pub fn new(id: &str, path: PathBuf) -> Self {
        DiskConfig {
            id: id.to_owned(),
            path,
            read_only: false,
            direct: false,
            queues: one(),
            engine: DiskEngine::default(),
            rate_limit: RateLimitConfig::default(),
        }
    }

    /// How its file is opened.
    pub(crate) fn access(&self) -> Access {
        Access { read_only: self.read_only, direct: self.direct }
    }

    /// Checks every rule that needs no look at the host.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let mut found = Problems::default();
        validate(std::slice::from_ref(self), &mut found);
        found.into_result()
    }
}

/// Checks every rule about `disks` that needs no look at the host.
pub(super) fn validate(disks: &[DiskConfig], found: &mut Problems) {
    let mut seen = BTreeSet::new();
    for (index, disk) in disks.iter().enumerate() {
        let field = |name: &str| format!("disks[{index}].{name}");
        found.name_of(&field("id"), &disk.id, MAX_DISK_ID_BYTES, &mut seen);
        found.not_empty(&field("path"), &disk.path);
        found.in_range(&field("queues"), disk.queues, 1, MAX_QUEUES);
        disk.rate_limit.validate(&field("rate_limit"), found);
    }
}
