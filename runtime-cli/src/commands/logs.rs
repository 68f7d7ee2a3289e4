//! `logs`: what the start of a container spent its time on. Its output is its engine's to keep.

use anyhow::{Context, bail};
use coracle::phases::{Phase, Phases};

use super::Globals;

#[derive(clap::Args)]
pub struct Args {
    /// Show the phases of the container's start, from the command line to its program
    #[arg(long, required = true)]
    phases: bool,
    /// Print them as JSON, in nanoseconds since the start
    #[arg(long)]
    json: bool,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    let (dir, _) = globals.container(&args.id)?;
    let Some(phases) = Phases::load(&dir).context("read the phases of the container's start")?
    else {
        bail!("the container is still being created");
    };
    if args.json {
        let list: Vec<Phase<'_>> = phases.iter().collect();
        return super::print(&format!("{}\n", serde_json::to_string_pretty(&list)?));
    }
    super::print(&phases.waterfall())
}
