//! `resume`: let the processes of a paused container run again.

use anyhow::ensure;
use coracle::sandbox::Client;
use coracle::state::Status;

use super::{Globals, IdArgs};

pub fn run(globals: &Globals, args: &IdArgs) -> anyhow::Result<()> {
    let (dir, state) = globals.container(&args.id)?;
    ensure!(state.status == Status::Paused, "container not paused");
    Ok(Client::connect(&dir)?.resume()?)
}
