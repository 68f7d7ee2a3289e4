//! A mount namespace with the directories that are shared with the guest, and nothing else.
//!
//! Every thread of the machine lives there, but for the one that started it. The file
//! server's library needs `/proc/self/fd`: where files are shared, that directory is there, too, but not
//! the rest of `/proc`.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, chroot, fchdir, pivot_root};
use rustix::thread::CapabilitySet;

use crate::confinement::has;

/// Where the namespace grows before it becomes the root. Every host has it, and what is below it is
/// hidden only from the thread that builds.
const SITE: &str = "/dev";

/// The only directory of `/proc` there may be, on the host as in the jail.
const DESCRIPTORS: &str = "/proc/self/fd";

/// What the file server's library opens as well, but reads only for file handles, which are off:
/// here it is empty.
const MOUNTS: &str = "/proc/self/mountinfo";

/// Address space of the stack of a thread that is there for a moment, and may unpack a kernel.
const STACK_BYTES: usize = 256 << 10;

/// The folder with the unix sockets that the guest can connect to.
const SOCKETS: &str = "/sockets";

/// The jail's own file system holds mount points only.
const OPTIONS: &str = "mode=0555,size=64k";

/// How it is mounted once it has all of them.
const SEALED: MsFlags =
    MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Which step of building the jail failed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// What the jail shall hold is not there, or not a directory.
    #[error("open directory {path:?}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host refused a step.
    #[error("{step}")]
    Build {
        /// The step.
        step: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// The namespace; it lasts for as long as this or a thread in it.
#[derive(Debug)]
pub struct Jail {
    namespace: File,
    root: File,
}

impl Jail {
    /// Whether this thread may build one (mount_namespaces(7), setns(2)).
    pub fn is_allowed() -> bool {
        has(CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT)
    }

    /// Builds a jail around the calling thread, which stays there: it should be one that is there for
    /// this. In the jail `directories`, with everything mounted in them, are at [`Jail::path_of`] their
    /// positions, and the files of the folder `sockets` are at [`Jail::socket_path`].
    pub fn build_around_this_thread<'a>(
        directories: impl Iterator<Item = &'a Path>,
        sockets: Option<&Path>,
    ) -> Result<Self, JailError> {
        let step = |step| move |source| JailError::Build { step, source };
        let refused =
            |step| move |error: nix::Error| JailError::Build { step, source: error.into() };
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)
            .map_err(refused("leave the mount namespace"))?;
        let namespace =
            File::open("/proc/thread-self/ns/mnt").map_err(step("open the mount namespace"))?;
        // Now, because only what was opened in this namespace can be bound in it, and the site hides
        // what is below it.
        let directories: Vec<_> = directories.map(open_directory).collect::<Result<_, _>>()?;
        let sockets = sockets.map(open_directory).transpose()?;
        // Slaves: what the host mounts and unmounts in a shared directory goes on showing there.
        change("/", MsFlags::MS_REC | MsFlags::MS_SLAVE)
            .map_err(refused("keep mounts from the host"))?;
        let is_empty = directories.is_empty() && sockets.is_none();
        let flags = if is_empty { SEALED } else { MsFlags::empty() };
        mount(Some("jail"), SITE, Some("tmpfs"), flags, Some(OPTIONS))
            .map_err(refused("mount the jail's root"))?;

        if !directories.is_empty() {
            bind(DESCRIPTORS, DESCRIPTORS).map_err(step("keep the names of open files"))?;
            File::create(format!("{SITE}{MOUNTS}"))
                .map_err(step("make an empty list of mounts"))?;
        }
        for (index, directory) in directories.iter().enumerate() {
            let source = format!("{DESCRIPTORS}/{}", directory.as_raw_fd());
            let path = Jail::path_of(index);
            let path = path.to_string_lossy();
            bind(&source, &path).map_err(step("keep a shared directory"))?;
            disarm(&path).map_err(step("disarm a shared directory"))?;
        }
        if let Some(sockets) = sockets {
            bind_sockets(&sockets).map_err(step("keep the folder of the sockets"))?;
        }

        chdir(SITE).map_err(refused("go to the jail"))?;
        // The old root comes to lie on the new one, and is taken off it (pivot_root(2), NOTES).
        pivot_root(".", ".").map_err(refused("make the jail the root directory"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(refused("unmount the host's file systems"))?;
        if !is_empty {
            change("/", MsFlags::MS_REMOUNT | SEALED).map_err(refused("seal the jail"))?;
        }
        let root = open_directory(Path::new("/"))?;
        Ok(Jail { namespace, root })
    }

    /// Where in the jail the directory is that was the `index`th when it was built.
    pub fn path_of(index: usize) -> PathBuf {
        format!("/share/{index}").into()
    }

    /// Where in the jail the socket at `path` is, whose folder it was built with.
    pub fn socket_path(path: &Path) -> PathBuf {
        Path::new(SOCKETS).join(path.file_name().unwrap_or_default())
    }

    /// Moves the calling thread into the jail, for good: it must have no way back, so it should give
    /// up its capabilities next.
    pub fn enter(&self) -> io::Result<()> {
        // A thread that shares its root directory with others cannot leave for another one.
        unshare(CloneFlags::CLONE_FS)?;
        setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
        // That led to the first mount of the namespace. If this process was in a chroot, the jail
        // took the place of the root directory it had there, and not of that mount.
        fchdir(&self.root)?;
        Ok(chroot(".")?)
    }

    /// What `body` gives in the jail.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> io::Result<T> {
        in_thread(|| self.enter().map(|()| body()))?
    }
}

