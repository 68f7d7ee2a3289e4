//! A container without memory limit gets more memory whenever its guest is short of it, as it would get
//! the host's. What it frees, the balloon gives back.

use std::time::{Duration, Instant};

use agent_protocol::Request as Order;

use super::agent::Asker;
use super::serve::Serving;
use crate::logging::chain;

/// How often the guest is looked at while it takes memory.
const POLL: Duration = Duration::from_millis(10);

/// How long it may take; then it has what it could take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Memory that was offered and is not taken yet.
#[derive(Debug)]
pub(super) struct Growing {
    /// When to look next.
    pub(super) look_at: Instant,
    give_up: Instant,
    before_mib: u64,
}

impl Serving<'_> {
    /// Offers the guest as much memory as it has.
    pub(super) fn memory_short(&mut self) {
        let room = self.parts.room;
        let Some(memory) = self.parts.vm.pluggable_memory().filter(|_| room.grows) else {
            return self.memory_added(false);
        };
        let before_mib = memory.plugged_mib();
        let now_mib = u32::try_from(before_mib).unwrap_or(u32::MAX);
        if let Err(error) = memory.request_mib(room.more(now_mib)) {
            log::warn!("add memory: {}", chain(&error));
            return self.memory_added(false);
        }
        let now = Instant::now();
        self.growing = Some(Growing { look_at: now + POLL, give_up: now + PATIENCE, before_mib });
    }

    /// Looks whether the guest has taken what it was offered.
    pub(super) fn look_at_memory(&mut self) {
        let now = Instant::now();
        let Some(growing) = self.growing.as_mut().filter(|growing| now >= growing.look_at) else {
            return;
        };
        let Some(memory) = self.parts.vm.pluggable_memory() else { return };
        let plugged_mib = memory.plugged_mib();
        if plugged_mib < memory.requested_mib() && now < growing.give_up {
            growing.look_at = now + POLL;
            return;
        }
        // A guest that takes none is not asked again.
        let takes = plugged_mib > growing.before_mib;
        let more = takes && plugged_mib < self.parts.room.pluggable_mib.into();
        self.growing = None;
        self.memory_added(more);
    }

    /// From here on the memory of the container has a limit, and the machine is as large as that needs.
    pub(super) fn grow_no_more(&mut self) {
        if std::mem::replace(&mut self.parts.room.grows, false) {
            self.growing = None;
            self.memory_added(false);
        }
    }

    fn memory_added(&mut self, more: bool) {
        self.ask(&Order::MemoryAdded { more }, Asker::Nobody);
    }
}
