//! A kernel ready for a guest: a folder of the cache with the image, its modules and its provenance.

use crate::elf;
use crate::manifest::Provenance;
use object::elf::ELFMAG;
use std::path::{Path, PathBuf};
use std::{fs, io};

const IMAGE: &str = "kernel";
const MODULES: &str = "lib/modules";
const PROVENANCE: &str = "provenance.json";

/// Why a kernel's folder cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("access {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The provenance is not what this version writes.
    #[error("parse {path}: remove its folder from the cache to make it anew")]
    Provenance {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The image begins as an ELF file and is none.
    #[error("look at {path}: remove its folder from the cache to make it anew")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: elf::Malformed,
    },
}

/// A finished kernel.
#[derive(Debug)]
pub struct Kernel {
    folder: PathBuf,
    provenance: Provenance,
}

impl Kernel {
    /// The kernel in `folder`, as [`Kernel::store`] has left it.
    pub fn load(folder: PathBuf) -> Result<Self, Error> {
        let path = folder.join(PROVENANCE);
        let text = fs::read(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        let provenance =
            serde_json::from_slice(&text).map_err(|source| Error::Provenance { path, source })?;
        Ok(Self { folder, provenance })
    }

    /// Makes `folder` a kernel's folder; its modules, if any, are put there by the caller.
    pub fn store(folder: &Path, image: &[u8], provenance: &Provenance) -> Result<(), Error> {
        let write = |name: &str, contents: &[u8]| {
            let path = folder.join(name);
            fs::write(&path, contents).map_err(|source| Error::File { path, source })
        };
        write(IMAGE, image)?;
        let json = serde_json::to_vec_pretty(provenance).expect("plain strings and numbers");
        write(PROVENANCE, &json)
    }

    /// What the VMM boots, of which no more is loaded than has to be.
    pub fn image(&self) -> Result<Vec<u8>, Error> {
        let path = self.folder.join(IMAGE);
        let mut image =
            fs::read(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        if image.starts_with(&ELFMAG) {
            elf::leave_filler_out(&mut image).map_err(|source| Error::Image { path, source })?;
        }
        Ok(image)
    }

    /// The folder above `lib/modules`, for a kernel that has modules.
    pub fn module_root(&self) -> Option<&Path> {
        self.folder.join(MODULES).is_dir().then_some(&self.folder)
    }

    /// Where it comes from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Kind;
    use object::elf::PT_LOAD;

    fn stored(image: &[u8]) -> (tempfile::TempDir, Kernel) {
        let folder = tempfile::tempdir().unwrap();
        let provenance = Provenance {
            kind: Kind::Distro,
            architecture: "x86_64".to_owned(),
            release: "6.1.0".to_owned(),
            package: "linux-image".to_owned(),
            version: "6.1.1-1".to_owned(),
            package_sha256: String::new(),
            build: None,
        };
        Kernel::store(folder.path(), image, &provenance).unwrap();
        let kernel = Kernel::load(folder.path().to_owned()).unwrap();
        (folder, kernel)
    }

    #[test]
    fn an_elf_image_is_as_it_was_stored_but_for_what_need_not_be_loaded() {
        let with_zeros = elf::testing::kernel(&[(PT_LOAD, b"data\0\0")]);
        let (_folder, kernel) = stored(&with_zeros);

        let image = kernel.image().unwrap();

        let mut without = with_zeros.clone();
        elf::leave_filler_out(&mut without).unwrap();
        assert_ne!(image, with_zeros);
        assert_eq!(image, without);
    }

    #[test]
    fn an_image_of_another_kind_is_as_it_was_stored() {
        let (_folder, kernel) = stored(b"an Image");

        assert_eq!(kernel.image().unwrap(), b"an Image");
    }

    #[test]
    fn half_an_elf_image_is_refused() {
        let whole = elf::testing::kernel(&[(PT_LOAD, b"data")]);
        let (_folder, kernel) = stored(&whole[..whole.len() - 1]);

        assert!(matches!(kernel.image(), Err(Error::Image { .. })));
    }
}
