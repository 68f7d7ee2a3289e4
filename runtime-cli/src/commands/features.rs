//! `features`: what this runtime implements, as JSON.

pub fn run() -> anyhow::Result<()> {
    let features = serde_json::to_string_pretty(&coracle::features::features())?;
    super::print(&format!("{features}\n"))
}
