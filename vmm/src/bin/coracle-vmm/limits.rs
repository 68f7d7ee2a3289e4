//! What the process may use of its host: its cgroup and its resource limits.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};
use devices::virtio::fs::most_open_files;
use devices::virtio::net::MAX_PAIRS;
use log::warn;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::thread::{CapabilitySet, capabilities};
use vmm::VmConfig;

/// Descriptors there is room for beside those of the machine: event loops, what comes from another process
/// and is not taken apart yet, and what is to come.
const SPARE_DESCRIPTORS: u64 = 64;

/// Most descriptors of a device that is attached: an interface has two for each pair of queues, one for each
/// queue, and a few.
const DEVICE_DESCRIPTORS: u64 = 4 * MAX_PAIRS as u64 + 16;

/// A limit from the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceLimit {
    resource: Resource,
    most: u64,
}

impl FromStr for ResourceLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (resource, most) = match text.split_once('=') {
            Some(("no-file", most)) => (Resource::RLIMIT_NOFILE, most),
            Some(("fsize", most)) => (Resource::RLIMIT_FSIZE, most),
            _ => return Err("must be no-file=N or fsize=BYTES".to_owned()),
        };
        let most = most.parse().map_err(|_| format!("must be a number, not {most:?}"))?;
        Ok(ResourceLimit { resource, most })
    }
}

/// Moves the process, which has one thread yet, to the cgroup at `path`.
pub fn join_cgroup(path: &Path) -> anyhow::Result<()> {
    open_members(path)?.write_all(b"0").context("write to cgroup.procs")
}

/// Refuses a `path` that is no cgroup this process may move to, as far as a look can tell.
pub fn check_cgroup(path: &Path) -> anyhow::Result<()> {
    open_members(path).map(drop)
}

fn open_members(path: &Path) -> anyhow::Result<File> {
    let members = path.join("cgroup.procs");
    OpenOptions::new().write(true).open(&members).with_context(|| {
        format!("must be a folder of the cgroup v2 hierarchy, as /sys/fs/cgroup/vms/one: open {members:?}")
    })
}

/// Refuses `limits` that this process cannot have, or with which no machine of `config` can be.
pub fn check(limits: &[ResourceLimit], config: &VmConfig) -> anyhow::Result<()> {
    // The standard streams, /dev/kvm, the machine and its vCPUs, disks and taps: there are more.
    let needed = 5 + usize::from(config.vcpus) + config.disks.len() + config.nets.len();
    for limit in limits {
        let (name, least) = match limit.resource {
            Resource::RLIMIT_NOFILE => ("no-file", needed as u64),
            _ => ("fsize", 0),
        };
        let range = least..=most_allowed(limit.resource)?;
        if !range.contains(&limit.most) {
            bail!("{name} must be {} to {}, not {}", range.start(), range.end(), limit.most);
        }
    }
    Ok(())
}

/// The highest limit that this process may set (setrlimit(2)).
fn most_allowed(resource: Resource) -> anyhow::Result<u64> {
    let (_, most) = getrlimit(resource)?;
    let may_raise = capabilities(None)?.effective.contains(CapabilitySet::SYS_RESOURCE);
    match (may_raise, resource) {
        (false, _) => Ok(most),
        (true, Resource::RLIMIT_NOFILE) => most_open_files().context("read fs.nr_open"),
        (true, _) => Ok(u64::MAX),
    }
}

/// Sets `limits`. Without one for open files, as many as the host allows: thousands of streams need
/// thousands, and the usual limit is there for programs that use select(2).
pub fn set(limits: &[ResourceLimit]) -> nix::Result<()> {
    for &ResourceLimit { resource, most } in limits {
        setrlimit(resource, most, most)?;
        if resource == Resource::RLIMIT_FSIZE {
            // The guest's write shall fail, and not end the guest.
            // SAFETY: no handler is installed that could be unsafe.
            unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
        }
    }
    if limits.iter().all(|limit| limit.resource != Resource::RLIMIT_NOFILE) {
        let (now, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        if now != most {
            let raised = setrlimit(Resource::RLIMIT_NOFILE, most, most);
            raised.unwrap_or_else(|error| warn!("raise the limit of open files: {error}"));
        }
    }
    Ok(())
}

/// Allows no more open files than there are, as many as a machine of `config` may get, and a few.
pub fn lower_descriptor_limit(config: &VmConfig) -> io::Result<()> {
    let vcpus = config.most_vcpus() - config.vcpus;
    let growth = u64::from(vcpus) + DEVICE_DESCRIPTORS * u64::from(config.spare_slots);
    // The kernel gives out the lowest number that is free.
    let next = File::open("/dev/null")?.as_raw_fd();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let needed = most.min(u64::from(next.unsigned_abs()) + growth + SPARE_DESCRIPTORS);
    Ok(setrlimit(Resource::RLIMIT_NOFILE, needed, needed)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use vmm::DiskConfig;

    use super::*;

    #[test]
    fn a_limit_has_a_name_and_a_number() {
        let limit = ResourceLimit { resource: Resource::RLIMIT_FSIZE, most: 4096 };
        assert_eq!("fsize=4096".parse(), Ok(limit));
        assert!("fsize=x".parse::<ResourceLimit>().unwrap_err().contains("must be a number"));
        assert!("stack=1".parse::<ResourceLimit>().unwrap_err().contains("no-file=N"));
    }

    #[test]
    fn a_process_moves_to_a_cgroup_by_writing_to_its_list_of_members() {
        let folder = tempfile::tempdir().unwrap();
        let members = folder.path().join("cgroup.procs");
        fs::write(&members, "").unwrap();

        join_cgroup(folder.path()).unwrap();

        assert_eq!(fs::read_to_string(members).unwrap(), "0");
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for error in [join_cgroup(folder.path()), check_cgroup(folder.path())] {
            let message = format!("{:#}", error.unwrap_err());
            assert!(
                message.starts_with("must be a folder of the cgroup v2 hierarchy"),
                "{message}"
            );
        }
    }

    #[test]
    fn too_few_open_files_for_any_machine_are_refused_and_more_than_can_be() {
        let mut config = VmConfig::new("/k".into());
        config.disks = vec![DiskConfig::new("a", "/d".into())];
        let refused = |limit: &str| {
            let limit = limit.parse().unwrap();
            check(&[limit], &config).map_err(|error| error.to_string())
        };

        assert!(refused("no-file=3").unwrap_err().starts_with("no-file must be 7 to "));
        assert!(refused(&format!("no-file={}", u64::MAX - 1)).is_err());
        assert_eq!(refused("no-file=7"), Ok(()));
        assert_eq!(refused("fsize=0"), Ok(()));
    }
}
