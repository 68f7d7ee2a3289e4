//! Guest RAM in a configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{BLOCK_MIB, MAX_MEMORY_MIB, MIN_MEMORY_MIB, Problems};

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub size_mib: u32,
    /// How much memory more can be plugged in while the guest runs, in MiB, a multiple of 2; 0 leaves
    /// the device away. Linux uses it in pieces of 128 MiB. None of it is plugged at the start. An
    /// honest guest keeps to what is plugged; what a hostile one may take is this.
    #[serde(default)]
    pub pluggable_mib: u32,
    /// Whether the host may merge equal pages of different guests (KSM).
    #[serde(default)]
    pub mergeable: bool,
    /// Where it is kept. A machine that is to be saved needs a file.
    #[serde(default)]
    pub backing: MemoryBacking,
}

/// Where guest RAM is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryBacking {
    /// In memory that goes with the machine.
    #[default]
    Anonymous,
    /// In a file without a name, which goes with its last descriptor.
    Memfd,
    /// In this file, which is made and must not exist yet, and which a machine that was built
    /// leaves behind.
    File(PathBuf),
}

impl MemoryConfig {
    /// Checks every rule that needs no look at the host.
    pub(super) fn validate(&self, found: &mut Problems) {
        found.in_range("memory.size_mib", self.size_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB);
        found.in_range("memory.pluggable_mib", self.pluggable_mib, 0, MAX_MEMORY_MIB);
        if self.pluggable_mib % BLOCK_MIB != 0 {
            found.add("memory.pluggable_mib", "must be a multiple of 2");
        }
        if self.mergeable && self.backing != MemoryBacking::Anonymous {
            let rule = "must not be set for memory in a file, which the host cannot merge";
            found.add("memory.mergeable", rule);
        }
        if let MemoryBacking::File(path) = &self.backing {
            found.not_empty("memory.backing.file", path);
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig {
            size_mib: 256,
            pluggable_mib: 0,
            mergeable: false,
            backing: MemoryBacking::default(),
        }
    }
}
