//! The host cgroup of a sandbox: everything the container costs the host is counted there.

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use libcgroups::common::{
    AnyCgroupManager, AnyManagerError, CgroupConfig, CgroupManager, CgroupSetup, ControllerOpt,
    WrappedIoError, create_cgroup_manager, get_cgroup_setup,
};
use libcgroups::v2::manager::V2ManagerError;
use nix_of_libcgroups::unistd::Pid;
use oci_spec::runtime::LinuxResources;

use crate::logging::chain;
use crate::rootless;

/// Where cgroup file systems are mounted (cgroups(7)).
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// How often a cgroup is tried to be made: more often than it has others above it that are missing.
const TRIES: usize = 32;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why the host cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's cgroups are not as expected.
    #[error("find the host's cgroups for {path}: are they mounted at {CGROUP_ROOT}?")]
    Find {
        /// `linux.cgroupsPath`.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Source,
    },
    /// The cgroup that holds everything.
    #[error(
        "linux.cgroupsPath {0} is the root of the host's cgroups: name a cgroup of the container's \
         own, such as /coracle/NAME"
    )]
    Root(PathBuf),
    /// Somebody else's cgroup: removing it with the container would kill them.
    #[error(
        "container's cgroup is not empty: {count} process(es) found in {path}: end them, or name \
         another linux.cgroupsPath"
    )]
    InUse {
        /// `linux.cgroupsPath`.
        path: PathBuf,
        /// How many processes are there, and below it.
        count: usize,
    },
    /// The cgroup cannot be made or entered.
    #[error("enter host cgroup {path}")]
    Enter {
        /// `linux.cgroupsPath`.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Source,
    },
    /// A limit is refused.
    #[error("limit host cgroup {path} to what linux.resources says")]
    Limit {
        /// `linux.cgroupsPath`.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Source,
    },
    /// The cgroup cannot be removed.
    #[error("remove host cgroup {path}: is a process still in it?")]
    Remove {
        /// `linux.cgroupsPath`.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Source,
    },
}

/// Name of a cgroup, as libcgroups takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) path: PathBuf,
    pub(super) systemd: bool,
}

impl Name {
    /// The cgroup a bundle asks for, or one named after the container.
    pub(super) fn of(path: Option<&Path>, systemd: bool, id: &str) -> Self {
        let path = match path {
            Some(path) if !path.as_os_str().is_empty() => path.to_path_buf(),
            _ if systemd => format!("system.slice:coracle:{id}").into(),
            _ => format!("/coracle-{id}").into(),
        };
        Self { path, systemd }
    }

    fn manager(&self, id: &str) -> Result<AnyCgroupManager, Error> {
        let failed = |source: Source| Error::Find { path: self.path.clone(), source };
        let unified = get_cgroup_setup().map_err(|source| failed(source.into()))?;
        let cgroup_path = match unified {
            CgroupSetup::Unified => self.path.clone(),
            // libcgroups talks to systemd on unified hosts only.
            CgroupSetup::Hybrid | CgroupSetup::Legacy => plain_path(&self.path),
        };
        let cgroup_path = below_root(&cgroup_path)?;
        let config =
            CgroupConfig { cgroup_path, systemd_cgroup: self.systemd, container_name: id.into() };
        create_cgroup_manager(config).map_err(|source| failed(source.into()))
    }
}

/// `slice:prefix:name` as the folder systemd would make; any other path as it is.
fn plain_path(path: &Path) -> PathBuf {
    let text = path.to_string_lossy();
    let parts: Vec<&str> = text.split(':').collect();
    match parts[..] {
        [slice, prefix, name] => format!("/{slice}/{prefix}-{name}.scope").into(),
        _ => path.to_path_buf(),
    }
}

/// A path without `..`: libcgroups joins it with the root and kills whom it finds there at the end.
fn below_root(path: &Path) -> Result<PathBuf, Error> {
    let mut below = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => below.push(name),
            Component::ParentDir => drop(below.pop()),
            Component::Prefix(_) | Component::RootDir | Component::CurDir => {}
        }
    }
    match below.file_name() {
        // systemd takes its `slice:prefix:name` as it is.
        Some(_) if path.is_relative() => Ok(below.strip_prefix("/").unwrap_or(&below).into()),
        Some(_) => Ok(below),
        None => Err(Error::Root(path.into())),
    }
}

/// A cgroup for this process.
pub(super) struct Cgroup {
    name: Name,
    manager: AnyCgroupManager,
    former: Vec<PathBuf>,
}

