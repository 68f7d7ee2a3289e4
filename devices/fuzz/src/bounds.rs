//! What no input may exceed: memory of this process, and lines of its log.

use std::alloc::System;
use std::panic;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use cap::Cap;
use log::{LevelFilter, Log, Metadata, Record};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Most memory that may be allocated at one time, in bytes; what a guest has as its RAM is not in it.
/// An allocation beyond that aborts.
const MOST_HEAP_BYTES: usize = 32 << 20;

/// Most log lines of one input: a few for each of a device's parts.
const MOST_LINES: usize = 40;

/// Longest log line, in bytes.
const LONGEST_LINE: usize = 1024;

#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, MOST_HEAP_BYTES);

static LINES: AtomicUsize = AtomicUsize::new(0);

/// Counts lines instead of showing them.
struct Counter;

impl Log for Counter {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // As the loggers of coracle and coracle-vmm, which do not let this library log.
        !metadata.target().starts_with("fuse_backend_rs")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = record.args().to_string();
            assert!(line.len() <= LONGEST_LINE, "a log line of {} bytes: {line}", line.len());
            let lines = LINES.fetch_add(1, Ordering::Relaxed) + 1;
            assert!(lines <= MOST_LINES, "{lines} lines were logged; the last one is: {line}");
        }
    }

    fn flush(&self) {}
}

/// Begins with an input: from now on it may log its lines.
pub fn begin() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Counter).expect("nobody else sets a logger");
        log::set_max_level(LevelFilter::Info);
        // As in every program whose main function is Rust's; the engine's is not.
        // SAFETY: no handler runs where a signal is ignored.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("SIGPIPE can be ignored");
        // Who tells of a finding may take the memory that takes.
        let tell = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            let _ = HEAP.set_limit(usize::MAX);
            tell(panic);
        }));
    });
    LINES.store(0, Ordering::Relaxed);
}
