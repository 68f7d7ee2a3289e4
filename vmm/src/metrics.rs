//! What a VM costs: exits to user space by reason and address, and when its boot passed each stage.

use std::collections::BTreeMap;
use std::sync::Arc;

use arch::machine::Space;
use devices::virtio::activity::Activity;
use serde::Serialize;

/// Most addresses counted apart. The guest chooses the addresses, so there must be an end.
const MAX_ADDRESSES: usize = 64;

/// A snapshot of what a VM did so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// When [`crate::Vmm::new`] was called, in nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
    /// When the kernel and the initrd were in guest RAM, on the same clock, which is done beside what
    /// comes next.
    pub loaded_ns: u64,
    /// When KVM's machine, its vCPUs, guest RAM, what is in it, and the jail were there, on the same clock.
    pub machine_ns: u64,
    /// When every device was open and had its place, on the same clock.
    pub devices_ns: u64,
    /// When the machine was complete, on the same clock.
    pub built_ns: u64,
    /// When the first vCPU entered the guest, on the same clock; 0 before.
    pub first_entry_ns: u64,
    /// Exits of all vCPUs to user space.
    pub exits: ExitCounts,
    /// What each virtio device had to do, by the device's name.
    pub devices: BTreeMap<String, DeviceCounts>,
}

/// What one virtio device had to do since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DeviceCounts {
    /// How often its event loop served one of its queues.
    pub kicks: u64,
    /// How often it raised its interrupt line.
    pub interrupts: u64,
    /// Descriptor chains it gave back to the driver.
    pub chains: u64,
}

impl DeviceCounts {
    /// What `activity` counted so far.
    pub(crate) fn of(activity: &Activity) -> Self {
        let counts = activity.counts();
        DeviceCounts { kicks: counts.kicks, interrupts: counts.interrupts, chains: counts.chains }
    }
}

/// How often vCPUs left the guest for user space, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ExitCounts {
    /// Reads of device registers.
    pub reads: u64,
    /// Writes of device registers.
    pub writes: u64,
    /// Exits the architecture dealt with.
    pub handled: u64,
    /// Signals: pause, stop, or a debugger.
    pub signals: u64,
    /// Accesses by address, as `port 0x3f8` or `memory 0xd0000000`, of the first 64 addresses.
    pub by_address: BTreeMap<String, u64>,
    /// Accesses of every further address.
    pub other_addresses: u64,
}

impl ExitCounts {
    /// All exits together.
    pub fn total(&self) -> u64 {
        self.reads + self.writes + self.handled + self.signals
    }
}

/// What is known of a VM's cost before its vCPUs run: when its boot passed each stage, and where its
/// devices count.
#[derive(Debug, Default)]
pub struct Record {
    /// See [`Metrics::started_ns`].
    pub started_ns: u64,
    /// See [`Metrics::loaded_ns`].
    pub loaded_ns: u64,
    /// See [`Metrics::machine_ns`].
    pub machine_ns: u64,
    /// See [`Metrics::devices_ns`].
    pub devices_ns: u64,
    /// See [`Metrics::built_ns`].
    pub built_ns: u64,
    /// The name and the counters of each virtio device.
    pub activities: Vec<(String, Arc<Activity>)>,
}

impl Record {
    /// The metrics of a VM whose vCPUs did nothing yet.
    pub fn metrics(&self) -> Metrics {
        let devices = self.activities.iter();
        Metrics {
            started_ns: self.started_ns,
            loaded_ns: self.loaded_ns,
            machine_ns: self.machine_ns,
            devices_ns: self.devices_ns,
            built_ns: self.built_ns,
            devices: devices
                .map(|(name, activity)| (name.clone(), DeviceCounts::of(activity)))
                .collect(),
            ..Metrics::default()
        }
    }
}

/// The counts of one vCPU while it runs.
#[derive(Debug, Default)]
pub struct Counter {
    counts: ExitCounts,
    by_address: BTreeMap<(bool, u64), u64>,
}

impl Counter {
    /// Counts a read of device registers.
    pub fn read(&mut self, space: Space, address: u64) {
        self.counts.reads += 1;
        self.address(space, address);
    }

    /// Counts a write of device registers.
    pub fn write(&mut self, space: Space, address: u64) {
        self.counts.writes += 1;
        self.address(space, address);
    }

    /// Counts an exit the architecture dealt with.
    pub fn handled(&mut self) {
        self.counts.handled += 1;
    }

    /// Counts a signal.
    pub fn signal(&mut self) {
        self.counts.signals += 1;
    }

    /// Adds what this vCPU did to `sum`.
    pub fn add_to(&self, sum: &mut ExitCounts) {
        sum.reads += self.counts.reads;
        sum.writes += self.counts.writes;
        sum.handled += self.counts.handled;
        sum.signals += self.counts.signals;
        sum.other_addresses += self.counts.other_addresses;
        for (&(port, address), count) in &self.by_address {
            let space = if port { "port" } else { "memory" };
            *sum.by_address.entry(format!("{space} {address:#x}")).or_default() += count;
        }
    }

    fn address(&mut self, space: Space, address: u64) {
        let key = (space == Space::Port, address);
        if self.by_address.len() < MAX_ADDRESSES || self.by_address.contains_key(&key) {
            *self.by_address.entry(key).or_default() += 1;
        } else {
            self.counts.other_addresses += 1;
        }
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, the clock of [`Metrics`].
pub fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the call to fill.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_counted_by_address() {
        let mut counter = Counter::default();
        counter.read(Space::Port, 0x60);
        counter.write(Space::Port, 0x60);
        counter.write(Space::Memory, 0x60);

        let mut sum = ExitCounts::default();
        counter.add_to(&mut sum);

        assert_eq!((sum.reads, sum.writes, sum.total()), (1, 2, 3));
        assert_eq!(sum.by_address["port 0x60"], 2);
        assert_eq!(sum.by_address["memory 0x60"], 1);
    }

    #[test]
    fn a_guest_cannot_fill_our_memory_with_addresses() {
        let mut counter = Counter::default();
        for address in 0..1000 {
            counter.read(Space::Memory, address);
        }

        let mut sum = ExitCounts::default();
        counter.add_to(&mut sum);

        assert_eq!(sum.by_address.len(), MAX_ADDRESSES);
        assert_eq!(sum.other_addresses, 1000 - 64);
    }
}
