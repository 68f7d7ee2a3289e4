//! The keyboard controller of a PC, reduced to the one thing PCs still use it for: its reset line.

use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;

/// An i8042 that calls back when the guest pulls the reset line (command 0xfe at offset 4).
pub struct I8042 {
    device: I8042Device<Callback>,
}

struct Callback(Box<dyn Fn() + Send>);

impl Trigger for Callback {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)();
        Ok(())
    }
}

impl I8042 {
    /// `on_reset` runs on the vCPU thread that pulled the line and must not block.
    pub fn new(on_reset: impl Fn() + Send + 'static) -> Self {
        I8042 { device: I8042Device::new(Callback(Box::new(on_reset))) }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([register], Ok(offset)) = (data, u8::try_from(offset)) {
            *register = self.device.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (&[value], Ok(offset)) = (data, u8::try_from(offset)) {
            let Ok(()) = self.device.write(offset, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn counting() -> (I8042, Arc<AtomicUsize>) {
        let resets = Arc::new(AtomicUsize::new(0));
        let seen = resets.clone();
        (I8042::new(move || _ = seen.fetch_add(1, Ordering::Relaxed)), resets)
    }

    #[test]
    fn the_reset_command_resets() {
        let (mut i8042, resets) = counting();
        i8042.write(4, &[0xfe]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn other_commands_do_nothing() {
        let (mut i8042, resets) = counting();
        i8042.write(4, &[0xaa]);
        i8042.write(0, &[0xfe]);
        i8042.write(4, &[0xfe, 0xfe]);
        assert_eq!(resets.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn status_says_that_nothing_is_pending() {
        let (mut i8042, _) = counting();
        let mut status = [0xff];
        i8042.read(4, &mut status);
        assert_eq!(status, [0]);
    }
}
