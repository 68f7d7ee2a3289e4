//! From the OCI configuration to what the agent is told: names become the kernel's numbers and
//! everything that a virtual machine cannot honour is refused, on the host.
//!
//! Some parts of a configuration are accepted and have no effect in the guest, because they
//! protect or divide the host, from which the machine border separates the container already:
//! AppArmor profiles and SELinux labels (policies of the host's kernel), `intelRdt`, and the parts
//! of `linux.resources` that [`cgroup_files`] names. The network namespace is the host's side of
//! the container's network cards and no business of the agent.

mod capabilities;
mod cgroup;
mod devices;
mod mounts;
mod namespaces;
mod process;
mod seccomp;

use std::error::Error as StdError;
use std::path::{Path, PathBuf};

use agent_protocol::{Cgroup, Container, Hook};
use oci_spec::runtime as oci;

use crate::bundle::Bundle;
use crate::state::ContainerId;

pub use capabilities::{NAMES as CAPABILITIES, mask_of as capability_mask};
pub use cgroup::{Error as CgroupError, cgroup_files, is_host_file};
pub use devices::allow_all as allow_all_devices;
pub use mounts::OPTIONS as MOUNT_OPTIONS;
pub use process::{Error as ProcessError, process};
pub use seccomp::Error as SeccompError;

/// A bind mount whose source has to be made reachable in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind<'a> {
    /// Absolute path on the host: a folder, a file, a socket or a device node.
    pub source: &'a Path,
    /// Absolute path inside the container, for messages.
    pub destination: &'a Path,
    /// Whether mounts below the source are part of it (`rbind`).
    pub recursive: bool,
    /// Whether the container may not write to it.
    pub read_only: bool,
    /// Whether what the host mounts below the source later stays away (`rprivate`).
    pub private: bool,
}

