//! `install` and `uninstall`: make an engine know this runtime, and forget it.

use std::path::PathBuf;

use anyhow::Context;
use coracle::install::{Engine, Installation, Removal};

#[derive(clap::Args)]
pub struct Args {
    /// The engine
    #[arg(value_name = "ENGINE")]
    engine: Engine,
    /// The engine's configuration file, if it is not the usual one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder that keeps what the file was before
    #[arg(long, value_name = "DIR", default_value = "/var/lib/coracle/install")]
    backup: PathBuf,
}

impl Args {
    fn installation(&self) -> Installation {
        Installation::new(self.engine, self.config.clone(), &self.backup)
    }
}

pub fn install(args: &Args) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    let installation = args.installation();
    installation.install(&program)?;
    let (path, next) = (installation.config().display(), args.engine.next_step());
    super::print(&format!("{path} names the runtime coracle now: {next}.\n"))
}

pub fn uninstall(args: &Args) -> anyhow::Result<()> {
    let installation = args.installation();
    let (path, next) = (installation.config().display(), args.engine.next_step());
    let what = match installation.uninstall()? {
        Removal::Whole => "is as it was before",
        Removal::Entry => "was changed since, and only the runtime was taken out",
    };
    super::print(&format!("{path} {what}: {next}.\n"))
}
