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

/// An edge on an interrupt line.
pub enum IrqLine {
    /// An eventfd that the hypervisor watches (KVM_IRQFD).
    Event(EventFd),
    /// What raises the line at once.
    Direct(Box<dyn Fn() + Send + Sync>),
}

impl IrqLine {
    /// Creates a line by an eventfd to which nobody listens yet.
    pub fn new() -> io::Result<Self> {
        Ok(IrqLine::Event(EventFd::new(EFD_NONBLOCK)?))
    }

    /// The descriptor to register as irqfd, if there is one.
    pub fn event(&self) -> Option<&EventFd> {
        match self {
            IrqLine::Event(event) => Some(event),
            IrqLine::Direct(_) => None,
        }
    }

    /// Raises the line once.
    pub fn raise(&self) {
        match self {
            // The only failure is a counter at its maximum, and then the edge is pending anyway.
            IrqLine::Event(event) => _ = event.write(1),
            IrqLine::Direct(raise) => raise(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_line_makes_its_descriptor_readable() {
        let line = IrqLine::new().unwrap();

        line.raise();

        assert_eq!(line.event().unwrap().read().unwrap(), 1);
    }

    #[test]
    fn a_direct_line_is_raised_at_once() {
        let (raised, seen) = std::sync::mpsc::channel();
        let line = IrqLine::Direct(Box::new(move || raised.send(()).unwrap()));

        line.raise();

        assert!(line.event().is_none());
        assert!(seen.try_recv().is_ok());
    }
}
