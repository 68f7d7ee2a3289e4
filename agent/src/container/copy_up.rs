//! Copies a directory tree into the tmpfs mounted over it (mount option `tmpcopyup`).

use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;

/// Copies what is in the directory `from` into the directory `to`, with owners and modes. Devices,
/// sockets and pipes are left out: nobody can have meant to copy those.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let metadata = fs::symlink_metadata(&source)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            DirBuilder::new().mode(0o700).create(&target)?;
            copy(&source, &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else {
            continue;
        }
        set_owner(&target, &metadata)?;
    }
    Ok(())
}

fn set_owner(target: &Path, metadata: &Metadata) -> io::Result<()> {
    lchown(target, Some(metadata.uid()), Some(metadata.gid()))?;
    if metadata.is_symlink() {
        return Ok(());
    }
    // After the owner, because a change of owner clears the set-id bits.
    fs::set_permissions(target, Permissions::from_mode(metadata.mode() & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_arrives_with_its_modes_and_links() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        fs::create_dir(from.path().join("folder")).unwrap();
        fs::write(from.path().join("folder/file"), "text").unwrap();
        fs::set_permissions(from.path().join("folder/file"), Permissions::from_mode(0o4711))
            .unwrap();
        symlink("folder/file", from.path().join("link")).unwrap();

        copy(from.path(), to.path()).unwrap();

        assert_eq!(fs::read_to_string(to.path().join("link")).unwrap(), "text");
        assert!(to.path().join("link").is_symlink());
        let mode = fs::metadata(to.path().join("folder/file")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o4711);
    }
}
