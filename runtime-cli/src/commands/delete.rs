//! `delete`: free what a container holds.

use anyhow::bail;
use coracle::sandbox;
use coracle::state::{ContainerId, Error, Status};

use super::Globals;

#[derive(clap::Args)]
pub struct Args {
    /// Kill the container if it still runs; succeed if it does not exist
    #[arg(long, short = 'f')]
    force: bool,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    let id = ContainerId::parse(&args.id)?;
    let dir = match globals.root.open(&id) {
        Err(Error::Missing(_)) if args.force => return Ok(()),
        other => other?,
    };
    let _lock = match dir.lock() {
        Err(Error::Missing(_)) if args.force => return Ok(()),
        other => other?,
    };
    let state = match dir.load() {
        Ok(state) => state,
        // Nothing tells what the container held; freeing its id is what is left to do.
        Err(Error::Missing(_) | Error::Damaged { .. }) if args.force => return Ok(dir.remove()?),
        Err(error) => return Err(error.into()),
    };
    match state.status {
        Status::Stopped | Status::Created => {}
        _ if args.force => {}
        other => bail!("cannot delete container {id} that is not stopped: {other}"),
    }
    sandbox::destroy(&dir, &state)?;
    Ok(dir.remove()?)
}
