//! What PID 1 does before it serves: kernel modules, file systems, cgroups, loopback.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, chroot};
use std::path::Path;

use agent_protocol::{Failed, SHARE_PATH, SHARE_TAG, Sandbox};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, sethostname};

use crate::container::cgroup;
use crate::failure::Context;
use crate::{limits, network};

/// Where the guest's cgroup hierarchy is.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// File names below [`MODULES`], one a line, in the order of loading; absent with a kernel that has
/// everything built in.
const MODULE_ORDER: &str = "/modules/order";

const MODULES: &str = "/modules";

/// As systemd mounts it. With `nsdelegate` a container may divide what it has among cgroups of its
/// own, but neither change the limits of its own cgroup nor freeze it, even if it can write there.
const CGROUP_OPTIONS: &str = "nsdelegate,memory_recursiveprot";

/// What would wake up an idle processor, and the value that keeps it from that
/// (Documentation/admin-guide/sysctl/vm.rst).
const IDLENESS: [(&str, &str); 2] = [
    // Twice a second the kernel looks whether memory is worth being compacted in advance. What needs a
    // large page compacts when it asks for it.
    ("/proc/sys/vm/compaction_proactiveness", "0"),
    // Each second it adds up what each processor has counted of memory, which then wakes up once more for
    // having done something. Until it does, ten minutes later, the sum is off by some hundred pages at most.
    ("/proc/sys/vm/stat_interval", "600"),
];

/// Type, target, flags and options of the guest's own file systems, in order of mounting.
const FILE_SYSTEMS: [(&str, &str, MsFlags, &str); 8] = [
    ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
    ("proc", "/proc", LOCKED, ""),
    ("sysfs", "/sys", LOCKED, ""),
    ("cgroup2", CGROUPS, LOCKED, CGROUP_OPTIONS),
    ("tmpfs", "/run", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=0755"),
    ("tmpfs", "/tmp", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=1777"),
    ("devpts", "/dev/pts", MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC), "mode=0620,gid=5"),
    ("tmpfs", "/dev/shm", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=1777"),
];

const LOCKED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Why the guest could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The initial root could not be covered by a mount.
    #[error("make the root a mount: {0}")]
    Root(#[source] io::Error),
    /// A kernel module of the list.
    #[error("load module {name}: {source}")]
    Module {
        /// Its line in the list.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// One of the guest's own file systems.
    #[error("mount {target}: {source}")]
    Mount {
        /// Where.
        target: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The cgroup hierarchy.
    #[error("prepare cgroups: {0}")]
    Cgroups(#[source] io::Error),
    /// Limits for the agent and all it starts.
    #[error("set limits: {0}")]
    Limits(#[source] Errno),
    /// The loopback interface.
    #[error("bring up loopback: {0}")]
    Loopback(#[source] io::Error),
}

/// Makes the guest ready to serve.
pub fn prepare() -> Result<(), Error> {
    load_modules()?;
    cover_root().map_err(Error::Root)?;
    mount_file_systems()?;
    crate::kmsg::install();
    let_idle();
    cgroup::prepare(Path::new(CGROUPS)).map_err(Error::Cgroups)?;
    limits::set_hard().and_then(|()| limits::raise()).map_err(Error::Limits)?;
    network::bring_up_loopback().map_err(Error::Loopback)
}

/// Keeps the kernel from waking up for nothing.
fn let_idle() {
    for (path, value) in IDLENESS {
        if let Err(error) = fs::write(path, value) {
            log::debug!("write {path}: {error}");
        }
    }
}

/// What the host asks for once per guest: its name, its network, the share.
pub fn configure(sandbox: &Sandbox) -> Result<(), Failed> {
    if let Some(name) = &sandbox.hostname {
        sethostname(name).context(format_args!("set host name {name:?}"))?;
    }
    if sandbox.share {
        fs::create_dir_all(SHARE_PATH).context(format_args!("create {SHARE_PATH}"))?;
        let none = None::<&str>;
        mount(Some(SHARE_TAG), SHARE_PATH, Some("virtiofs"), MsFlags::empty(), none)
            .context(format_args!("mount virtio-fs share {SHARE_TAG:?}"))?;
    }
    network::configure(&sandbox.network)
}

/// Leaves nothing unwritten behind.
pub fn finish() {
    // SAFETY: sync takes no arguments and cannot fail.
    unsafe { libc::sync() };
    // There may be no share, and the guest ends in any case.
    let _ = umount2(SHARE_PATH, MntFlags::MNT_DETACH);
}

fn load_modules() -> Result<(), Error> {
    let Ok(order) = File::open(MODULE_ORDER) else { return Ok(()) };
    for name in BufReader::new(order).lines().map_while(Result::ok) {
        if !name.is_empty() {
            load_module(&name).map_err(|source| Error::Module { name, source })?;
        }
    }
    Ok(())
}

fn load_module(name: &str) -> io::Result<()> {
    let file = File::open(Path::new(MODULES).join(name))?;
    // SAFETY: the kernel reads the open file and the empty parameter string.
    let result = Errno::result(unsafe {
        libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0)
    });
    match result {
        // Built in, or there twice.
        Ok(_) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Puts a mount of the root over itself: the initial root of the kernel is the one mount that
/// pivot_root(2) refuses to replace, so no container could be made in it.
fn cover_root() -> io::Result<()> {
    const BASE: &str = "/run";
    let none = None::<&str>;
    make_directory(BASE)?;
    mount(Some("/"), BASE, none, MsFlags::MS_BIND, none)?;
    chdir(BASE)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    chroot(".")?;
    Ok(chdir("/")?)
}

fn mount_file_systems() -> Result<(), Error> {
    for (fstype, target, flags, options) in FILE_SYSTEMS {
        let mounted = make_directory(target).and_then(|()| {
            match mount(Some(fstype), target, Some(fstype), flags, Some(options)) {
                // The kernel may have mounted devtmpfs itself.
                Ok(()) | Err(Errno::EBUSY) => Ok(()),
                Err(error) => Err(error.into()),
            }
        });
        mounted.map_err(|source| Error::Mount { target, source })?;
    }
    Ok(())
}

fn make_directory(path: &str) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_cannot_lift_the_limits_of_its_cgroup() {
        let options = FILE_SYSTEMS.iter().find(|(kind, ..)| *kind == "cgroup2").map(|row| row.3);

        assert!(options.is_some_and(|options| options.split(',').any(|o| o == "nsdelegate")));
    }
}