impl Cgroup {
    /// Looks where the cgroup is to be, and that nobody is in it.
    pub(super) fn find(name: Name, id: &str) -> Result<Self, Error> {
        let cgroup = Self { manager: name.manager(id)?, former: own_cgroups(), name };
        // A cgroup that does not exist yet cannot be read.
        match cgroup.manager.get_all_pids().map(|pids| pids.len()) {
            Ok(0) | Err(_) => Ok(cgroup),
            Ok(count) => Err(Error::InUse { path: cgroup.name.path, count }),
        }
    }

    /// Makes the cgroup if need be, enters it with the whole process, and sets its limits. None for a user
    /// whom the host's cgroups do not belong to: the limits hold inside the guest in any case.
    pub(super) fn enter(self, resources: &LinuxResources) -> Result<Option<Self>, Error> {
        match self.try_enter(resources) {
            Err(error) if rootless::is_in_user_namespace() => {
                log::info!("the container has no cgroup on the host: {}", chain(&error));
                Ok(None)
            }
            result => result.map(Some),
        }
    }

    fn try_enter(self, resources: &LinuxResources) -> Result<Self, Error> {
        let path = self.name.path.clone();
        if let Err(source) = add(&self.manager, Pid::this()) {
            self.leave();
            return Err(Error::Enter { path, source: source.into() });
        }
        if let Err(source) = apply(&self.manager, resources) {
            self.leave();
            return Err(Error::Limit { path, source: source.into() });
        }
        Ok(self)
    }

    /// Goes back to where the process was, and removes the cgroup.
    pub(super) fn leave(self) {
        let pid = std::process::id().to_string();
        for cgroup in &self.former {
            // A hierarchy that cannot be left leaves a cgroup that cannot be removed: said below.
            let _ = fs::write(cgroup.join("cgroup.procs"), &pid);
        }
        // Removing kills whoever is in it: that must not be this process.
        let own = own_cgroups();
        if own.iter().all(|cgroup| self.former.contains(cgroup)) {
            if let Err(error) = self.manager.remove() {
                log::warn!("remove host cgroup {}: {error}", self.name.path.display());
            }
        }
    }
}

/// Makes the cgroup if need be, and puts the process `pid` into it.
fn add(manager: &AnyCgroupManager, pid: Pid) -> Result<(), AnyManagerError> {
    let mut more = 1..TRIES;
    loop {
        match manager.add_task(pid) {
            // Somebody else made one of the cgroups above it, as Docker's, since libcgroups looked: it is
            // there now.
            Err(AnyManagerError::V2(V2ManagerError::WrappedIo(WrappedIoError::CreateDir {
                err,
                ..
            }))) if err.kind() == ErrorKind::AlreadyExists && more.next().is_some() => {}
            result => return result,
        }
    }
}

/// Changes the limits of a cgroup that exists.
pub(super) fn limit(name: &Name, id: &str, resources: &LinuxResources) -> Result<(), Error> {
    apply(&name.manager(id)?, resources)
        .map_err(|source| Error::Limit { path: name.path.clone(), source: source.into() })
}

fn apply(manager: &AnyCgroupManager, resources: &LinuxResources) -> Result<(), AnyManagerError> {
    manager.apply(&ControllerOpt {
        resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    })
}

/// Kills what is left in a cgroup, and removes it; no error if there is none.
pub(super) fn remove(name: &Name, id: &str) -> Result<(), Error> {
    name.manager(id)?
        .remove()
        .map_err(|source| Error::Remove { path: name.path.clone(), source: source.into() })
}

/// The folders of the cgroups this process is in, one per hierarchy.
pub(super) fn own_cgroups() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let unified = !Path::new(CGROUP_ROOT).join("unified").exists();
    text.lines().filter_map(|line| cgroup_folder(line, unified)).collect()
}

