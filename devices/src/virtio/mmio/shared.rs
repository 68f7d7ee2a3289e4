//! What of a register block changes without the driver's doing: why it was interrupted, and the status.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};

use super::RegisterPage;
use crate::interrupt::{Interrupt, IrqLine};
use crate::virtio::activity::Activity;

/// What the device's threads and the vCPUs share.
pub(super) struct Shared {
    irq: Arc<IrqLine>,
    /// What the driver reads, at any time.
    page: RegisterPage,
    /// Whether the configuration space changed while the driver had not acknowledged a change before:
    /// what it acknowledges then may be the one before.
    changed_again: Mutex<bool>,
    activity: Arc<Activity>,
}

impl Interrupt for Shared {
    /// The cause is shown from the first such interrupt on until the device is reset. A driver looks at a
    /// ring once too often for that, at most, while one that acknowledges late takes nothing away.
    fn used_buffer(&self) {
        self.page.add_bits(VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_INT_VRING);
        self.raise();
    }

    fn config_changed(&self) {
        self.page.next_generation();
        let mut changed_again = self.lock_changes();
        let before = self.page.add_bits(VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_INT_CONFIG);
        *changed_again |= before & VIRTIO_MMIO_INT_CONFIG != 0;
        drop(changed_again);
        self.raise();
    }

    fn needs_reset(&self) {
        self.page.add_bits(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_NEEDS_RESET);
        self.config_changed();
    }
}

impl Shared {
    /// What a driver reads in `page` that listens to `irq`.
    pub(super) fn new(irq: Arc<IrqLine>, page: RegisterPage) -> Self {
        Shared { irq, page, changed_again: Mutex::default(), activity: Arc::default() }
    }

    pub(super) fn page(&self) -> &RegisterPage {
        &self.page
    }

    pub(super) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    fn raise(&self) {
        self.irq.raise();
        self.activity.add_interrupt();
    }

    /// The driver has seen `causes`. It may have seen that of a change before the last one: then it is
    /// interrupted once more.
    pub(super) fn acknowledge(&self, causes: u32) {
        if causes & VIRTIO_MMIO_INT_CONFIG == 0 {
            return;
        }
        let mut changed_again = self.lock_changes();
        if mem::take(&mut *changed_again) {
            drop(changed_again);
            self.raise();
        } else {
            self.page.remove_bits(VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The causes that a driver may have seen of a device that goes on in the place of another one.
    pub(super) fn restore(&self, causes: u32) {
        self.page.set(VIRTIO_MMIO_INTERRUPT_STATUS, causes);
        // It acknowledges a change that it has read, and another one may have come after it.
        *self.lock_changes() = causes & VIRTIO_MMIO_INT_CONFIG != 0;
    }

    /// Starts over with a driver that has set nothing and was not interrupted.
    pub(super) fn forget(&self) {
        self.page.set(VIRTIO_MMIO_STATUS, 0);
        self.restore(0);
    }

    fn lock_changes(&self) -> MutexGuard<'_, bool> {
        self.changed_again.lock().expect("nothing panics while it notes a change")
    }

    pub(super) fn status(&self) -> u32 {
        self.page.get(VIRTIO_MMIO_STATUS)
    }
}
