//! Looks at what the guest forgets, so that it need not kick for each file.
//!
//! Nobody waits for that a file is forgotten but who unmounts a share, and whoever removes a tree forgets
//! thousands. The first kick
//! starts a timer; while it runs the guest kicks once for many. When there was nothing more, the timer
//! stops and the next kick is wanted again: an idle guest wakes nobody.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use crate::virtio::Backend;

/// How many files the guest forgets until it kicks all the same: each is an open file of the host.
pub(super) const KICK_AT: u16 = 16;

/// The longest that a file which nobody knows any more is kept open.
const INTERVAL: Duration = Duration::from_millis(20);

/// A timer that runs only while the guest forgets.
pub(super) struct Forgetting(TimerFd);

impl Forgetting {
    /// A timer that does not run. The error is that the host has none left.
    pub fn new() -> io::Result<Self> {
        Ok(Forgetting(TimerFd::new()?))
    }

    /// What to wait for.
    pub fn backend(&self) -> Backend {
        Backend { fd: self.0.as_raw_fd(), events: EventSet::IN }
    }

    /// Starts the timer anew; `false` if the kernel refuses.
    pub fn look_soon(&mut self) -> bool {
        self.0.reset(INTERVAL, None).is_ok()
    }
}
