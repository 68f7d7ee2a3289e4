//! A container's mounts: its root file system, what the configuration puts in it, and what is
//! hidden or made read-only at the end (config.md, Mounts; config-linux.md, Masked Paths).

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use agent_protocol::{Container, Failed, Mount};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::{chdir, fchdir, pivot_root};

use super::copy_up;
use super::root::{Kind, Root, proc_path};
use crate::failure::Context;

/// The flags that belong to a mount and not to its file system (mount_setattr(2)).
const PER_MOUNT: MsFlags = MsFlags::MS_RDONLY
    .union(MsFlags::MS_NOSUID)
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC)
    .union(MsFlags::MS_NOATIME)
    .union(MsFlags::MS_NODIRATIME)
    .union(MsFlags::MS_RELATIME)
    .union(MsFlags::MS_STRICTATIME);

const NONE: Option<&str> = None;

/// Makes the mount tree this namespace's own and the container's root a mount, without which it
/// cannot become `/`.
pub fn open_root(rootfs: &Path) -> Result<Root, Failed> {
    let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(NONE, "/", NONE, slave, NONE).context("make the mount tree a slave")?;
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(rootfs), rootfs, NONE, bind, NONE)
        .context(format_args!("bind rootfs {}", rootfs.display()))?;
    Root::open(rootfs).context(format_args!("open rootfs {}", rootfs.display()))
}

/// Mounts one entry of the configuration.
pub fn add(root: &Root, entry: &Mount) -> Result<(), Failed> {
    let flags = MsFlags::from_bits_retain(entry.flags);
    if flags.contains(MsFlags::MS_BIND) {
        bind(root, entry, flags)?;
    } else {
        file_system(root, entry, flags)?;
    }
    let destination = Path::new(&entry.destination);
    for propagation in &entry.propagation {
        let flags = MsFlags::from_bits_retain(*propagation);
        remount(root, destination, flags)
            .context(format_args!("change propagation of {}", entry.destination))?;
    }
    Ok(())
}

fn bind(root: &Root, entry: &Mount, flags: MsFlags) -> Result<(), Failed> {
    let step = format!("mount {} to {}", entry.source, entry.destination);
    let destination = Path::new(&entry.destination);
    let directory = fs::metadata(&entry.source).context(&step)?.is_dir();
    let kind = if directory { Kind::Directory } else { Kind::File };
    let target = root.create(destination, kind).context(&step)?;
    let how = MsFlags::MS_BIND | (flags & MsFlags::MS_REC);
    mount(Some(entry.source.as_str()), proc_path(&target).as_str(), NONE, how, NONE)
        .context(&step)?;

    let clear = MsFlags::from_bits_retain(entry.clear_flags) & PER_MOUNT;
    let set = flags & PER_MOUNT;
    if set.is_empty() && clear.is_empty() {
        return Ok(());
    }
    let flags = (mount_flags(root, destination).context(&step)? - clear) | set;
    remount(root, destination, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags)
        .context(format_args!("set flags of {}", entry.destination))
}

fn file_system(root: &Root, entry: &Mount, flags: MsFlags) -> Result<(), Failed> {
    let step = format!("mount {} ({}) to {}", entry.source, entry.fstype, entry.destination);
    let destination = Path::new(&entry.destination);
    let tmpfs = entry.fstype == "tmpfs";
    let is_of_image = tmpfs && root.find(destination).is_ok();
    let below = root.create(destination, Kind::Directory).context(&step)?;
    let fstype = if entry.fstype == "cgroup" { "cgroup2" } else { entry.fstype.as_str() };
    let data = match fstype {
        // Options such as the names of version 1 controllers mean nothing to version 2.
        "cgroup2" => String::new(),
        _ if is_of_image => tmpfs_options(&entry.data, &below).context(&step)?,
        _ => entry.data.clone(),
    };
    // A read-only tmpfs is first filled: see `finish`.
    let flags = if tmpfs { flags - MsFlags::MS_RDONLY } else { flags };
    let source = Some(entry.source.as_str());
    let target = proc_path(&below);
    mount(source, target.as_str(), Some(fstype), flags, Some(data.as_str())).context(&step)?;
    if tmpfs && entry.copy_up {
        let above = root.find(destination).context(&step)?;
        copy_up::copy(Path::new(&target), Path::new(&proc_path(&above)))
            .context(format_args!("copy {} into its tmpfs", entry.destination))?;
    }
    Ok(())
}