/// The folder a line of `/proc/self/cgroup` means (cgroups(7)).
fn cgroup_folder(line: &str, unified: bool) -> Option<PathBuf> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let hierarchy = match controllers {
        "" if unified => "",
        "" => "unified",
        named => named.strip_prefix("name=").unwrap_or(named),
    };
    Some(Path::new(CGROUP_ROOT).join(hierarchy).join(path.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    /// A process to put into cgroups, and its pid.
    fn sleeper() -> (Child, Pid) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        (child, pid)
    }

    #[test]
    fn a_cgroup_is_named_after_the_container_if_the_bundle_names_none() {
        assert_eq!(Name::of(None, false, "a").path, Path::new("/coracle-a"));
        assert_eq!(Name::of(None, true, "a").path, Path::new("system.slice:coracle:a"));
    }

    #[test]
    fn a_systemd_name_has_a_plain_path_on_hosts_with_version_1() {
        let plain = plain_path(Path::new("user.slice:libpod:c1"));

        assert_eq!(plain, Path::new("/user.slice/libpod-c1.scope"));
    }

    #[test]
    fn lines_of_both_versions_give_folders() {
        let folder = |line, unified| cgroup_folder(line, unified).unwrap();

        assert_eq!(folder("4:memory:/a", false), Path::new("/sys/fs/cgroup/memory/a"));
        assert_eq!(folder("9:name=systemd:/", false), Path::new("/sys/fs/cgroup/systemd/"));
        assert_eq!(folder("0::/b", true), Path::new("/sys/fs/cgroup/b"));
        assert_eq!(folder("0::/b", false), Path::new("/sys/fs/cgroup/unified/b"));
    }

    #[test]
    #[ignore = "needs root"]
    fn a_cgroup_is_entered_and_leaves_nothing_behind() {
        let name = Name::of(None, false, "unit-test");
        let before = own_cgroups();

        let cgroup = Cgroup::find(name.clone(), "unit-test").unwrap();
        let cgroup = cgroup.enter(&LinuxResources::default()).unwrap().unwrap();
        assert_ne!(own_cgroups(), before);
        cgroup.leave();

        assert_eq!(own_cgroups(), before);
        remove(&name, "unit-test").unwrap();
    }

    #[test]
    fn the_root_of_all_cgroups_is_no_container_s() {
        for path in ["/", "", ".", "/..", "/a/../..", "../.."] {
            assert!(matches!(below_root(Path::new(path)), Err(Error::Root(_))), "{path}");
        }
    }

    #[test]
    fn a_path_stays_below_the_root() {
        let below = |path| below_root(Path::new(path)).unwrap();

        assert_eq!(below("/../../a"), Path::new("/a"));
        assert_eq!(below("/a/./b/../c"), Path::new("/a/c"));
        assert_eq!(below("a/b"), Path::new("a/b"));
        assert_eq!(below("user.slice:libpod:c1"), Path::new("user.slice:libpod:c1"));
    }

    #[test]
    #[ignore = "needs root"]
    fn cgroups_below_one_that_is_missing_are_made_at_once() {
        let parent = Name::of(None, false, "unit-test-parent");
        for _ in 0..20 {
            let managers = ["a", "b", "c", "d"]
                .map(|id| Name::of(Some(&parent.path.join(id)), false, id).manager(id).unwrap());
            let others = managers.each_ref().map(|_| sleeper());
            let start = Barrier::new(managers.len());

            let added: Vec<_> = thread::scope(|scope| {
                let add_at_once = |(manager, (_, pid)): (_, &(Child, Pid))| {
                    let (start, pid) = (&start, *pid);
                    scope.spawn(move || {
                        start.wait();
                        add(manager, pid)
                    })
                };
                let threads: Vec<_> = managers.iter().zip(&others).map(add_at_once).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });

            for (manager, (mut other, _)) in managers.iter().zip(others) {
                other.kill().unwrap();
                other.wait().unwrap();
                manager.remove().unwrap();
            }
            remove(&parent, "parent").unwrap();
            for result in added {
                result.unwrap();
            }
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn limits_of_a_cgroup_in_use_can_be_changed() {
        let name = Name::of(None, false, "unit-test-limit");
        let manager = name.manager("unit-test-limit").unwrap();
        let (mut other, pid) = sleeper();
        manager.add_task(pid).unwrap();
        let resources = serde_json::from_str(r#"{"cpu":{"cpus":"0"}}"#).unwrap();

        limit(&name, "unit-test-limit", &resources).unwrap();

        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");
        remove(&name, "unit-test-limit").unwrap();
        other.wait().unwrap();
    }

    #[test]
    #[ignore = "needs root"]
    fn a_cgroup_that_somebody_is_in_is_not_taken() {
        let name = Name::of(None, false, "unit-test-used");
        let manager = name.manager("unit-test-used").unwrap();
        let (mut other, pid) = sleeper();
        manager.add_task(pid).unwrap();

        let found = Cgroup::find(name.clone(), "unit-test-used").map(drop);

        assert!(matches!(found, Err(Error::InUse { count: 1, .. })), "{found:?}");
        assert!(other.try_wait().unwrap().is_none());
        remove(&name, "unit-test-used").unwrap();
        other.wait().unwrap();
    }
}
