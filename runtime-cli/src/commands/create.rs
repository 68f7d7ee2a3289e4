//! `create`: everything up to the execution of the user's program.

use std::path::PathBuf;

use anyhow::Context;
use coracle::bundle::{self, Bundle};
use coracle::sandbox::{self, CreateOptions};
use coracle::settings::Settings;
use coracle::state::{ContainerDir, ContainerId};
use vmm::now_ns;

use super::Globals;

/// What `create` and `run` have in common.
#[derive(clap::Args)]
pub struct BundleArgs {
    /// Folder of the bundle
    #[arg(long, short = 'b', value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Unix socket that receives the master end of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Do not use pivot_root inside the container
    #[arg(long)]
    pub no_pivot: bool,
    /// Accepted as runc has it; a guest has session keyrings of its own
    #[arg(long)]
    pub no_new_keyring: bool,
    /// File descriptors to pass besides stdio; not possible across a machine border
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    pub id: String,
}

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    create(globals, &args.bundle, true).map(drop).context("coracle create failed")
}

/// Creates a container; returns its folder and the pid of its sandbox process. Leaves nothing
/// behind if it fails.
pub fn create(
    globals: &Globals,
    args: &BundleArgs,
    detached: bool,
) -> anyhow::Result<(ContainerDir, i32)> {
    let started_ns = now_ns();
    let id = ContainerId::parse(&args.id)?;
    let bundle = Bundle::load(&args.bundle)?;
    bundle::check_console(bundle.terminal(), detached, args.console_socket.is_some())?;
    let settings = Settings::load()?.with_annotations(&bundle.annotations())?;
    if args.preserve_fds > 0 {
        log::warn!(
            "--preserve-fds {} has no effect: a process in a virtual machine cannot hold \
             descriptors of the host",
            args.preserve_fds
        );
    }
    let options = CreateOptions {
        pid_file: args.pid_file.clone(),
        console_socket: args.console_socket.clone(),
        no_pivot: args.no_pivot,
        preserve_fds: args.preserve_fds,
        systemd_cgroup: globals.systemd_cgroup,
        log: globals.log.clone(),
        settings,
        started_ns,
    };
    let dir = globals.root.create(&id)?;
    match sandbox::create(&dir, &bundle, &options) {
        Ok(pid) => Ok((dir, pid)),
        Err(error) => {
            if let Err(leftover) = dir.remove() {
                log::warn!("{leftover}");
            }
            Err(error.into())
        }
    }
}
