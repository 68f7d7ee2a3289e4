//! `pause`: suspend all processes of a container.

use coracle::sandbox::Client;

use super::{Globals, IdArgs, require_running};

pub fn run(globals: &Globals, args: &IdArgs) -> anyhow::Result<()> {
    let (dir, state) = globals.container(&args.id)?;
    require_running(&state)?;
    Ok(Client::connect(&dir)?.pause()?)
}
