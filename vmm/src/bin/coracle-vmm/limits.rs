//! What the process may use of its host: its cgroup and its resource limits.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::str::FromStr;

use log::warn;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Descriptors there is room for beside those of the machine: clients of the control socket, event
/// loops, and what is to come.
const SPARE_DESCRIPTORS: u64 = 64;

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
pub fn join_cgroup(path: &Path) -> io::Result<()> {
    let mut members = OpenOptions::new().write(true).open(path.join("cgroup.procs"))?;
    members.write_all(b"0")
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
        let raised = getrlimit(Resource::RLIMIT_NOFILE)
            .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
        if let Err(error) = raised {
            warn!("raise the limit of open files: {error}");
        }
    }
    Ok(())
}

/// Allows no more open files than there are, and a few.
pub fn lower_descriptor_limit() -> io::Result<()> {
    // The kernel gives out the lowest number that is free.
    let next = File::open("/dev/null")?.as_raw_fd();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let needed = most.min(u64::from(next.unsigned_abs()) + SPARE_DESCRIPTORS);
    Ok(setrlimit(Resource::RLIMIT_NOFILE, needed, needed)?)
}

#[cfg(test)]
mod tests {
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
        std::fs::write(&members, "").unwrap();

        join_cgroup(folder.path()).unwrap();

        assert_eq!(std::fs::read_to_string(members).unwrap(), "0");
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(join_cgroup(folder.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
