//! What the guest sees of the host's file systems: one tree of bind mounts behind one virtio-fs
//! device.
//!
//! The tree is on a tmpfs in the sandbox's own mount namespace. It dies with the process, and
//! nothing of it is visible on the host.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use agent_protocol::SHARE_PATH;
use nix::mount::{MsFlags, mount};
use vmm::changes::Telling;

use super::telling;
use crate::translate::Bind;

/// The tmpfs holds mount points only.
const TMPFS_OPTIONS: &str = "mode=0711,size=1m";

/// Where containers have what engines bind into each of them.
const OF_ENGINES: [&str; 5] =
    ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/dev/shm", "/run/.containerenv"];

/// Why a file or folder cannot be shared with the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tree itself.
    #[error("make the share folder {path}: this needs room there, and root with CAP_SYS_ADMIN")]
    Tree {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A bind mount's source, in runc's wording.
    #[error("error mounting {host:?} to rootfs at {destination:?}: stat {host}")]
    Source {
        /// Path on the host.
        host: PathBuf,
        /// Path in the container.
        destination: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It cannot be put in the tree.
    #[error("share {host} with the guest")]
    Bind {
        /// Path on the host.
        host: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The tree.
#[derive(Debug)]
pub(super) struct ShareTree {
    path: PathBuf,
    /// Where the container has them.
    mounts: Vec<PathBuf>,
    /// Whether one of them is more than what engines give every container.
    is_of_user: bool,
}

impl ShareTree {
    /// Name of the root file system in the tree.
    pub(super) const ROOTFS: &str = "rootfs";
    /// Folder of the bind mounts' sources in the tree; their names are numbers from 0 on.
    pub(super) const MOUNTS: &str = "mounts";

    /// Makes an empty tree at `path` and puts the root file system in it. This process must be in
    /// a mount namespace of its own.
    pub(super) fn new(path: &Path, rootfs: &Path) -> Result<Self, Error> {
        let made = || {
            fs::create_dir_all(path)?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("coracle"), path, Some("tmpfs"), flags, Some(TMPFS_OPTIONS))?;
            fs::create_dir(path.join(Self::ROOTFS))?;
            fs::create_dir(path.join(Self::MOUNTS))
        };
        made().map_err(|source| Error::Tree { path: path.into(), source })?;
        bind(rootfs, &path.join(Self::ROOTFS), true)
            .map_err(|source| Error::Bind { host: rootfs.into(), source })?;
        Ok(Self { path: path.into(), mounts: Vec::new(), is_of_user: false })
    }

    /// The folder to share.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the container has the bind mounts, in their order.
    pub(super) fn mounts(&self) -> &[PathBuf] {
        &self.mounts
    }

    /// How changes of the bind mounts are told, if somebody may care: the kernel can tell no more than a
    /// hundred containers of a user.
    pub(super) fn telling(&self) -> Option<Telling> {
        let told = |error: &io::Error| log::info!("changes of files are not told: {error}");
        self.is_of_user.then(telling::telling)?.inspect_err(told).ok()
    }

    /// Guest path of the root file system.
    pub(super) fn rootfs() -> String {
        format!("{SHARE_PATH}/{}", Self::ROOTFS)
    }

    /// Puts the source of a bind mount in the tree; its guest path.
    pub(super) fn add(&mut self, mount: &Bind<'_>) -> Result<String, Error> {
        let host = mount.source;
        let failed = |source| Error::Bind { host: host.into(), source };
        let metadata = fs::metadata(host).map_err(|source| Error::Source {
            host: host.into(),
            destination: mount.destination.into(),
            source,
        })?;
        let name = format!("{}/{}", Self::MOUNTS, self.mounts.len());
        let target = self.path.join(&name);
        if metadata.is_dir() {
            fs::create_dir(&target).map_err(failed)?;
        } else {
            File::create_new(&target).map_err(failed)?;
        }
        bind(host, &target, mount.recursive).map_err(failed)?;
        if mount.read_only {
            read_only(&target).map_err(failed)?;
        }
        if mount.private {
            private(&target).map_err(failed)?;
        }
        self.is_of_user |= !OF_ENGINES.iter().any(|path| Path::new(path) == mount.destination);
        self.mounts.push(mount.destination.into());
        Ok(format!("{SHARE_PATH}/{name}"))
    }

    /// Forbids changes to the tree itself; what is mounted in it stays as it is.
    pub(super) fn seal(&self) -> Result<(), Error> {
        let flags = MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV
            | MsFlags::MS_NOEXEC;
        mount(None::<&str>, &self.path, None::<&str>, flags, None::<&str>)
            .map_err(|error| Error::Tree { path: self.path.clone(), source: error.into() })
    }
}

fn bind(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let depth = if recursive { MsFlags::MS_REC } else { MsFlags::empty() };
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | depth, None::<&str>)?;
    Ok(())
}

/// Keeps the mounts at `target` as they are: what the host mounts there later would be busy for it as long
/// as the guest remembers a file of it.
fn private(target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    Ok(mount(None::<&str>, target, None::<&str>, flags, None::<&str>)?)
}

/// Makes the top mount at `target` read-only: the guest is told so too, but is not trusted.
fn read_only(target: &Path) -> io::Result<()> {
    let statfs = nix::sys::statvfs::statvfs(target)?;
    // A bind remount replaces all per-mount flags, so those of the source are repeated.
    let kept = MsFlags::from_bits_truncate(statfs.flags().bits()) & per_mount_flags();
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | kept;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)?;
    Ok(())
}

