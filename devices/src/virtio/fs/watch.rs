//! Looks after a window while files are mapped, because anybody may truncate them.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::window::Window;
use crate::virtio::Backend;

/// How often the sizes of mapped files are looked at: the longest that a guest is held up by a file
/// which the host truncates.
const INTERVAL: Duration = Duration::from_secs(1);

/// A timer that runs only while files are mapped.
pub(super) struct Watch {
    timer: TimerFd,
    is_running: bool,
}

impl Watch {
    /// A timer that does not run. The error is that the host has none left.
    pub fn new() -> io::Result<Watch> {
        Ok(Watch { timer: TimerFd::new().map_err(io::Error::from)?, is_running: false })
    }

    /// What to wait for.
    pub fn backend(&self) -> Backend {
        Backend { fd: self.timer.as_raw_fd(), events: EventSet::IN }
    }

    /// Starts the timer if a file is mapped.
    pub fn begin(&mut self, window: &Window) {
        if !self.is_running && window.is_used() {
            self.start();
        }
    }

    /// Does what is due when the timer expires.
    pub fn look_after(&mut self, window: &Window) {
        window.patch();
        self.is_running = false;
        self.begin(window);
    }

    fn start(&mut self) {
        // It expires once more, which whoever waits is told, as if it had been read. A timer that the
        // kernel refuses is asked for again with the next request.
        self.is_running = self.timer.reset(INTERVAL, None).is_ok();
    }
}