/// `data` with the mode of the directory below, which the image has, if it names none: a tmpfs on `/tmp`
/// has to stay writable by everybody.
fn tmpfs_options(data: &str, below: &OwnedFd) -> nix::Result<String> {
    if data.split(',').any(|option| option.starts_with("mode=")) {
        return Ok(data.to_owned());
    }
    let mode = fstat(below)?.st_mode & 0o7777;
    let separator = if data.is_empty() { "" } else { "," };
    Ok(format!("{data}{separator}mode={mode:o}"))
}

/// What comes after devices and terminal: read-only mounts, masked paths, the root itself.
pub fn finish(root: &Root, container: &Container) -> Result<(), Failed> {
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    for entry in &container.mounts {
        if entry.fstype == "tmpfs" && entry.flags & MsFlags::MS_RDONLY.bits() != 0 {
            let path = Path::new(&entry.destination);
            let step = format!("remount {} read-only", entry.destination);
            let flags = mount_flags(root, path).context(&step)?;
            remount(root, path, read_only | flags).context(&step)?;
        }
    }
    for path in &container.readonly_paths {
        make_read_only(root, Path::new(path)).context(format_args!("make {path} read-only"))?;
    }
    for path in &container.masked_paths {
        mask(root, Path::new(path)).context(format_args!("mask {path}"))?;
    }
    if container.rootfs_readonly {
        let slash = Path::new("/");
        let step = "remount rootfs read-only";
        let flags = mount_flags(root, slash).context(step)?;
        remount(root, slash, read_only | flags).context(step)?;
    }
    Ok(())
}

/// Makes `root` the root of this mount namespace and lets go of everything else, without a
/// directory to put the old root in (pivot_root(2), `pivot_root(".", ".")`).
pub fn pivot(root: &Root, propagation: u64) -> Result<(), Failed> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let old = open("/", flags, Mode::empty()).context("open the old root")?;
    let new = root.find(Path::new("/")).context("open the new root")?;
    fchdir(&new).context("enter the new root")?;
    pivot_root(".", ".").context("pivot_root")?;
    fchdir(&old).context("enter the old root")?;
    // The detached tree must not take mounts of other namespaces with it.
    let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(NONE, ".", NONE, slave, NONE).context("make the old root a slave")?;
    umount2(".", MntFlags::MNT_DETACH).context("unmount the old root")?;
    chdir("/").context("enter the root")?;
    // Recursion would undo what single mounts asked for.
    let propagation = MsFlags::from_bits_retain(propagation) - MsFlags::MS_REC;
    if !propagation.is_empty() {
        mount(NONE, "/", NONE, propagation, NONE).context("change propagation of rootfs")?;
    }
    Ok(())
}

fn make_read_only(root: &Root, path: &Path) -> nix::Result<()> {
    let found = match root.find(path) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        result => result?,
    };
    let target = proc_path(&found);
    let flags = mount_flags(root, path)?;
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(target.as_str()), target.as_str(), NONE, bind, NONE)?;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    remount(root, path, read_only | flags)
}

fn mask(root: &Root, path: &Path) -> nix::Result<()> {
    let found = match root.find(path) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        result => result?,
    };
    let target = proc_path(&found);
    let directory = fstat(&found)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
    if directory {
        let read_only = MsFlags::MS_RDONLY;
        return mount(Some("tmpfs"), target.as_str(), Some("tmpfs"), read_only, NONE);
    }
    mount(Some("/dev/null"), target.as_str(), NONE, MsFlags::MS_BIND, NONE)
}

fn remount(root: &Root, path: &Path, flags: MsFlags) -> nix::Result<()> {
    let target = root.find(path)?;
    mount(NONE, proc_path(&target).as_str(), NONE, flags, NONE)
}

/// The flags of the mount that holds `path`; a remount that names others would clear them.
fn mount_flags(root: &Root, path: &Path) -> nix::Result<MsFlags> {
    let found = fstatvfs(&root.find(path)?)?.flags();
    let known = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let set = known.into_iter().filter(|(found_as, _)| found.contains(*found_as));
    Ok(set.fold(MsFlags::empty(), |flags, (_, flag)| flags | flag))
}
