//! The way to a small kernel: built from Debian's source with our configuration, once per machine.

use crate::cache::{self, Cache};
use crate::compile::{self, compile};
use crate::debian;
use crate::fragment::{self, Fragment};
use crate::kernel::{self, Kernel};
use crate::manifest::{BuildInputs, Kind, Provenance, sha256};
use crate::program::{self, command, output, require_with_libelf};
use crate::source::{self, Source};
use crate::target::Target;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Raised when the steps below change what comes out of the same source and configuration.
const RECIPE: u32 = 1;

/// What the kernel build runs, and what unpacks its source.
const PROGRAMS: &[&str] = &[
    "apt-cache",
    "apt-config",
    "apt-get",
    "bc",
    "bison",
    "dpkg",
    "flex",
    "gcc",
    "make",
    "tar",
    "xz",
];

/// Headers of the largest drivers: a quarter of the source's bytes, and never compiled here.
const NOT_UNPACKED: &str = "*/drivers/gpu/drm/amd/include/*";

/// Why there is no tuned kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is missing or fails.
    #[error(transparent)]
    Program(#[from] program::Error),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The source cannot be had.
    #[error("get the kernel source")]
    Source(#[from] source::Error),
    /// The source package does not unpack.
    #[error(transparent)]
    Package(#[from] debian::Error),
    /// Our configuration has a mistake.
    #[error("read the configuration for {target}")]
    Fragment {
        /// The architecture.
        target: &'static str,
        /// What is wrong with it.
        #[source]
        source: fragment::Error,
    },
    /// The kernel's own rules overrule our configuration.
    #[error("the kernel does not accept these options: {}", .options.join(" "))]
    Dropped {
        /// Them, as our configuration has them.
        options: Vec<String>,
    },
    /// It does not compile.
    #[error(transparent)]
    Compile(#[from] compile::Error),
    /// A file cannot be read, written or removed.
    #[error("access {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The finished kernel cannot be kept.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
}

/// The kernel with our configuration, from the cache or compiled with `jobs` processes.
pub fn obtain(cache: &Cache, target: &'static Target, jobs: usize) -> Result<Kernel, Error> {
    require_with_libelf(PROGRAMS)?;
    let [compiler, linker, strip] = ["gcc", "ld", "strip"].map(|tool| target.tool(tool));
    program::require(&[&compiler, &linker, &strip])?;
    let fragment = Fragment::parse(&target.config())
        .map_err(|source| Error::Fragment { target: target.name, source })?;
    let source = Source::obtain(cache)?;
    let build = Build {
        inputs: BuildInputs {
            config_sha256: sha256(fragment.stripped().as_bytes()),
            compiler: first_line(&compiler)?,
            linker: first_line(&linker)?,
            recipe: RECIPE,
        },
        target,
        fragment,
        source,
        jobs,
    };
    let folder = cache.entry("kernel", &build.key(), |folder| build.fill(folder))?;
    Ok(Kernel::load(folder)?)
}

/// One kernel build and all that decides what comes out of it.
struct Build {
    target: &'static Target,
    fragment: Fragment,
    source: Source,
    inputs: BuildInputs,
    jobs: usize,
}

impl Build {
    /// Names the result by everything that decides it.
    fn key(&self) -> String {
        let BuildInputs { config_sha256, compiler, linker, recipe } = &self.inputs;
        let source = &self.source.sha256;
        let all = format!(
            "{}\n{source}\n{config_sha256}\n{recipe}\n{compiler}\n{linker}\n",
            self.target.name
        );
        sha256(all.as_bytes())
    }

    fn fill(&self, folder: &Path) -> Result<(), Error> {
        let tree = folder.join("source");
        self.unpack(&tree)?;
        self.configure(&tree)?;
        compile(&tree, self.target, self.jobs, &self.log(folder))?;

        let release = tree.join("include/config/kernel.release");
        let release = read(&release)?;
        let image = tree.join(self.target.kbuild.image);
        let image = stripped(&image, &self.target.tool("strip"))?;
        fs::rename(tree.join(".config"), folder.join("config"))
            .map_err(|source| file_error(folder, source))?;
        fs::remove_dir_all(&tree).map_err(|source| file_error(&tree, source))?;
        let provenance = Provenance {
            kind: Kind::Tuned,
            architecture: self.target.name.to_owned(),
            release: release.trim().to_owned(),
            package: self.source.package.name.clone(),
            version: self.source.package.version.clone(),
            package_sha256: self.source.sha256.clone(),
            build: Some(self.inputs.clone()),
        };
        Ok(Kernel::store(folder, &image, &provenance)?)
    }

    /// Beside the entry and not in it, so that it outlives a failed build.
    fn log(&self, folder: &Path) -> PathBuf {
        folder.with_file_name(format!("{}.log", self.key()))
    }

    fn unpack(&self, tree: &Path) -> Result<(), Error> {
        eprintln!("kernel: unpacking {} {}", self.source.package.name, self.source.package.version);
        let package = tree.with_file_name("package");
        debian::unpack(&self.source.file, &package)?;
        fs::create_dir(tree).map_err(|source| file_error(tree, source))?;
        let mut tar = command("tar");
        tar.args(["-xJ", "--strip-components=1", "--exclude", NOT_UNPACKED]);
        output(tar.arg("-f").arg(Source::tarball(&package)).arg("-C").arg(tree))?;
        fs::remove_dir_all(&package).map_err(|source| file_error(&package, source))
    }

    /// Writes `.config`: our options, and of the rest as little as the kernel lets be.
    fn configure(&self, tree: &Path) -> Result<(), Error> {
        let wanted = tree.join("coracle.config");
        fs::write(&wanted, self.fragment.stripped())
            .map_err(|source| file_error(&wanted, source))?;
        let mut make = compile::make(tree, self.target);
        output(make.env("KCONFIG_ALLCONFIG", &wanted).arg("allnoconfig"))?;
        let options = self.fragment.dropped(&read(&tree.join(".config"))?);
        if options.is_empty() { Ok(()) } else { Err(Error::Dropped { options }) }
    }
}

/// An ELF image without its symbol table, which nobody reads at boot; any other image as it is.
fn stripped(image: &Path, strip: &str) -> Result<Vec<u8>, Error> {
    let contents = fs::read(image).map_err(|source| file_error(image, source))?;
    if !contents.starts_with(b"\x7fELF") {
        return Ok(contents);
    }
    output(command(strip).arg("--strip-all").arg(image))?;
    fs::read(image).map_err(|source| file_error(image, source))
}

fn first_line(program: &str) -> Result<String, Error> {
    let text = output(command(program).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| file_error(path, source))
}

fn file_error(path: &Path, source: io::Error) -> Error {
    Error::File { path: path.to_owned(), source }
}
