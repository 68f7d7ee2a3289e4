//! Flow control of one stream, in both directions (virtio 1.2, section 5.10.6.3).

use super::packet::Header;

/// Largest number of bytes the guest may have in flight on one stream: what one stream can make the
/// host keep in memory when its output does not move.
pub const WINDOW_BYTES: u32 = 256 << 10;

/// The guest is told about room once this much of it is new. Small enough that it never runs dry
/// while the output moves, large enough that updates are rare.
const UPDATE_STEP_BYTES: u32 = WINDOW_BYTES / 4;

/// Byte counters of one stream; all of them wrap, as those on the wire do.
#[derive(Debug, Default)]
pub struct Credit {
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl Credit {
    /// Notes what a packet from the guest says about its buffer.
    pub fn learn(&mut self, header: &Header) {
        self.guest_window = header.buffer_bytes;
        self.guest_forwarded = header.forwarded;
    }

    /// Bytes the guest has room for. A guest whose counters make no sense has none.
    pub fn available(&self) -> u32 {
        self.guest_window.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Notes that `bytes` went to the guest.
    pub fn spend(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Takes `bytes` from the guest; `false` if it had no room for that many.
    pub fn receive(&mut self, bytes: u32) -> bool {
        let in_flight = self.received.wrapping_sub(self.forwarded);
        if bytes > WINDOW_BYTES.saturating_sub(in_flight) {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// Notes that `bytes` left the host's buffer.
    pub fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Whether the guest should hear about new room.
    pub fn is_update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= UPDATE_STEP_BYTES
    }

    /// Tells the guest in `header` how much room there is.
    pub fn announce(&mut self, header: &mut Header) {
        header.buffer_bytes = WINDOW_BYTES;
        header.forwarded = self.forwarded;
        self.announced = self.forwarded;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(buffer_bytes: u32, forwarded: u32) -> Header {
        Header { buffer_bytes, forwarded, ..Header::default() }
    }

    #[test]
    fn nothing_may_be_sent_before_the_guest_said_how_much() {
        assert_eq!(Credit::default().available(), 0);
    }

    #[test]
    fn sent_bytes_use_credit_up_and_forwarded_ones_return_it() {
        let mut credit = Credit::default();

        credit.learn(&says(100, 0));
        credit.spend(70);
        assert_eq!(credit.available(), 30);

        credit.learn(&says(100, 50));
        assert_eq!(credit.available(), 80);
    }

    #[test]
    fn counters_wrap() {
        let start = u32::MAX - 9;
        let mut credit =
            Credit { sent: start, received: start, forwarded: start, ..Credit::default() };

        credit.learn(&says(100, start));
        credit.spend(20);
        assert_eq!(credit.available(), 80);

        assert!(credit.receive(WINDOW_BYTES));
        assert!(!credit.receive(1));
        credit.forward(20);
        assert!(credit.receive(20));
    }

    #[test]
    fn a_guest_that_forwarded_more_than_was_sent_gets_nothing() {
        let mut credit = Credit::default();

        credit.learn(&says(100, 1));

        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn the_largest_window_can_be_used_up() {
        let mut credit = Credit::default();

        credit.learn(&says(u32::MAX, 0));
        credit.spend(u32::MAX);

        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn an_update_is_due_once_enough_was_forwarded() {
        let mut credit = Credit::default();
        assert!(credit.receive(WINDOW_BYTES));

        credit.forward(UPDATE_STEP_BYTES - 1);
        assert!(!credit.is_update_due());
        credit.forward(1);
        assert!(credit.is_update_due());

        credit.announce(&mut Header::default());
        assert!(!credit.is_update_due());
    }
}
