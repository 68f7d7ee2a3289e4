//! Finds the kernel modules that a guest needs and the order in which they can be loaded.

use crate::compression;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What a guest with a distribution's kernel needs before the agent can serve a container, in the
/// order in which it is needed. Those that the kernel has built in are skipped.
pub const NEEDED: &[&str] = &[
    "virtio_mmio",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "overlay",
    "virtio_net",
    "virtio_blk",
    "ext4",
];

/// What lets a guest's memory grow and go back to the host, and files of the host be memory. A guest runs
/// without, and kernels of some architectures have not all of them.
const FOR_MEMORY: &[&str] = &["virtio_balloon", "virtio_mem", "virtio_pmem", "nd_pmem"];

/// Why the modules of a kernel could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such kernel below the given folder.
    #[error("no modules of kernel {release} in {folder}: expected lib/modules/{release} there")]
    NoRelease {
        /// Where it was looked for.
        folder: PathBuf,
        /// The wanted kernel.
        release: String,
    },
    /// The package is unpacked but not indexed.
    #[error("no {path}: run `depmod -b {root} {release}`")]
    NotIndexed {
        /// The missing index.
        path: PathBuf,
        /// What was unpacked.
        root: PathBuf,
        /// The kernel.
        release: String,
    },
    /// There are no or several kernels to choose from.
    #[error("{folder} holds {count} kernels: name one with --kernel-release")]
    Ambiguous {
        /// Where they were looked for.
        folder: PathBuf,
        /// How many are there.
        count: usize,
    },
    /// A file of the module tree cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// `modules.dep` lacks it, and so does `modules.builtin`.
    #[error("kernel has no module {name}: it cannot run as a guest, choose another kernel package")]
    Missing {
        /// The module's name.
        name: String,
    },
    /// A module file does not unpack.
    #[error("unpack {path}")]
    Decompress {
        /// The module file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: compression::Error,
    },
}

/// A module as the agent gets it.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// File name within the image, such as `virtio_net.ko`.
    pub file_name: String,
    /// The ELF file, unpacked.
    pub contents: Vec<u8>,
}

/// The folder `lib/modules/RELEASE` of an unpacked kernel package.
#[derive(Debug)]
pub struct ModuleTree {
    folder: PathBuf,
    index: Index,
}

impl ModuleTree {
    /// Reads the indices of the kernel `release`, or of the only kernel there is, below `root`.
    pub fn open(root: &Path, release: Option<&str>) -> Result<Self, Error> {
        let all = root.join("lib/modules");
        let release = match release {
            Some(release) => release.to_owned(),
            None => only_entry(&all)?,
        };
        let folder = all.join(&release);
        if !folder.is_dir() {
            return Err(Error::NoRelease { folder: root.to_owned(), release });
        }
        let dependencies = folder.join("modules.dep");
        if !dependencies.exists() {
            return Err(Error::NotIndexed { path: dependencies, root: root.to_owned(), release });
        }
        let builtin = read_text(&folder.join("modules.builtin"))?;
        let index = Index::parse(&read_text(&dependencies)?, &builtin);
        Ok(Self { folder, index })
    }

    /// Files of the needed modules and of all that those depend on, in load order.
    pub fn needed_files(&self) -> Result<Vec<PathBuf>, Error> {
        let for_memory = FOR_MEMORY.iter().filter(|name| self.index.has(name));
        let wanted: Vec<_> = NEEDED.iter().chain(for_memory).copied().collect();
        let order = self.index.load_order(&wanted)?;
        Ok(order.iter().map(|path| self.folder.join(path)).collect())
    }

    /// The needed modules, unpacked, in load order.
    pub fn needed(&self) -> Result<Vec<Module>, Error> {
        self.needed_files()?.iter().map(|path| load(path)).collect()
    }
}

/// What `depmod` and the kernel build say about a kernel's modules.
#[derive(Debug)]
struct Index {
    /// Name of a module to its file and the files that must be loaded first, the last one first.
    loadable: BTreeMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
}

impl Index {
    /// Parses `modules.dep` (`file: dependency dependency …`) and `modules.builtin` (a file a line).
    fn parse(dependencies: &str, builtin: &str) -> Self {
        let loadable = dependencies.lines().filter_map(|line| line.split_once(':'));
        let loadable = loadable.map(|(file, before)| {
            let before = before.split_whitespace().map(str::to_owned).collect();
            (module_name(file), (file.to_owned(), before))
        });
        Self { loadable: loadable.collect(), builtin: builtin.lines().map(module_name).collect() }
    }

    /// Whether the kernel can do what the module `name` is for.
    fn has(&self, name: &str) -> bool {
        self.loadable.contains_key(name) || self.builtin.contains(name)
    }

    /// Files of the modules `wanted` and of their dependencies, each once, dependencies first.
    fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>, Error> {
        let mut order: Vec<String> = Vec::new();
        for name in wanted {
            let Some((file, before)) = self.loadable.get(*name) else {
                if self.builtin.contains(*name) {
                    continue;
                }
                return Err(Error::Missing { name: (*name).to_owned() });
            };
            for path in before.iter().rev().chain([file]) {
                if !order.contains(path) {
                    order.push(path.clone());
                }
            }
        }
        Ok(order)
    }
}