fn open_directory(path: &Path) -> Result<File, JailError> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .map_err(|source| JailError::Open { path: path.to_owned(), source })
}

/// What `body` gives in a thread of its own.
fn in_thread<T: Send>(body: impl FnOnce() -> T + Send) -> io::Result<T> {
    beside(body, || ()).map(|(given, ())| given)
}

/// What `body` gives in a thread of its own, and what `meanwhile` gives in this one at the same time.
pub fn beside<A: Send, B>(
    body: impl FnOnce() -> A + Send,
    meanwhile: impl FnOnce() -> B,
) -> io::Result<(A, B)> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().stack_size(STACK_BYTES);
        let thread = builder.spawn_scoped(scope, body)?;
        let here = meanwhile();
        let there = thread.join().map_err(|_| io::Error::other("the thread died"))?;
        Ok((there, here))
    })
}

/// Binds `source` and everything mounted in it where the jail has `target`, which is made.
fn bind(source: &str, target: &str) -> io::Result<()> {
    let target = format!("{SITE}{target}");
    fs::create_dir_all(&target)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    Ok(mount(Some(source), target.as_str(), None::<&str>, flags, None::<&str>)?)
}

/// Makes device nodes, set-user-id bits and programs good for nothing where the jail has `target`, and in all
/// that is mounted there (`mount_setattr(2)`): a guest may make any.
fn disarm(target: &str) -> io::Result<()> {
    let path = CString::new(format!("{SITE}{target}"))?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a string and the attributes are of the size that is said; both outlive the call.
    let changed = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    Errno::result(changed)?;
    Ok(())
}

