//! Log lines to the kernel's message buffer, which the host sees on the guest's console.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Writes each record as one line.
#[derive(Debug)]
struct Logger {
    kmsg: Option<File>,
}

/// Sends warnings and errors to `/dev/kmsg`, or to standard error where there is none.
pub fn install() {
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    // Leaked once: the logger lives as long as the process.
    if log::set_logger(Box::leak(Box::new(Logger { kmsg }))).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// Sends warnings and errors to standard error.
pub fn install_stderr() {
    if log::set_logger(&Logger { kmsg: None }).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        // Kernel log levels; the console of a quiet boot shows those below 4.
        let level = if record.level() == Level::Error { 3 } else { 4 };
        // One write is one record. There is nowhere to report that logging failed.
        let _ = match &self.kmsg {
            Some(kmsg) => (&*kmsg)
                .write_all(format!("<{level}>coracle-agent: {}\n", record.args()).as_bytes()),
            None => writeln!(io::stderr(), "coracle-agent: {}", record.args()),
        };
    }

    fn flush(&self) {}
}
