//! A file that the guest maps, as plain data.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::disk::MAX_DISK_ID_BYTES;
use super::{Problems, VmConfig};

/// What a kernel must be told to start `/init` from the first file mapped into its memory. DAX always, or not
/// at all: a copy is what it is to do without. Nothing in Linux awaits the thread that finds such files, so
/// the root may be there a moment late, or never: for that it has ten seconds.
const MAPPED_ROOT: &str =
    "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always rootwait=10 ro init=/init";

/// A file mapped into the guest's memory, which the guest sees as a disk of whole 2 MiB, `/dev/pmem0`
/// and so on, and can mount with DAX: no copy of a page is made. Machines with the same file share
/// its pages. For each GiB the guest needs 16 MiB of its own memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// What log lines call it.
    pub id: String,
    /// The file, which must not be empty, nor become shorter while the guest runs.
    pub path: PathBuf,
    /// Whether the guest may only read it. What a guest writes that may do so is the guest's alone
    /// and ends with it: the file stays as it is. One that may not, and does, is not heard, where the
    /// processor lets KVM pass over it; else its machine ends.
    #[serde(default)]
    pub read_only: bool,
}

impl VmConfig {
    /// Has the kernel map its root from the file system (erofs) in the file `rootfs`, and start `/init` from
    /// there. It must have what that takes built in: virtio-pmem, DAX, erofs.
    pub fn map_root(&mut self, rootfs: PathBuf) {
        // The guest names them in their order.
        self.pmem.insert(0, PmemConfig { id: "rootfs".into(), path: rootfs, read_only: true });
        if !self.boot.cmdline.is_empty() {
            self.boot.cmdline.push(' ');
        }
        self.boot.cmdline.push_str(MAPPED_ROOT);
    }
}

/// Checks every rule that needs no look at the host.
pub(super) fn validate(files: &[PmemConfig], found: &mut Problems) {
    let mut seen = BTreeSet::new();
    for (index, file) in files.iter().enumerate() {
        let field = |name: &str| format!("pmem[{index}].{name}");
        found.name_of(&field("id"), &file.id, MAX_DISK_ID_BYTES, &mut seen);
        found.not_empty(&field("path"), &file.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_root_is_the_first_that_the_guest_names() {
        let mut config = VmConfig::new("/kernel".into());
        config.boot.cmdline = "quiet".into();
        config.pmem =
            vec![PmemConfig { id: "data".into(), path: "/data".into(), read_only: false }];

        config.map_root("/root.erofs".into());

        assert_eq!(config.pmem[0].path, PathBuf::from("/root.erofs"));
        assert!(config.pmem[0].read_only);
        assert!(config.boot.cmdline.starts_with("quiet root=/dev/pmem0 "));
        config.validate().unwrap();
    }
}
