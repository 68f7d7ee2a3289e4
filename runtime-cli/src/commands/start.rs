//! `start`: run the user's program in a created container.

use anyhow::bail;
use coracle::sandbox::{self, Client};
use coracle::state::Status;

use super::{Globals, IdArgs};

pub fn run(globals: &Globals, args: &IdArgs) -> anyhow::Result<()> {
    let (dir, state) = globals.container(&args.id)?;
    match state.status {
        Status::Created => Ok(sandbox::start(&dir, &Client::connect(&dir)?)?),
        Status::Running => bail!("cannot start an already running container"),
        Status::Stopped => bail!("cannot start a container that has stopped"),
        other => bail!("cannot start a container in the {other} state"),
    }
}