/// Binds `folder` such that nothing can be done there but connect to sockets and read.
fn bind_sockets(folder: &File) -> io::Result<()> {
    let target = format!("{SITE}{SOCKETS}");
    fs::create_dir(&target)?;
    let source = format!("{DESCRIPTORS}/{}", folder.as_raw_fd());
    mount(Some(&*source), &*target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(change(&target, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | SEALED)?)
}

fn change(path: &str, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::iter;
    use std::os::unix::net::{UnixListener, UnixStream};

    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    use tempfile::TempDir;

    use super::*;

    fn build_in_thread<'a>(
        directories: impl Iterator<Item = &'a Path> + Send,
        sockets: Option<&Path>,
    ) -> Result<Jail, JailError> {
        in_thread(|| Jail::build_around_this_thread(directories, sockets)).unwrap()
    }

    fn names(path: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(path).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    #[ignore = "needs root"]
    fn a_jail_holds_what_is_shared_and_nothing_else() {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("file"), "shared").unwrap();
        let jail = build_in_thread(iter::once(folder.path()), None).unwrap();

        let (root, proc, process, shared) = jail
            .run(|| (names("/"), names("/proc"), names("/proc/self"), names("/share/0")))
            .unwrap();

        assert_eq!(root, ["proc", "share"].map(String::from).into());
        assert_eq!(proc, ["self".to_owned()].into());
        assert_eq!(process, ["fd", "mountinfo"].map(String::from).into());
        assert_eq!(shared, ["file".to_owned()].into());
    }

    #[test]
    #[ignore = "needs root"]
    fn a_jail_without_shares_is_empty_and_stays_so() {
        let jail = build_in_thread(iter::empty(), None).unwrap();

        let (root, written) = jail.run(|| (names("/"), fs::write("/file", "x"))).unwrap();

        assert_eq!(root, BTreeSet::new());
        assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }

    #[test]
    #[ignore = "needs root"]
    fn device_nodes_in_what_is_shared_cannot_be_opened_though_they_can_be_made() {
        let folder = TempDir::new().unwrap();
        let below = folder.path().join("below");
        fs::create_dir(&below).unwrap();
        let (mode, zero) = (Mode::from_bits_truncate(0o666), makedev(1, 5));
        let make = |path: &Path| mknod(path, SFlag::S_IFCHR, mode, zero);
        make(&folder.path().join("zero")).unwrap();
        File::open(folder.path().join("zero")).unwrap();
        let jail = build_in_thread(iter::once(folder.path()), None).unwrap();

        let (there, made, opened) = jail
            .run(|| {
                let made = make(Path::new("/share/0/below/zero"));
                (File::open("/share/0/zero"), made, File::open("/share/0/below/zero"))
            })
            .unwrap();

        made.unwrap();
        for outcome in [there, opened] {
            assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EACCES));
        }
        File::open(below.join("zero")).unwrap();
    }

    #[test]
    #[ignore = "needs root"]
    fn no_way_leads_up_from_the_jail() {
        let folder = TempDir::new().unwrap();
        let jail = build_in_thread(iter::once(folder.path()), None).unwrap();

        let above = jail
            .run(|| {
                let descriptors = names("/proc/self/fd/../../../../..");
                (descriptors, names("/share/0/../../../.."))
            })
            .unwrap();

        let root: BTreeSet<_> = ["proc", "share"].map(String::from).into();
        assert_eq!(above, (root.clone(), root));
    }

    #[test]
    #[ignore = "needs root"]
    fn what_is_shared_can_be_written_and_the_jail_cannot() {
        let folder = TempDir::new().unwrap();
        let jail = build_in_thread(iter::once(folder.path()), None).unwrap();

        let (inside, outside) =
            jail.run(|| (fs::write("/share/0/file", "x"), fs::write("/file", "x"))).unwrap();

        inside.unwrap();
        assert_eq!(outside.unwrap_err().raw_os_error(), Some(libc::EROFS));
        assert!(folder.path().join("file").exists());
    }

    #[test]
    #[ignore = "needs root"]
    fn a_socket_of_the_host_can_be_connected_to_and_its_folder_stays_as_it_is() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let jail = build_in_thread(iter::empty(), Some(folder.path())).unwrap();
        let seen_at = Jail::socket_path(&path);

        let (connected, removed) =
            jail.run(|| (UnixStream::connect(&seen_at), fs::remove_file(&seen_at))).unwrap();

        connected.unwrap();
        assert_eq!(removed.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }

    #[test]
    #[ignore = "needs root"]
    fn a_process_in_a_chroot_gets_the_same_jail() {
        let (host, folder) = (TempDir::new().unwrap(), TempDir::new().unwrap());

        let (root, shared) = in_thread(|| {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE).unwrap();
            let all = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some("/"), host.path(), None::<&str>, all, None::<&str>).unwrap();
            chroot(host.path()).unwrap();
            chdir("/").unwrap();
            let jail = build_in_thread(iter::once(folder.path()), None).unwrap();
            jail.run(|| (names("/"), names("/share"))).unwrap()
        })
        .unwrap();

        assert_eq!(root, ["proc", "share"].map(String::from).into());
        assert_eq!(shared, ["0".to_owned()].into());
    }

    #[test]
    #[ignore = "needs root"]
    fn the_thread_that_starts_the_builder_stays_outside() {
        let before = fs::read_link("/proc/thread-self/ns/mnt").unwrap();

        build_in_thread(iter::empty(), None).unwrap();

        assert_eq!(fs::read_link("/proc/thread-self/ns/mnt").unwrap(), before);
        assert!(Path::new("/dev/null").exists());
    }

    #[test]
    #[ignore = "needs root"]
    fn a_missing_directory_is_named() {
        let error = build_in_thread(iter::once(Path::new("/nowhere")), None).unwrap_err();

        assert_eq!(error.to_string(), "open directory \"/nowhere\"");
    }
}
