//! Who Coracle is compared with, and where their programs are.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use arch::peer::QEMU;

/// What a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An OCI runtime whose containers share the host's kernel.
    Runc,
    /// Another one.
    Crun,
    /// Containers in virtual machines; started by an engine only.
    Kata,
    /// QEMU's machine that is closest to ours, as [`QEMU`] says.
    Qemu,
    /// A VMM.
    Firecracker,
    /// A VMM.
    CloudHypervisor,
}

/// All peers: name, program if none is given, kind.
const KINDS: [(&str, &str, Kind); 6] = [
    ("runc", "runc", Kind::Runc),
    ("crun", "crun", Kind::Crun),
    ("kata", "containerd-shim-kata-v2", Kind::Kata),
    (QEMU.name, QEMU.program, Kind::Qemu),
    ("firecracker", "firecracker", Kind::Firecracker),
    ("cloud-hypervisor", "cloud-hypervisor", Kind::CloudHypervisor),
];

/// Those that measurements stand beside if nobody names others.
const USUAL: [&str; 2] = ["runc", QEMU.name];

/// One peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What it is.
    pub kind: Kind,
    /// Its program, as a path or as a name to be found in PATH.
    pub program: PathBuf,
}

/// A name that is none of a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such peer: {0} (known are {names})", names = KINDS.map(|(name, ..)| name).join(", "))]
pub struct Unknown(String);

impl FromStr for Peer {
    type Err = Unknown;

    /// `NAME` or `NAME=PROGRAM`.
    fn from_str(text: &str) -> Result<Self, Unknown> {
        let (name, program) = text.split_once('=').map_or((text, None), |(n, p)| (n, Some(p)));
        let known = KINDS.iter().find(|(known, ..)| *known == name);
        let (_, usual, kind) = known.ok_or_else(|| Unknown(name.to_owned()))?;
        Ok(Peer { kind: *kind, program: program.unwrap_or(usual).into() })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = KINDS.iter().find(|(.., kind)| *kind == self.kind).map_or("", |known| known.0);
        f.write_str(name)
    }
}

impl Peer {
    /// Those to stand beside if nobody names others, as far as they are installed.
    pub fn usual() -> Vec<Peer> {
        let peers = USUAL.iter().filter_map(|name| name.parse::<Peer>().ok());
        peers.filter(Peer::is_there).collect()
    }

    /// Whether its program can be found.
    pub fn is_there(&self) -> bool {
        if self.program.components().count() > 1 {
            return self.program.exists();
        }
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path).any(|folder: PathBuf| folder.join(&self.program).exists())
    }

    /// Whether it is a command line as runc has it.
    pub fn is_runtime(&self) -> bool {
        matches!(self.kind, Kind::Runc | Kind::Crun)
    }

    /// Whether it boots a kernel that it is given.
    pub fn is_vmm(&self) -> bool {
        matches!(self.kind, Kind::Qemu | Kind::Firecracker | Kind::CloudHypervisor)
    }

    /// Its name for Docker.
    pub fn docker_runtime(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Runc => Some("runc"),
            Kind::Crun => Some("crun"),
            Kind::Kata => Some("io.containerd.kata.v2"),
            _ => None,
        }
    }

    /// Its program.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_a_usual_program_and_may_have_another() {
        let usual: Peer = "runc".parse().unwrap();
        let other: Peer = "firecracker=/opt/fc".parse().unwrap();

        assert_eq!(usual, Peer { kind: Kind::Runc, program: "runc".into() });
        assert_eq!(other, Peer { kind: Kind::Firecracker, program: "/opt/fc".into() });
        assert_eq!(other.to_string(), "firecracker");
    }

    #[test]
    fn an_unknown_peer_is_told_the_known_ones() {
        let error = "lxc".parse::<Peer>().unwrap_err().to_string();

        assert!(error.contains("lxc") && error.contains("cloud-hypervisor"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_not_found() {
        let peer: Peer = "crun=/nonexistent/crun".parse().unwrap();

        assert!(!peer.is_there());
    }
}
