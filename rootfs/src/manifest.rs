//! Says what an image was made of and what came out, so that it can be made and checked again.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::path::Path;

/// Which of the two ways a kernel came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// From a kernel package of the distribution; its drivers are modules in the initrd.
    Distro,
    /// Built here from the distribution's source package with our configuration.
    Tuned,
}

/// Where a kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// Which way it came.
    pub kind: Kind,
    /// The architecture it runs on.
    pub architecture: String,
    /// What `uname -r` prints in the guest.
    pub release: String,
    /// Debian package: the kernel's, or that of its source.
    pub package: String,
    /// Version of that package.
    pub version: String,
    /// SHA-256 of the package file.
    pub package_sha256: String,
    /// What else went into a kernel that was built here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build: Option<BuildInputs>,
}

/// The inputs of a kernel build beside the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildInputs {
    /// SHA-256 of the configuration fragment without comments.
    pub config_sha256: String,
    /// First line of what the compiler says about itself.
    pub compiler: String,
    /// First line of what the linker says about itself.
    pub linker: String,
    /// Version of the build's own steps.
    pub recipe: u32,
}

/// The file `manifest.json` beside a kernel and an initrd.
#[derive(Debug, Serialize)]
pub struct Manifest {
    /// Version of `coracle-image`.
    pub coracle: &'static str,
    /// Where the kernel comes from.
    pub kernel: Provenance,
    /// SHA-256 of the agent.
    pub agent_sha256: String,
    /// SHA-256 of the finished `kernel`.
    pub kernel_sha256: String,
    /// SHA-256 of the finished `initrd`.
    pub initrd_sha256: String,
    /// SHA-256 of the finished `rootfs.erofs`, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rootfs_sha256: Option<String>,
}

/// SHA-256 of `bytes` in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// SHA-256 of a file in hexadecimal.
pub fn sha256_of_file(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut Writer(&mut hasher))?;
    Ok(hexadecimal(&hasher.finalize()))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Writer<'a>(&'a mut Sha256);

impl io::Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-2, appendix B.1.
    const SHA256_OF_ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn bytes_and_files_have_the_same_sum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        std::fs::write(&path, "abc").unwrap();

        assert_eq!(sha256(b"abc"), SHA256_OF_ABC);
        assert_eq!(sha256_of_file(&path).unwrap(), SHA256_OF_ABC);
    }

    #[test]
    fn provenance_survives_json() {
        let provenance = Provenance {
            kind: Kind::Distro,
            architecture: "x86_64".to_owned(),
            release: "6.1.0-1-cloud-amd64".to_owned(),
            package: "linux-image-6.1.0-1-cloud-amd64".to_owned(),
            version: "6.1.1-1".to_owned(),
            package_sha256: SHA256_OF_ABC.to_owned(),
            build: None,
        };

        let text = serde_json::to_string(&provenance).unwrap();

        assert_eq!(serde_json::from_str::<Provenance>(&text).unwrap(), provenance);
    }
}