/// Flags that belong to a mount; their `ST_*` values equal their `MS_*` values (statvfs(3)).
fn per_mount_flags() -> MsFlags {
    MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC
        | MsFlags::MS_NOATIME
        | MsFlags::MS_NODIRATIME
}

#[cfg(test)]
pub(super) mod testing {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Runs `test` on a thread in a mount namespace of its own.
    pub fn with_private_mounts(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            test();
        });
        thread.join().unwrap();
    }

    /// A mount of `source` that the container has at `/data`.
    pub fn mount_of<'a>(source: &'a Path, read_only: bool) -> Bind<'a> {
        Bind { source, destination: Path::new("/data"), recursive: true, read_only, private: true }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{mount_of, with_private_mounts};
    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn folders_and_files_appear_in_the_tree() {
        with_private_mounts(|| {
            let host = tempfile::tempdir().unwrap();
            fs::create_dir(host.path().join("rootfs")).unwrap();
            fs::write(host.path().join("rootfs/etc"), "root").unwrap();
            fs::write(host.path().join("hosts"), "one").unwrap();

            let tree_path = host.path().join("share");
            let mut tree = ShareTree::new(&tree_path, &host.path().join("rootfs")).unwrap();
            let guest = tree.add(&mount_of(&host.path().join("hosts"), false)).unwrap();
            tree.seal().unwrap();

            assert_eq!(guest, "/run/coracle/share/mounts/0");
            assert_eq!(fs::read_to_string(tree_path.join("rootfs/etc")).unwrap(), "root");
            fs::write(tree_path.join("mounts/0"), "two").unwrap();
            assert_eq!(fs::read_to_string(host.path().join("hosts")).unwrap(), "two");
            assert!(fs::write(tree_path.join("new"), "").is_err());
        });
    }

    #[test]
    #[ignore = "needs root"]
    fn a_read_only_bind_is_read_only_on_the_host_too() {
        with_private_mounts(|| {
            let host = tempfile::tempdir().unwrap();
            fs::create_dir(host.path().join("data")).unwrap();

            let tree_path = host.path().join("share");
            let mut tree = ShareTree::new(&tree_path, host.path()).unwrap();
            tree.add(&mount_of(&host.path().join("data"), true)).unwrap();

            let error = fs::write(tree_path.join("mounts/0/file"), "").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        });
    }

    #[test]
    fn a_missing_source_is_named_in_the_wording_of_runc() {
        let mut tree =
            ShareTree { path: "/nonexistent".into(), mounts: Vec::new(), is_of_user: false };

        let error = tree.add(&mount_of(Path::new("/nonexistent/source"), false)).unwrap_err();

        assert!(
            error.to_string().starts_with(
                r#"error mounting "/nonexistent/source" to rootfs at "/data": stat /non"#
            ),
            "{error}"
        );
    }
}