/// `virtio_rng` for `kernel/drivers/char/hw_random/virtio-rng.ko.xz`: the kernel equates `-` and `_`.
fn module_name(path: &str) -> String {
    base_name(path).replace('-', "_")
}

fn base_name(path: &str) -> &str {
    let file_name = path.rsplit('/').next().unwrap_or(path);
    file_name.split(".ko").next().unwrap_or(file_name)
}

fn load(path: &Path) -> Result<Module, Error> {
    let packed = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let contents = compression::decompress(&packed)
        .map_err(|source| Error::Decompress { path: path.to_owned(), source })?;
    let file_name = format!("{}.ko", base_name(&path.to_string_lossy()));
    Ok(Module { file_name, contents })
}

fn read_text(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

fn only_entry(folder: &Path) -> Result<String, Error> {
    let failed = |source| Error::Read { path: folder.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    match <[String; 1]>::try_from(names) {
        Ok([name]) => Ok(name),
        Err(names) => Err(Error::Ambiguous { folder: folder.to_owned(), count: names.len() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/net/core/failover.ko:
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko
kernel/drivers/char/hw_random/virtio-rng.ko.xz:
";
    const BUILTIN: &str = "kernel/fs/ext4/ext4.ko\n";

    fn order(wanted: &[&str]) -> Vec<String> {
        Index::parse(DEPENDENCIES, BUILTIN).load_order(wanted).unwrap()
    }

    #[test]
    fn dependencies_come_first() {
        assert_eq!(
            order(&["virtio_net"]),
            [
                "kernel/net/core/failover.ko",
                "kernel/drivers/net/net_failover.ko",
                "kernel/drivers/net/virtio_net.ko"
            ]
        );
    }

    #[test]
    fn a_module_is_loaded_once() {
        assert_eq!(
            order(&["net_failover", "virtio_net", "failover"]),
            [
                "kernel/net/core/failover.ko",
                "kernel/drivers/net/net_failover.ko",
                "kernel/drivers/net/virtio_net.ko"
            ]
        );
    }

    #[test]
    fn dashes_and_packing_do_not_hide_a_module() {
        assert_eq!(order(&["virtio_rng"]), ["kernel/drivers/char/hw_random/virtio-rng.ko.xz"]);
    }

    #[test]
    fn what_is_built_in_needs_no_loading() {
        assert!(order(&["ext4"]).is_empty());
    }

    #[test]
    fn a_module_that_is_nowhere_is_an_error() {
        let index = Index::parse(DEPENDENCIES, BUILTIN);

        assert!(matches!(index.load_order(&["virtiofs"]), Err(Error::Missing { .. })));
    }

    /// A kernel with the needed modules and these `others`, and what of it a guest gets.
    fn needed_of_kernel_with(others: &[&str]) -> Vec<PathBuf> {
        let folder = tempfile::tempdir().unwrap();
        let release = folder.path().join("lib/modules/6.1");
        fs::create_dir_all(&release).unwrap();
        let line = |name: &&str| format!("{name}.ko:\n");
        let dependencies: String = NEEDED.iter().chain(others).map(line).collect();
        fs::write(release.join("modules.dep"), dependencies).unwrap();
        fs::write(release.join("modules.builtin"), "").unwrap();
        ModuleTree::open(folder.path(), None).unwrap().needed_files().unwrap()
    }

    #[test]
    fn memory_has_its_modules_where_the_kernel_has_them() {
        let names = |files: Vec<PathBuf>| -> Vec<_> {
            let names = files.iter().map(|file| base_name(&file.to_string_lossy()).to_owned());
            names.skip(NEEDED.len()).collect()
        };

        assert_eq!(names(needed_of_kernel_with(FOR_MEMORY)), FOR_MEMORY);
        assert_eq!(names(needed_of_kernel_with(&["virtio_balloon"])), ["virtio_balloon"]);
        assert!(names(needed_of_kernel_with(&[])).is_empty());
    }

    #[test]
    fn a_packed_module_is_unpacked_and_renamed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("virtio-rng.ko.zst");
        fs::write(&path, compression::compress_zstd(b"\x7fELF module").unwrap()).unwrap();

        let module = load(&path).unwrap();

        assert_eq!(module.file_name, "virtio-rng.ko");
        assert_eq!(module.contents, b"\x7fELF module");
    }

    #[test]
    fn modules_without_an_index_name_the_command_that_makes_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("lib/modules/6.1.0-1-cloud-amd64")).unwrap();

        let error = ModuleTree::open(folder.path(), None).unwrap_err();

        assert!(error.to_string().contains("run `depmod -b"), "{error}");
    }

    #[test]
    fn a_missing_release_names_the_folder() {
        let folder = tempfile::tempdir().unwrap();

        let error = ModuleTree::open(folder.path(), Some("6.1.0-1-cloud-amd64")).unwrap_err();

        assert!(error.to_string().contains("lib/modules/6.1.0-1-cloud-amd64"), "{error}");
    }
}
