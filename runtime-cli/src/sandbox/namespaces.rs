//! The host namespaces a sandbox process lives in: the container's network; mounts, IPC and host name
//! of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// Why the namespaces cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bundle wants the host's network.
    #[error(
        "linux.namespaces gives the container the host's network, which a virtual machine cannot \
         share: use a bridge network and publish ports, or no network"
    )]
    HostNetwork,
    /// The namespace the bundle names cannot be joined.
    #[error("join network namespace {path}")]
    Join {
        /// The namespace.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A namespace cannot be made.
    #[error("make {0} for the sandbox: this needs root with CAP_SYS_ADMIN")]
    Unshare(&'static str, #[source] io::Error),
    /// The present namespaces cannot be opened.
    #[error("open {0}: is /proc mounted?")]
    Open(&'static str, #[source] io::Error),
}

/// The network namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Netns {
    /// A new one.
    New,
    /// One that the engine made.
    Path(PathBuf),
}

impl Netns {
    /// What the bundle asks for.
    pub(super) fn of(spec: &Spec) -> Result<Self, Error> {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
            .ok_or(Error::HostNetwork)?;
        Ok(match network.path() {
            Some(path) if !path.as_os_str().is_empty() => Self::Path(path.clone()),
            _ => Self::New,
        })
    }

    /// Its path, if the engine made it.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::New => None,
            Self::Path(path) => Some(path),
        }
    }
}

/// The namespaces this process came from: OCI hooks run there.
#[derive(Debug)]
pub(super) struct HostNamespaces {
    mount: OwnedFd,
    network: OwnedFd,
    ipc: OwnedFd,
    uts: OwnedFd,
    /// Entering a mount namespace changes the root to that namespace's own, which for a host in a
    /// chroot is another one.
    root: OwnedFd,
}

impl HostNamespaces {
    /// Enters the sandbox's namespaces and keeps the way back. Mounts made on the host later
    /// still arrive; what is mounted here stays here.
    pub(super) fn leave(network: &Netns) -> Result<Self, Error> {
        let host = Self {
            mount: open("/proc/self/ns/mnt")?,
            network: open("/proc/self/ns/net")?,
            ipc: open("/proc/self/ns/ipc")?,
            uts: open("/proc/self/ns/uts")?,
            root: open("/")?,
        };
        match network {
            Netns::New => unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| Error::Unshare("a network namespace", error.into()))?,
            Netns::Path(path) => host.join(path)?,
        }
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
            .map_err(|error| Error::Unshare("mount, IPC and UTS namespaces", error.into()))?;
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)
            .map_err(|error| Error::Unshare("private mounts", error.into()))?;
        Ok(host)
    }

    /// Joins a network namespace, unless it is the one this process is in: its interfaces are the
    /// host's own, whatever path Docker gives it.
    fn join(&self, path: &Path) -> Result<(), Error> {
        let failed = |source| Error::Join { path: path.into(), source };
        let identity = |fd: BorrowedFd<'_>| {
            let stat = nix::sys::stat::fstat(fd).map_err(|error| failed(error.into()))?;
            Ok((stat.st_dev, stat.st_ino))
        };
        let other = File::open(path).map_err(failed)?;
        if identity(other.as_fd())? == identity(self.network.as_fd())? {
            return Err(Error::HostNetwork);
        }
        setns(&other, CloneFlags::CLONE_NEWNET).map_err(|error| failed(error.into()))
    }

    /// What a forked child calls to go back.
    pub(super) fn entry(
        &self,
    ) -> io::Result<impl FnMut() -> io::Result<()> + Send + Sync + 'static> {
        let mount = self.mount.try_clone()?;
        let network = self.network.try_clone()?;
        let ipc = self.ipc.try_clone()?;
        let uts = self.uts.try_clone()?;
        let root = self.root.try_clone()?;
        Ok(move || {
            setns(&network, CloneFlags::CLONE_NEWNET)?;
            setns(&ipc, CloneFlags::CLONE_NEWIPC)?;
            setns(&uts, CloneFlags::CLONE_NEWUTS)?;
            setns(&mount, CloneFlags::CLONE_NEWNS)?;
            nix::unistd::fchdir(&root)?;
            nix::unistd::chroot(".")?;
            Ok(())
        })
    }
}

fn open(path: &'static str) -> Result<OwnedFd, Error> {
    File::open(path).map(OwnedFd::from).map_err(|source| Error::Open(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &str) -> Spec {
        let text = format!(r#"{{"ociVersion":"1.2.0","linux":{{"namespaces":{namespaces}}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_network_namespace_without_path_is_a_new_one() {
        assert_eq!(Netns::of(&spec(r#"[{"type":"network"}]"#)).unwrap(), Netns::New);
    }

    #[test]
    fn an_empty_path_of_the_network_namespace_is_none() {
        assert_eq!(Netns::of(&spec(r#"[{"type":"network","path":""}]"#)).unwrap(), Netns::New);
    }

    #[test]
    fn a_network_namespace_with_path_is_joined() {
        let network = Netns::of(&spec(r#"[{"type":"network","path":"/run/netns/a"}]"#)).unwrap();

        assert_eq!(network.path(), Some(Path::new("/run/netns/a")));
    }

    #[test]
    fn the_network_of_the_host_by_another_name_is_refused() {
        let own = Netns::Path("/proc/self/ns/net".into());

        assert!(matches!(HostNamespaces::leave(&own), Err(Error::HostNetwork)));
    }

    #[test]
    fn the_network_of_the_host_is_refused() {
        assert!(matches!(Netns::of(&spec(r#"[{"type":"pid"}]"#)), Err(Error::HostNetwork)));
    }
}
