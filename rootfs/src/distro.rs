//! The quick way to a kernel: Debian's own for virtual machines, unpacked once on the host.

use crate::cache::{self, Cache};
use crate::debian::{self, Apt, Package};
use crate::kernel::{self, Kernel};
use crate::manifest::{Kind, Provenance, sha256_of_file};
use crate::modules::{self, ModuleTree};
use crate::program::{self, command, output, require};
use crate::target::Target;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Part of each entry's name: raised when an entry is made in another way than before.
const RECIPE: u32 = 4;

/// Why there is no distribution kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is missing or fails.
    #[error(transparent)]
    Program(#[from] program::Error),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The package cannot be had.
    #[error("get the kernel package")]
    Package(#[from] debian::Error),
    /// The package's kernel is of no use.
    #[error("extract the kernel from {path}")]
    Extract {
        /// The packed kernel.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: crate::bzimage::Error,
    },
    /// The package's modules are of no use.
    #[error("choose the guest's modules")]
    Modules(#[from] modules::Error),
    /// A file cannot be read, written or removed.
    #[error("access {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The package has another layout than expected.
    #[error("package {package} has no /boot/vmlinuz-* and /lib/modules")]
    Layout {
        /// The package.
        package: String,
    },
    /// The finished kernel cannot be kept.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
}

/// The newest kernel of the machine's own Debian release, from the cache or from its package.
pub fn obtain(cache: &Cache, target: &Target) -> Result<Kernel, Error> {
    require(&["apt-cache", "apt-get", "depmod", "dpkg"])?;
    let apt = if target.is_foreign() {
        Apt::of_another_architecture(
            target.debian,
            &cache.scratch(&format!("apt-{}", target.debian))?,
        )?
    } else {
        Apt::of_this_machine()
    };
    let package = apt.dependency(target.distro_package)?;
    let entry = format!("{}_{}_{RECIPE}", package.name, package.version);
    let folder = cache.entry("distro", &entry, |folder| fill(folder, &apt, &package, target))?;
    Ok(Kernel::load(folder)?)
}

fn fill(folder: &Path, apt: &Apt, package: &Package, target: &Target) -> Result<(), Error> {
    eprintln!("kernel: fetching {} {}", package.name, package.version);
    let scratch = folder.join("scratch");
    let download = scratch.join("download");
    let unpacked = scratch.join("unpacked");
    fs::create_dir_all(&download).map_err(|source| file_error(&download, source))?;
    let deb = apt.download(package, &download)?;
    let package_sha256 = sha256_of_file(&deb).map_err(|source| file_error(&deb, source))?;

    eprintln!("kernel: unpacking");
    debian::unpack(&deb, &unpacked)?;
    let (root, release) = layout(&unpacked, package)?;
    output(command("depmod").arg("-b").arg(&root).arg(&release))?;
    keep_needed_modules(&root, &release, folder)?;
    let packed = unpacked.join(format!("boot/vmlinuz-{release}"));
    let image = fs::read(&packed).map_err(|source| file_error(&packed, source))?;
    let image =
        (target.unwrap)(&image).map_err(|source| Error::Extract { path: packed, source })?;
    fs::remove_dir_all(&scratch).map_err(|source| file_error(&scratch, source))?;

    let provenance = Provenance {
        kind: Kind::Distro,
        architecture: target.name.to_owned(),
        release,
        package: package.name.clone(),
        version: package.version.clone(),
        package_sha256,
        build: None,
    };
    Ok(Kernel::store(folder, &image, &provenance)?)
}

/// The folder above `lib/modules`, which newer packages have in `usr`, and the kernel's release.
fn layout(unpacked: &Path, package: &Package) -> Result<(PathBuf, String), Error> {
    let missing = || Error::Layout { package: package.name.clone() };
    let boot = fs::read_dir(unpacked.join("boot")).map_err(|_| missing())?;
    let release = boot
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
        .ok_or_else(missing)?;
    let roots = [unpacked.to_owned(), unpacked.join("usr")];
    let root = roots.into_iter().find(|root| root.join("lib/modules").join(&release).is_dir());
    Ok((root.ok_or_else(missing)?, release))
}

/// Copies what a guest needs of the modules below `from`, with the indices, to the same places
/// below `to`: 1 MiB in place of 90.
fn keep_needed_modules(from: &Path, release: &str, to: &Path) -> Result<(), Error> {
    let tree = ModuleTree::open(from, Some(release))?;
    let indices = ["modules.dep", "modules.builtin"];
    let indices = indices.map(|name| from.join("lib/modules").join(release).join(name));
    for path in tree.needed_files()?.into_iter().chain(indices) {
        let inside = path.strip_prefix(from).expect("the tree was opened below it");
        let copy = to.join(inside);
        let folder = copy.parent().expect("it lies below lib/modules");
        fs::create_dir_all(folder).map_err(|source| file_error(folder, source))?;
        fs::copy(&path, &copy).map_err(|source| file_error(&path, source))?;
    }
    Ok(())
}

fn file_error(path: &Path, source: io::Error) -> Error {
    Error::File { path: path.to_owned(), source }
}
