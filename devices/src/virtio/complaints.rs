//! Log lines about a misbehaving driver, of which there are only a few.

use std::fmt::Display;

use log::warn;

/// Log lines a device writes about its driver in its life.
const LIMIT: u32 = 8;

/// A device's complaints about its driver: the first few are logged, the rest is silence, because
/// a guest may misbehave a million times.
#[derive(Debug)]
pub struct Complaints {
    device: String,
    left: u32,
}

impl Complaints {
    /// Complaints in the name of `device`.
    pub fn of(device: impl Into<String>) -> Self {
        Complaints { device: device.into(), left: LIMIT }
    }

    /// Logs `what` the driver did, unless too much was said before.
    pub fn add(&mut self, what: &dyn Display) {
        let Some(left) = self.left.checked_sub(1) else { return };
        self.left = left;
        let end = if left == 0 { " (further complaints are not logged)" } else { "" };
        warn!("{}: {what}{end}", self.device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_complaints_are_a_few_lines() {
        let mut complaints = Complaints::of("test");

        for _ in 0..1_000_000 {
            complaints.add(&"broken");
        }

        assert_eq!(complaints.left, 0);
    }
}
