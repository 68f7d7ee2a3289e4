//! The file that says in the end what the machine cost.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use vmm::Metrics;

/// A file for metrics, open from the start: later nothing is opened.
pub struct Report<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> Report<'a> {
    /// Makes the file, or opens the one that is there.
    pub fn open(path: &'a Path) -> anyhow::Result<Self> {
        let file = vmm::open_output(path).with_context(|| format!("--metrics: open {path:?}"))?;
        Ok(Report { path, file })
    }

    /// Refuses a `path` that cannot be opened, as far as a look can tell.
    pub fn check(path: &Path) -> io::Result<()> {
        vmm::check_output(path)
    }

    /// Empties the file: for when there will be something to write.
    pub fn empty(&self) -> anyhow::Result<()> {
        match self.file.set_len(0) {
            // A pipe or a terminal keeps nothing.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            emptied => emptied.with_context(|| format!("empty {:?}", self.path)),
        }
    }

    /// Writes `metrics` as JSON.
    pub fn write(mut self, metrics: &Metrics) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(metrics)?;
        self.file.write_all(text.as_bytes()).with_context(|| format!("write {:?}", self.path))
    }
}
