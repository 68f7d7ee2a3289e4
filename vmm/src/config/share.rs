//! A shared directory, as plain data.

use std::collections::BTreeSet;
use std::path::PathBuf;

use devices::virtio::fs;
use serde::{Deserialize, Serialize};

use super::Problems;

/// Longest file system tag, in bytes (virtio 1.2, section 5.11.4).
const MAX_TAG_BYTES: usize = 36;

/// Largest DAX window, in MiB (16 GiB).
pub const MAX_DAX_MIB: u32 = 16 << 10;

/// Largest size of all DAX windows of a machine together, in MiB (32 GiB): each 2 MiB in use take two of the
/// 65,530 mappings that a process usually may have (`vm.max_map_count`) at most, so half are left for all else.
pub const MAX_ALL_DAX_MIB: u32 = 32 << 10;

/// A host directory the guest can mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The name the guest mounts it by, at most 36 bytes.
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// For how long the guest may go by what it has been told or has read.
    #[serde(default)]
    pub cache: CachePolicy,
    /// Whether the guest keeps what is written until it sees fit, or somebody asks for it. For
    /// directories that nobody else uses, and not with `cache` never.
    #[serde(default)]
    pub writeback: bool,
    /// Size of the window through which the guest maps files, in MiB, an even number up to
    /// [`MAX_DAX_MIB`], and all together up to [`MAX_ALL_DAX_MIB`]. What it reads through it is not copied into its own memory, so that all VMs
    /// share the host's page cache. A guest spends a 64th of the size on keeping account of it, and
    /// the host what it maps. Without a window, 0, it reads and writes by requests.
    #[serde(default)]
    pub dax_mib: u32,
    /// Who is told what others change in the directories that the guest knows. Not for files: for who
    /// builds a machine.
    #[serde(skip)]
    pub telling: Option<fs::Telling>,
}

/// For how long a guest may go by what it has been told or has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    /// Not at all: it asks every time. For directories that others change all the time.
    Never,
    /// For a second, and data until the file is opened again.
    #[default]
    Auto,
    /// For a day. For directories that nobody else changes.
    Always,
}

impl ShareConfig {
    /// A directory the guest may write, with every other choice left to its default.
    pub fn new(tag: &str, path: PathBuf) -> Self {
        ShareConfig {
            tag: tag.to_owned(),
            path,
            read_only: false,
            cache: CachePolicy::default(),
            writeback: false,
            dax_mib: 0,
            telling: None,
        }
    }

    /// Size of the window, in bytes.
    pub(crate) fn dax_bytes(&self) -> u64 {
        u64::from(self.dax_mib) << 20
    }

    /// The choices a server of the directory is opened with.
    pub(crate) fn options(&self) -> fs::Options {
        fs::Options {
            read_only: self.read_only,
            cache: match self.cache {
                CachePolicy::Never => fs::Cache::Never,
                CachePolicy::Auto => fs::Cache::Auto,
                CachePolicy::Always => fs::Cache::Always,
            },
            writeback: self.writeback,
            window: None,
            telling: self.telling.clone(),
        }
    }
}

/// Checks every rule about `shares` that needs no look at the host.
pub(super) fn validate(shares: &[ShareConfig], found: &mut Problems) {
    let mut seen = BTreeSet::new();
    let mut dax_mib = 0_u32;
    for (index, share) in shares.iter().enumerate() {
        let field = |name: &str| format!("shares[{index}].{name}");
        found.name_of(&field("tag"), &share.tag, MAX_TAG_BYTES, &mut seen);
        found.not_empty(&field("path"), &share.path);
        found.in_range(&field("dax_mib"), share.dax_mib, 0, MAX_DAX_MIB);
        if share.dax_bytes() % fs::SLOT_BYTES != 0 {
            found.add(&field("dax_mib"), format!("must be even, not {}", share.dax_mib));
        }
        dax_mib = dax_mib.saturating_add(share.dax_mib);
        if dax_mib > MAX_ALL_DAX_MIB {
            let rule = format!("must be at most {MAX_ALL_DAX_MIB} of all shares together");
            found.add(&field("dax_mib"), rule);
        }
        if share.writeback && share.cache == CachePolicy::Never {
            found.add(&field("writeback"), "must not be on with cache never");
        }
    }
}
