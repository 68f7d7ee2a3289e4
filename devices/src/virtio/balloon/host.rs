//! The host's end of a balloon: how large it shall be, and what the guest says about its memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::statistics::Statistics;
use super::{Balloon, PAGES_PER_MIB, QueueError};

/// A balloon as the host's threads see it. Its methods may be called from any thread, also when no
/// driver uses the device.
#[derive(Clone)]
pub struct Host {
    device: Arc<Mutex<Balloon>>,
    answered: Arc<Condvar>,
}

impl Host {
    /// The host's end of `device`.
    pub fn of(device: Arc<Mutex<Balloon>>) -> Self {
        let answered = device.lock().expect("a fresh device does not panic").answered.clone();
        Host { device, answered }
    }

    /// Asks the guest to put `target_mib` MiB of its memory into the balloon, or to take back what
    /// is above that. It does so in its own time, as far as it can.
    pub fn set_target_mib(&self, target_mib: u32) {
        self.lock().set_target(target_mib.saturating_mul(PAGES_PER_MIB));
    }

    /// How much shall be in the balloon, in MiB.
    pub fn target_mib(&self) -> u32 {
        self.lock().target() / PAGES_PER_MIB
    }

    /// How much the guest says is in the balloon, in MiB, rounded down.
    pub fn size_mib(&self) -> u32 {
        self.lock().size() / PAGES_PER_MIB
    }

    /// How much memory the guest gave back since it started, in bytes, all ways together; what was
    /// used again and given back again counts again.
    pub fn given_back_bytes(&self) -> u64 {
        self.lock().given_back_bytes()
    }

    /// Asks the guest which of its pages are free and gives those back: all the free pages it has,
    /// once. Returns at once; `false` if no driver is there that knows how.
    pub fn ask_for_free_pages(&self) -> bool {
        self.lock().start_hinting()
    }

    /// Asks the guest for fresh statistics and waits for them, at most for `patience`. `None` if no
    /// answer came, or no driver is there that would give one.
    pub fn statistics(&self, patience: Duration) -> Result<Option<Statistics>, QueueError> {
        let mut device = self.lock();
        let Some(request) = device.request_statistics()? else { return Ok(None) };
        let unanswered = |device: &mut Balloon| device.answers() == request;
        let (device, _) = self
            .answered
            .wait_timeout_while(device, patience, |device| unanswered(device))
            .expect("no device panics while it holds its lock");
        Ok(Some(device.statistics()).filter(|_| device.answers() != request))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Balloon> {
        self.device.lock().expect("no device panics while it holds its lock")
    }
}
