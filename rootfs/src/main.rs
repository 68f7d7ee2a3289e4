//! `coracle-image`: builds what a guest boots from, a kernel and an initrd with the agent.

mod archive;
mod bzimage;
mod cache;
mod compile;
mod compression;
mod debian;
mod distro;
mod elf;
mod erofs;
mod fragment;
mod initrd;
mod kernel;
mod manifest;
mod modules;
mod program;
mod source;
mod target;
mod tree;
mod tuned;

use anyhow::{Context, Result};
use cache::Cache;
use clap::{Args, Parser, Subcommand};
use initrd::Compression;
use kernel::Kernel;
use manifest::{Kind, Manifest, sha256};
use modules::{Module, ModuleTree};
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::available_parallelism;
use target::Target;

/// What the root is called that a guest maps.
const ROOTFS: &str = "rootfs.erofs";

/// Builds what a Coracle guest boots from. The cache is /var/cache/coracle, or $CORACLE_CACHE.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Packs the agent, and the modules of a kernel that has them, into an initrd.
    Initrd {
        #[command(flatten)]
        agent: AgentArguments,
        /// Where to write the initrd.
        #[arg(long)]
        output: PathBuf,
        /// An unpacked kernel package: the folder that holds lib/modules.
        #[arg(long)]
        modules: Option<PathBuf>,
        /// The kernel whose modules are packed, if lib/modules has several.
        #[arg(long, requires = "modules")]
        kernel_release: Option<String>,
    },
    /// Writes DIR/kernel, ready to boot without unpacking, and says where its modules are.
    Kernel(KernelArguments),
    /// Writes DIR/kernel, DIR/initrd, for a tuned kernel DIR/rootfs.erofs, which it maps instead of the initrd,
    /// and DIR/manifest.json, which says what they were made of.
    Build {
        #[command(flatten)]
        agent: AgentArguments,
        #[command(flatten)]
        kernel: KernelArguments,
    },
    /// Prints the tuned kernel's configuration with the reason of each option.
    KernelConfig {
        /// x86_64, aarch64 or ppc64le.
        #[arg(long, default_value = std::env::consts::ARCH, value_parser = target)]
        architecture: &'static Target,
    },
}

#[derive(Debug, Args)]
struct AgentArguments {
    /// The statically linked agent, which becomes the guest's /init.
    #[arg(long)]
    agent: PathBuf,
    /// How to pack the initrd.
    #[arg(long, value_enum, default_value_t = Compression::None)]
    compress: Compression,
}

#[derive(Debug, Args)]
struct KernelArguments {
    /// The distribution's kernel (seconds) or one built here with our configuration (minutes).
    #[arg(long, value_enum)]
    kind: Kind,
    /// x86_64, aarch64 or ppc64le.
    #[arg(long, default_value = std::env::consts::ARCH, value_parser = target)]
    architecture: &'static Target,
    /// The folder to write to.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Processes of a kernel build.
    #[arg(long, default_value_t = available_parallelism().map_or(1, usize::from))]
    jobs: usize,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coracle-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Initrd { agent, output, modules, kernel_release } => {
            let modules = needed_modules(modules.as_deref(), kernel_release.as_deref())?;
            let initrd = initrd::build(read_agent(&agent.agent)?, modules, agent.compress)?;
            forget_rootfs(output.parent().unwrap_or(Path::new("")))?;
            write(&output, &initrd)
        }
        Command::Kernel(arguments) => write_kernel(&arguments).map(drop),
        Command::Build { agent, kernel } => build(&agent, &kernel),
        Command::KernelConfig { architecture } => {
            Ok(std::io::stdout().write_all(architecture.config().as_bytes())?)
        }
    }
}

fn build(agent: &AgentArguments, arguments: &KernelArguments) -> Result<()> {
    let agent_program = read_agent(&agent.agent)?;
    // Debian's kernels have what that takes as modules.
    let maps_root = arguments.kind == Kind::Tuned && arguments.architecture.maps_root;
    if maps_root {
        erofs::require_tools()?;
    }
    let (kernel, kernel_sha256) = write_kernel(arguments)?;
    let provenance = kernel.provenance();
    let modules = needed_modules(kernel.module_root(), Some(&provenance.release))?;
    let agent_sha256 = sha256(&agent_program);
    let rootfs_sha256 =
        maps_root.then(|| write_rootfs(&agent_program, &arguments.output)).transpose()?;
    let initrd = initrd::build(agent_program, modules, agent.compress)?;
    write(&arguments.output.join("initrd"), &initrd)?;
    let manifest = Manifest {
        coracle: env!("CARGO_PKG_VERSION"),
        kernel: provenance.clone(),
        agent_sha256,
        kernel_sha256,
        initrd_sha256: sha256(&initrd),
        rootfs_sha256,
    };
    let json = serde_json::to_string_pretty(&manifest)? + "\n";
    write(&arguments.output.join("manifest.json"), json.as_bytes())
}

/// Writes the root that the guest maps. Returns its checksum.
fn write_rootfs(agent: &[u8], folder: &Path) -> Result<String> {
    let image = erofs::build(agent)?;
    write(&folder.join(ROOTFS), &image)?;
    Ok(sha256(&image))
}

/// Removes the root that is in `folder`: what is written there next does not belong to it, and guests would
/// take it before an initrd.
fn forget_rootfs(folder: &Path) -> Result<()> {
    let path = folder.join(ROOTFS);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Writes the kernel. Returns it, and the checksum of what was written.
fn write_kernel(arguments: &KernelArguments) -> Result<(Kernel, String)> {
    let cache = Cache::of_this_machine();
    let target = arguments.architecture;
    let kernel = match arguments.kind {
        Kind::Distro => distro::obtain(&cache, target)?,
        Kind::Tuned => tuned::obtain(&cache, target, arguments.jobs)?,
    };
    let image = kernel.image()?;
    forget_rootfs(&arguments.output)?;
    write(&arguments.output.join("kernel"), &image)?;
    match kernel.module_root() {
        Some(root) => eprintln!("kernel: its modules, for initrd --modules: {}", root.display()),
        None => eprintln!("kernel: no modules, all is built in"),
    }
    let checksum = sha256(&image);
    Ok((kernel, checksum))
}

fn needed_modules(root: Option<&Path>, release: Option<&str>) -> Result<Vec<Module>> {
    let Some(root) = root else { return Ok(Vec::new()) };
    let tree = ModuleTree::open(root, release)?;
    Ok(tree.needed()?)
}

fn read_agent(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read the agent {}", path.display()))
}

/// Puts a finished file in place in one step: whoever boots from it sees the old one or the new one.
fn write(path: &Path, contents: &[u8]) -> Result<()> {
    let failed = || format!("write {}", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(failed)?;
    file.write_all(contents).with_context(failed)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).with_context(failed)?;
    file.persist(path).with_context(failed)?;
    eprintln!("wrote {} ({} KiB)", path.display(), contents.len() / 1024);
    Ok(())
}

fn target(name: &str) -> Result<&'static Target, String> {
    Target::named(name).ok_or_else(|| format!("no guest kernel for {name} yet"))
}
