//! Fetches the kernel's source: a package that Debian offers beside the release, not in it.

use crate::cache::{self, Cache};
use crate::debian::{self, Apt, Package};
use crate::manifest::sha256_of_file;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The long-term kernel that the configuration was written for.
const PACKAGE: &str = "linux-source-6.12";

/// The version that was tried and measured.
const PINNED: &str = "6.12.95-1~bpo12+1";

/// Where Debian 12 has it.
const SUITE: &str = "bookworm-backports";

const FILE: &str = "source.deb";
const VERSION: &str = "version";
const SHA256: &str = "sha256";

/// Why there is no kernel source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The package cannot be had.
    #[error(transparent)]
    Package(#[from] debian::Error),
    /// The suite has no version of it at all.
    #[error("{SUITE} has no {PACKAGE}: is the mirror complete?")]
    NoVersion,
    /// A file cannot be read or written.
    #[error("access {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// The source package, fetched.
#[derive(Debug)]
pub struct Source {
    /// Its name and version.
    pub package: Package,
    /// The package file.
    pub file: PathBuf,
    /// SHA-256 of the package file.
    pub sha256: String,
}

impl Source {
    /// The pinned version or, once the archive has dropped that, the newest; from the cache if there.
    pub fn obtain(cache: &Cache) -> Result<Self, Error> {
        let folder = cache.entry("source", &format!("{PACKAGE}_{PINNED}"), fill)?;
        let read = |name| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|source| Error::File { path, source })
        };
        let package = Package { name: PACKAGE.to_owned(), version: read(VERSION)? };
        Ok(Self { package, sha256: read(SHA256)?, file: folder.join(FILE) })
    }

    /// The archive of the source itself within the unpacked package.
    pub fn tarball(unpacked: &Path) -> PathBuf {
        unpacked.join(format!("usr/src/{PACKAGE}.tar.xz"))
    }
}

fn fill(folder: &Path) -> Result<(), Error> {
    let failed = |source| Error::File { path: folder.to_owned(), source };
    let scratch = folder.join("apt");
    let download = scratch.join("download");
    fs::create_dir_all(&download).map_err(failed)?;
    eprintln!("kernel: looking for {PACKAGE} in {SUITE}");
    let apt = Apt::with_suite(SUITE, &scratch)?;
    let version = choose(apt.versions(PACKAGE)?).ok_or(Error::NoVersion)?;
    if version != PINNED {
        eprintln!("kernel: version {PINNED} is gone from {SUITE}, using {version}");
    }
    let package = Package { name: PACKAGE.to_owned(), version };
    eprintln!("kernel: fetching {} {}, about 150 MB", package.name, package.version);
    let deb = apt.download(&package, &download)?;
    // Kept, as reading 150 MB would be most of what a build from the cache takes.
    fs::write(folder.join(SHA256), sha256_of_file(&deb).map_err(failed)?).map_err(failed)?;
    fs::rename(&deb, folder.join(FILE)).map_err(failed)?;
    fs::write(folder.join(VERSION), &package.version).map_err(failed)?;
    fs::remove_dir_all(&scratch).map_err(failed)
}

/// The pinned one of `versions`, else the first, which is the newest.
fn choose(versions: Vec<String>) -> Option<String> {
    if versions.iter().any(|version| version == PINNED) {
        return Some(PINNED.to_owned());
    }
    versions.into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_version_wins_over_a_newer_one() {
        assert_eq!(choose(vec!["6.12.999-1".to_owned(), PINNED.to_owned()]).unwrap(), PINNED);
    }

    #[test]
    fn without_the_pinned_version_the_newest_is_taken() {
        let versions = vec!["6.12.999-1".to_owned(), "6.12.998-1".to_owned()];

        assert_eq!(choose(versions).unwrap(), "6.12.999-1");
    }
}