/// Makes the source of a bind mount reachable in the guest and returns its guest path, which is
/// below [`agent_protocol::SHARE_PATH`].
pub type ShareBind<'a> =
    dyn FnMut(&Bind<'_>) -> Result<String, Box<dyn StdError + Send + Sync>> + 'a;

/// Which part of a configuration cannot be turned into a container of a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A property that only makes sense without a machine border.
    #[error("{property} cannot be honoured in a virtual machine: {remedy}")]
    Unsupported {
        /// Where it is in `config.json`.
        property: String,
        /// What to do instead.
        remedy: &'static str,
    },
    /// A property with a value outside of the specification.
    #[error("{property} is {value:?}: {rule}")]
    Invalid {
        /// Where it is in `config.json`.
        property: String,
        /// Its value.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// A namespace is listed twice.
    #[error("malformed spec file: duplicated ns {0}")]
    DuplicateNamespace(oci::LinuxNamespaceType),
    /// The source of a bind mount cannot be given to the guest.
    #[error("mount {source_path} to {destination}")]
    Share {
        /// On the host.
        source_path: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The process of the container.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The limits of the container.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// What the agent is told about the container `id` of `bundle`, whose root file system the guest
/// sees at `rootfs`. `state` is the OCI state as JSON, which hooks inside the container read.
pub fn container(
    id: &ContainerId,
    bundle: &Bundle,
    rootfs: String,
    state: String,
    share: &mut ShareBind<'_>,
) -> Result<Container, Error> {
    let spec = &bundle.spec;
    let defaults = oci::Linux::default();
    // Without a `linux` section nothing is masked, limited or separated.
    let none = empty_linux(defaults);
    let linux = spec.linux().as_ref().unwrap_or(&none);
    refuse_unsupported(linux)?;
    let process = spec.process().as_ref().ok_or(ProcessError::Missing)?;
    let resources = linux.resources().as_ref();

    Ok(Container {
        id: id.to_string(),
        rootfs,
        rootfs_readonly: spec.root().as_ref().and_then(oci::Root::readonly).unwrap_or(false),
        rootfs_propagation: mounts::rootfs_propagation(linux.rootfs_propagation().as_deref())?,
        hostname: spec.hostname().clone(),
        domainname: spec.domainname().clone(),
        namespaces: namespaces::to_create(linux)?,
        mounts: mounts::translate(
            spec.mounts().as_deref().unwrap_or_default(),
            &bundle.path,
            share,
        )?,
        devices: devices::translate(linux.devices().as_deref().unwrap_or_default(), resources)?,
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        sysctl: sorted(linux.sysctl().iter().flatten()),
        cgroup: Cgroup { files: resources.map(cgroup_files).transpose()?.unwrap_or_default() },
        start_hooks: start_hooks(spec.hooks().as_ref(), process)?,
        state,
        process: self::process(process, linux.seccomp().as_ref())?,
    })
}

fn empty_linux(mut linux: oci::Linux) -> oci::Linux {
    linux.set_resources(None).set_namespaces(None).set_masked_paths(None).set_readonly_paths(None);
    linux
}

/// Refuses what the agent's protocol has no word for, instead of running without it.
fn refuse_unsupported(linux: &oci::Linux) -> Result<(), Error> {
    let mapped = |mappings: &Option<Vec<oci::LinuxIdMapping>>| {
        let is_identity =
            |mapping: &oci::LinuxIdMapping| mapping.host_id() == mapping.container_id();
        mappings.iter().flatten().any(|mapping| !is_identity(mapping))
    };
    let is_linux32 = |personality: &oci::LinuxPersonality| {
        personality.domain() == oci::LinuxPersonalityDomain::PerLinux32
    };
    let checks = [
        (
            mapped(linux.uid_mappings()) || mapped(linux.gid_mappings()),
            "linux.uidMappings",
            "root of the guest is not root of the host already; run without user remapping \
             (Docker: --userns=host)",
        ),
        (
            linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()),
            "linux.timeOffsets",
            "remove it, time namespaces are not supported",
        ),
        (
            linux.personality().as_ref().is_some_and(is_linux32),
            "linux.personality",
            "remove it or use the domain LINUX",
        ),
        (
            linux.memory_policy().is_some(),
            "linux.memoryPolicy",
            "remove it, the guest has one memory node",
        ),
        (
            linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()),
            "linux.netDevices",
            "move the device into the container's network namespace instead",
        ),
    ];
    match checks.into_iter().find(|(present, ..)| *present) {
        Some((_, property, remedy)) => {
            Err(Error::Unsupported { property: property.into(), remedy })
        }
        None => Ok(()),
    }
}

fn start_hooks(hooks: Option<&oci::Hooks>, process: &oci::Process) -> Result<Vec<Hook>, Error> {
    let hooks = hooks.and_then(|hooks| hooks.start_container().as_deref()).unwrap_or_default();
    hooks.iter().map(|hook| start_hook(hook, process)).collect()
}

/// A hook inside the container; without an environment it has that of the container's process, as
/// in runc.
fn start_hook(hook: &oci::Hook, process: &oci::Process) -> Result<Hook, Error> {
    let timeout_s = hook
        .timeout()
        .map(|timeout| {
            u32::try_from(timeout).ok().filter(|timeout| *timeout > 0).ok_or_else(|| {
                Error::Invalid {
                    property: "hooks.startContainer.timeout".into(),
                    value: timeout.to_string(),
                    rule: "it must be a number of seconds greater than zero",
                }
            })
        })
        .transpose()?;
    Ok(Hook {
        path: text(hook.path(), "hooks.startContainer.path")?,
        args: hook.args().clone().unwrap_or_default(),
        env: hook.env().as_ref().or(process.env().as_ref()).cloned().unwrap_or_default(),
        timeout_s,
    })
}

/// Pairs of a map in the order of their keys, so that equal bundles give equal messages.
fn sorted<'a>(pairs: impl Iterator<Item = (&'a String, &'a String)>) -> Vec<(String, String)> {
    let mut pairs: Vec<_> = pairs.map(|(key, value)| (key.clone(), value.clone())).collect();
    pairs.sort();
    pairs
}

/// A path as the text that the protocol carries. JSON is UTF-8, so this holds for every path of a
/// configuration; one that was joined with the bundle's own path may break it.
fn text(path: &Path, property: &str) -> Result<String, Error> {
    path.to_str().map(String::from).ok_or_else(|| Error::Invalid {
        property: property.into(),
        value: path.to_string_lossy().into_owned(),
        rule: "it must be valid UTF-8",
    })
}

#[cfg(test)]
mod tests;
