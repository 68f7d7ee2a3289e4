//! `spec`: write a configuration to start from.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, bail};
use coracle::bundle::CONFIG_FILE;

/// runc's, with a cgroup namespace, as the guest has cgroup v2.
const TEMPLATE: &str = include_str!("spec.json");

#[derive(clap::Args)]
pub struct Args {
    /// Folder of the bundle
    #[arg(long, short = 'b', value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Accepted as runc has it; root of a guest needs no mapping to be no root of the host
    #[arg(long)]
    rootless: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let path = args.bundle.join(CONFIG_FILE);
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o666).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!("File {} exists. Remove it first", path.display())
        }
        Err(error) => return Err(error).with_context(|| format!("create {}", path.display())),
    };
    file.write_all(TEMPLATE.as_bytes()).with_context(|| format!("write {}", path.display()))
}
