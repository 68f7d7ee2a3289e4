//! The file that says in the end what the machine cost.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use vmm::Metrics;

/// A file for metrics, open from the start: later nothing is opened.
pub struct Report<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> Report<'a> {
    /// Makes the file, or empties the one that is there.
    pub fn create(path: &'a Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("create {path:?}"))?;
        Ok(Report { path, file })
    }

    /// Writes `metrics` as JSON.
    pub fn write(mut self, metrics: &Metrics) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(metrics)?;
        self.file.write_all(text.as_bytes()).with_context(|| format!("write {:?}", self.path))
    }
}
