//! A PL031 real-time clock: what time it is, in seconds, for guests that nothing else tells.

use vm_superio::Rtc;
use vm_superio::rtc_pl031::NoEvents;

use crate::bus::BusDevice;

/// A clock that goes with the host's, has no alarm, and is set by the guest for itself only.
pub struct Clock(Rtc<NoEvents>);

impl Clock {
    /// A clock that shows the host's time.
    #[expect(clippy::new_without_default, reason = "what it shows depends on when it is made")]
    pub fn new() -> Self {
        Clock(Rtc::new())
    }
}

impl BusDevice for Clock {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Drivers read the identification by bytes, at offsets of words.
        let mut word = [0; 4];
        if let Ok(offset) = u16::try_from(offset) {
            self.0.read(offset, &mut word);
        }
        for (byte, value) in data.iter_mut().zip(word) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(word), Ok(offset)) = (data.try_into(), u16::try_from(offset)) {
            self.0.write(offset, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    // PrimeCell Real Time Clock (PL031) Technical Reference Manual, section 3.2.
    const DATA: u64 = 0x0;
    const LOAD: u64 = 0x8;
    const FIRST_IDENTIFICATION: u64 = 0xfe0;

    fn word(clock: &mut Clock, offset: u64) -> u32 {
        let mut word = [0xaa; 4];
        clock.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn a_clock_shows_the_time_of_the_host() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();

        let shown = u64::from(word(&mut Clock::new(), DATA));

        assert!((now..now + 60).contains(&shown), "{now} {shown}");
    }

    #[test]
    fn a_guest_sets_its_clock() {
        let mut clock = Clock::new();

        clock.write(LOAD, &1000_u32.to_le_bytes());

        assert!((1000..1060).contains(&word(&mut clock, DATA)));
    }

    #[test]
    fn the_identification_is_that_of_a_pl031() {
        let mut clock = Clock::new();

        assert_eq!(word(&mut clock, FIRST_IDENTIFICATION), 0x31);
    }

    #[test]
    fn accesses_of_any_width_at_any_offset_are_answered() {
        let mut clock = Clock::new();

        for offset in 0..0x1000 {
            for width in 1..=8 {
                let mut data = [0xaa; 8];
                clock.read(offset, &mut data[..width]);
                clock.write(offset, &data[..width]);
            }
        }
    }
}
