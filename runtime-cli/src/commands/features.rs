//! `features`: what this runtime implements, as JSON.

pub fn run() -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(&coracle::features::features())?);
    Ok(())
}
