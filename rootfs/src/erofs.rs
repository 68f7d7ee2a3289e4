//! The guest's root as a file system (erofs) that it maps instead of having it unpacked: programs run from
//! the host's page cache, which all guests share.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::initrd::FOLDERS;
use crate::program;

const MKFS: &str = "mkfs.erofs";

/// What does not depend on who makes it and when. Nothing is packed with the metadata: only whole blocks can
/// be mapped. No extended attributes.
const OPTIONS: &[&str] = &[
    "--quiet",
    "-T0",
    "--all-root",
    "-U00000000-0000-0000-0000-000000000000",
    "-Enoinline_data,force-inode-compact",
    "-x-1",
];

/// Where the superblock has the binary logarithm of the block size
/// (Documentation/filesystems/erofs.rst; fs/erofs/erofs_fs.h).
const BLOCK_BITS_AT: usize = 1024 + 12;

/// Blocks are as large as the pages of the kernels that map them.
const BLOCK_BITS: u8 = 12;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What goes into it could not be laid out, or the finished image not be read.
    #[error("lay out the root file system in a temporary folder")]
    Io(#[from] io::Error),
    /// It is made for another page size, which newer programs take from the machine that they run on.
    #[error(
        "{MKFS} makes blocks of other than 4096 bytes, which no guest can map: build on a machine whose \
         pages are that large"
    )]
    BlockSize,
    /// The program that writes the file system.
    #[error(transparent)]
    Program(#[from] program::Error),
}

/// The image with `agent` as `/init`. Device nodes are not in it: a kernel with `CONFIG_DEVTMPFS_MOUNT` has
/// mounted its own before it starts init.
pub fn build(agent: &[u8]) -> Result<Vec<u8>, Error> {
    require_tools()?;
    let work = tempfile::tempdir()?;
    let (tree, image) = (work.path().join("tree"), work.path().join("image"));
    lay_out(&tree, agent)?;
    program::output(program::command(MKFS).args(OPTIONS).arg(&image).arg(&tree))?;
    let image = fs::read(&image)?;
    if image.get(BLOCK_BITS_AT) != Some(&BLOCK_BITS) {
        return Err(Error::BlockSize);
    }
    Ok(image)
}

/// Refuses a machine that cannot build one.
pub fn require_tools() -> Result<(), program::Error> {
    program::require(&[MKFS])
}

/// Whatever the umask of this process is, the files have the modes that they have in the guest.
fn lay_out(tree: &Path, agent: &[u8]) -> io::Result<()> {
    let for_all = || Permissions::from_mode(0o755);
    for folder in [""].iter().chain(FOLDERS) {
        let path = tree.join(folder);
        fs::create_dir(&path)?;
        fs::set_permissions(&path, for_all())?;
    }
    let init = tree.join("init");
    fs::write(&init, agent)?;
    fs::set_permissions(&init, for_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_finds_can_be_run_and_mounted_on() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");

        lay_out(&tree, b"agent").unwrap();

        let mode = |name: &str| fs::metadata(tree.join(name)).unwrap().permissions().mode();
        assert_eq!((mode("init"), mode("proc")), (0o100_755, 0o40_755));
        assert_eq!(fs::read(tree.join("init")).unwrap(), b"agent");
    }

    #[test]
    #[ignore = "needs the program mkfs.erofs"]
    fn the_same_agent_gives_the_same_image() {
        let image = build(b"agent").unwrap();

        assert_eq!(image[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
        assert_eq!(image, build(b"agent").unwrap());
    }
}
