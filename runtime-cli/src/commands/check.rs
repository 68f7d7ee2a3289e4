//! `check`: whether this host can run virtual machines.

use coracle::check;
use coracle::settings::Settings;

#[derive(clap::Args)]
pub struct Args {}

/// Returns 0 if containers can run on this host, else 1.
pub fn run(_args: &Args) -> anyhow::Result<u8> {
    let findings = check::host(&Settings::load()?);
    for finding in &findings {
        print!("{finding}");
    }
    let usable = findings.iter().all(check::Finding::allows_containers);
    println!(
        "{}",
        if usable { "This host can run containers." } else { "This host cannot run containers." }
    );
    Ok(u8::from(!usable))
}
