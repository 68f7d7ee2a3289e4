//! Log lines on standard error.

use std::io::{self, Write};

use log::{Log, Metadata, Record};

/// Shows what the machine complains about on standard error.
pub struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The file server's library writes what a guest sends it, as often as the guest likes.
        !metadata.target().starts_with("fuse_backend_rs")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // Not `eprintln`, which panics where nobody listens.
            let _ = writeln!(io::stderr(), "coracle-vmm: {}", record.args());
        }
    }

    fn flush(&self) {}
}
