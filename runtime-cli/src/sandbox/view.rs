//! What those see who enter the mount namespace of a container's process, as `podman cp` and nsenter(1)
//! do: the container's files, and nothing of the host.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::fchdir;

use super::share::ShareTree;

/// A bind mount with everything mounted in it.
const BIND: MsFlags = MsFlags::MS_BIND.union(MsFlags::MS_REC);

/// Why they cannot be shown.
#[derive(Debug, thiserror::Error)]
#[error("show the container's files in its mount namespace: this needs root with CAP_SYS_ADMIN")]
pub struct Error(#[from] io::Error);

/// Puts the root file system of `tree` on top of this namespace's root, and its other mounts where the
/// container has them. The threads of this process do not see it, as they have their root directory
/// already; who enters gets what is on top (setns(2)). To be called once the machine's jail is made, which
/// would have to take off two roots in the place of one.
///
/// What the guest mounts itself, as a tmpfs, is not there.
pub(super) fn show(tree: &ShareTree) -> Result<(), Error> {
    bind(&tree.path().join(ShareTree::ROOTFS), "/")?;
    let placed = thread::scope(|scope| {
        let thread = scope.spawn(|| place_mounts(tree));
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread died")))
    });
    Ok(placed?)
}

/// Moves this thread to the new root, where no link of the container's leads out, and makes the mounts.
fn place_mounts(tree: &ShareTree) -> io::Result<()> {
    let namespace = File::open("/proc/thread-self/ns/mnt")?;
    let sources = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(tree.path().join(ShareTree::MOUNTS))?;
    // A thread that shares its root directory with others cannot leave for another one.
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
    fchdir(&sources)?;
    for (name, destination) in tree.mounts().iter().enumerate() {
        // The agent has made what was missing, but the container's files may be read-only, or a file
        // system of the guest's own may be there.
        if let Err(error) = bind(name.to_string().as_ref(), destination) {
            log::debug!("show {}: {error}", destination.display());
        }
    }
    Ok(())
}

fn bind(source: &Path, target: impl AsRef<Path>) -> io::Result<()> {
    Ok(mount(Some(source), target.as_ref(), None::<&str>, BIND, None::<&str>)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::share::testing::{mount_of, with_private_mounts};
    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn who_enters_the_namespace_sees_the_container_and_not_the_host() {
        with_private_mounts(|| {
            let host = tempfile::tempdir().unwrap();
            for folder in ["rootfs/data", "volume", "tree"] {
                fs::create_dir_all(host.path().join(folder)).unwrap();
            }
            fs::write(host.path().join("volume/file"), "of the volume").unwrap();
            let rootfs = host.path().join("rootfs");
            let mut tree = ShareTree::new(&host.path().join("tree"), &rootfs).unwrap();
            tree.add(&mount_of(&host.path().join("volume"), false)).unwrap();
            tree.seal().unwrap();

            show(&tree).unwrap();

            let namespace = File::open("/proc/thread-self/ns/mnt").unwrap();
            let seen = thread::spawn(move || {
                unshare(CloneFlags::CLONE_FS).unwrap();
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS).unwrap();
                fs::write("/made", "inside").unwrap();
                (fs::read_to_string("/data/file").unwrap(), Path::new("/proc").exists())
            });
            assert_eq!(seen.join().unwrap(), ("of the volume".to_owned(), false));
            assert_eq!(fs::read_to_string(rootfs.join("made")).unwrap(), "inside");
            assert!(Path::new("/proc/self").exists(), "the threads of this process stay");
        });
    }
}
