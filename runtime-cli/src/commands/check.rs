//! `check`: whether this host can run virtual machines.

use coracle::check;
use coracle::settings::Settings;

#[derive(clap::Args)]
pub struct Args {}

/// Returns 0 if containers can run on this host, else 1.
pub fn run(_args: &Args) -> anyhow::Result<u8> {
    let findings = check::host(&Settings::load()?);
    let usable = findings.iter().all(check::Finding::allows_containers);
    let found: String = findings.iter().map(ToString::to_string).collect();
    let can = if usable { "can" } else { "cannot" };
    super::print(&format!("{found}This host {can} run containers.\n"))?;
    Ok(u8::from(!usable))
}
