//! `state`: the state of a container as JSON.

use super::{Globals, IdArgs};

pub fn run(globals: &Globals, args: &IdArgs) -> anyhow::Result<()> {
    let (_, state) = globals.container(&args.id)?;
    super::print(&state.to_oci_json())
}
