//! `console`: what the guest's kernel printed last.

use coracle::sandbox::Client;

use super::{Globals, IdArgs};

pub fn run(globals: &Globals, args: &IdArgs) -> anyhow::Result<()> {
    let (dir, _) = globals.container(&args.id)?;
    super::print(&Client::connect(&dir)?.console()?)
}
