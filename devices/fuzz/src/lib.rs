//! Hostile guests against each device: what `make fuzz` mutates, and how to look at what it finds.
//!
//! An input is a [script](script) of what a guest and the other end of a device do. A target plays it
//! to a real device behind real registers and a real event loop, stays within [bounds](bounds), and
//! then wants the device to work again for a driver that starts over. The seeds of a target are in
//! `seeds/`: scripts that make sense, made by `seeds()` of its module, and what fuzzing has found.

pub mod balloon;
pub mod block;
pub mod bounds;
pub mod connect;
pub mod console;
pub mod fs;
pub mod guest;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod script;
pub mod vsock;

/// A scripted input and what it shows.
pub type Seed = (&'static str, Vec<u8>);

/// One thing to be fuzzed.
pub struct Target {
    /// Its name, and that of the folder of its seeds.
    pub name: &'static str,
    /// Plays one input; panics if it finds something.
    pub run: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: fn() -> Vec<Seed>,
}

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target { name: "balloon", run: balloon::run, seeds: balloon::seeds },
    Target { name: "block", run: block::run, seeds: block::seeds },
    Target { name: "connect", run: connect::run, seeds: connect::seeds },
    Target { name: "console", run: console::run, seeds: console::seeds },
    Target { name: "fs", run: fs::run, seeds: fs::seeds },
    Target { name: "mem", run: mem::run, seeds: mem::seeds },
    Target { name: "mmio", run: mmio::run, seeds: mmio::seeds },
    Target { name: "net", run: net::run, seeds: net::seeds },
    Target { name: "pmem", run: pmem::run, seeds: pmem::seeds },
    Target { name: "queue", run: queue::run, seeds: queue::seeds },
    Target { name: "rng", run: rng::run, seeds: rng::seeds },
    Target { name: "vsock", run: vsock::run, seeds: vsock::seeds },
];
