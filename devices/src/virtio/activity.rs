//! How much a device had to do, counted once for all kinds of devices.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of one device, shared by those who count and those who want to know. They are
/// statistics: no other memory access depends on them, so relaxed order is enough.
#[derive(Debug, Default)]
pub struct Activity {
    kicks: AtomicU64,
    interrupts: AtomicU64,
    chains: AtomicU64,
}

/// The counters of one device at one time; all of them since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ActivityCounts {
    /// How often the event loop served a queue, because the driver kicked it or because the device
    /// wanted to go on. Kicks that come while one is pending are one.
    pub kicks: u64,
    /// How often the interrupt line was raised.
    pub interrupts: u64,
    /// Descriptor chains given back to the driver.
    pub chains: u64,
}

impl Activity {
    /// Counts a kick.
    pub fn add_kick(&self) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an interrupt.
    pub fn add_interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts chains given back.
    pub fn add_chains(&self, count: u64) {
        self.chains.fetch_add(count, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn counts(&self) -> ActivityCounts {
        ActivityCounts {
            kicks: self.kicks.load(Ordering::Relaxed),
            interrupts: self.interrupts.load(Ordering::Relaxed),
            chains: self.chains.load(Ordering::Relaxed),
        }
    }
}
