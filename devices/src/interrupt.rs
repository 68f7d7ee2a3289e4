//! How a device gets the guest's attention.

use std::io;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Raises a device's interrupt line.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that a used ring moved (virtio 1.2, section 2.3).
    fn used_buffer(&self);

    /// Tells the driver that the configuration space changed (virtio 1.2, section 2.3).
    fn config_changed(&self);

    /// Tells the driver that the device stopped until it is reset (virtio 1.2, section 2.1.2:
    /// DEVICE_NEEDS_RESET).
    fn needs_reset(&self);
}

/// An edge on an interrupt line, as an eventfd that the hypervisor watches (KVM_IRQFD).
#[derive(Debug)]
pub struct IrqLine {
    event: EventFd,
}

impl IrqLine {
    /// Creates a line nobody listens to yet.
    pub fn new() -> io::Result<Self> {
        Ok(IrqLine { event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// The descriptor to register as irqfd.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Raises the line once.
    pub fn raise(&self) {
        // The only failure is a counter at its maximum, and then the edge is pending anyway.
        let _ = self.event.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_line_makes_its_descriptor_readable() {
        let line = IrqLine::new().unwrap();

        line.raise();

        assert_eq!(line.event().read().unwrap(), 1);
    }
}
