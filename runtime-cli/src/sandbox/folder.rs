//! What a sandbox keeps in its container's state folder, beside `state.json`.

use std::fs;
use std::io;
use std::path::PathBuf;

use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Hook;

use crate::state::ContainerDir;

/// Mount point of the share tree; empty for everyone but the sandbox process.
const SHARE: &str = "share";

/// Hooks that a verb runs later, when the bundle may be another or gone.
#[derive(Debug, Clone, Copy)]
pub(super) enum Later {
    /// `start` runs them.
    Poststart,
    /// `delete` runs them.
    Poststop,
}

impl Later {
    /// Their file.
    fn path(self, dir: &ContainerDir) -> PathBuf {
        dir.path().join(match self {
            Self::Poststart => "poststart.json",
            Self::Poststop => "poststop.json",
        })
    }
}

/// Where the share tree is mounted.
pub(super) fn share(dir: &ContainerDir) -> PathBuf {
    dir.path().join(SHARE)
}

/// Keeps hooks, if there are any.
pub(super) fn keep_hooks(dir: &ContainerDir, which: Later, hooks: &[Hook]) -> io::Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    fs::write(which.path(dir), serde_json::to_vec(hooks)?)
}

/// The hooks that were kept; none if there were none.
pub(super) fn hooks(dir: &ContainerDir, which: Later) -> io::Result<Vec<Hook>> {
    match fs::read(which.path(dir)) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Removes the folder. In the sandbox process the share tree is mounted in it, with the container's
/// files and volumes, so nothing is removed recursively: a folder that is not empty stays.
pub(super) fn remove(dir: &ContainerDir) {
    let share = share(dir);
    // Not mounted yet, or not in this mount namespace.
    let _ = umount2(&share, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    let _ = fs::remove_dir(&share);
    for entry in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| !kind.is_dir()) {
            // What cannot be removed keeps the folder, which is reported below.
            let _ = fs::remove_file(entry.path());
        }
    }
    match fs::remove_dir(dir.path()) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => log::warn!("remove state folder {}: {error}", dir.path().display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{ContainerId, StateRoot};

    fn new_dir(root: &tempfile::TempDir) -> ContainerDir {
        StateRoot::new(root.path()).create(&ContainerId::parse("a").unwrap()).unwrap()
    }

    #[test]
    fn the_folder_is_removed_with_the_files_in_it() {
        let root = tempfile::tempdir().unwrap();
        let dir = new_dir(&root);
        fs::create_dir(share(&dir)).unwrap();
        fs::write(dir.path().join("state.json"), "{}").unwrap();

        remove(&dir);

        assert!(!dir.path().exists());
    }

    #[test]
    fn a_share_that_is_not_empty_is_never_descended_into() {
        let root = tempfile::tempdir().unwrap();
        let dir = new_dir(&root);
        fs::create_dir(share(&dir)).unwrap();
        fs::write(share(&dir).join("precious"), "").unwrap();

        remove(&dir);

        assert!(share(&dir).join("precious").exists());
    }

    #[test]
    fn hooks_outlive_the_bundle() {
        let root = tempfile::tempdir().unwrap();
        let dir = new_dir(&root);
        let hook: Hook = serde_json::from_str(r#"{"path":"/bin/true"}"#).unwrap();

        keep_hooks(&dir, Later::Poststop, std::slice::from_ref(&hook)).unwrap();

        assert_eq!(hooks(&dir, Later::Poststop).unwrap(), [hook]);
        assert!(hooks(&dir, Later::Poststart).unwrap().is_empty());
    }
}
