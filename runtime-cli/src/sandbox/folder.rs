//! What a sandbox keeps in its container's state folder, beside `state.json`.

use std::fs;
use std::io;
use std::path::PathBuf;

use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Hook;

use crate::state::ContainerDir;

/// Mount point of the share tree; empty for everyone but the sandbox process.
const SHARE: &str = "share";

/// The poststop hooks: `delete` runs them when the bundle may be gone.
const POSTSTOP: &str = "poststop.json";

/// Where the share tree is mounted.
pub(super) fn share(dir: &ContainerDir) -> PathBuf {
    dir.path().join(SHARE)
}

/// Keeps the poststop hooks, if there are any.
pub(super) fn keep_poststop(dir: &ContainerDir, hooks: &[Hook]) -> io::Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    fs::write(dir.path().join(POSTSTOP), serde_json::to_vec(hooks)?)
}

/// The poststop hooks that were kept; none if there were none.
pub(super) fn poststop(dir: &ContainerDir) -> io::Result<Vec<Hook>> {
    match fs::read(dir.path().join(POSTSTOP)) {
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
    fn poststop_hooks_outlive_the_bundle() {
        let root = tempfile::tempdir().unwrap();
        let dir = new_dir(&root);
        let hook: Hook = serde_json::from_str(r#"{"path":"/bin/true"}"#).unwrap();

        assert!(poststop(&dir).unwrap().is_empty());
        keep_poststop(&dir, std::slice::from_ref(&hook)).unwrap();

        assert_eq!(poststop(&dir).unwrap(), [hook]);
    }
}
