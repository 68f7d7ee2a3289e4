//! Flow control of one stream, in both directions (virtio 1.2, section 5.10.6.3), and what all streams of
//! a guest together may make the host keep.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::packet::Header;

/// Largest number of bytes the guest may have in flight on one stream: what one stream can make the
/// host keep in memory when its output does not move.
pub const WINDOW_BYTES: u32 = 256 << 10;

/// What a stream may have in flight before any of its bytes was forwarded, and however much was promised to
/// others. It grows by what is forwarded: most streams carry little, and promise as much. Promises are not
/// taken back from a stream that was busy and is idle, so it must be enough to go on quickly without any.
pub const LEAST_WINDOW_BYTES: u32 = 32 << 10;

/// What may be promised to all streams of a guest together, beside [`LEAST_WINDOW_BYTES`] for each.
pub const BUDGET_BYTES: u32 = 16 << 20;

/// What one stream may have of that which is not promised yet, as a fraction: enough to leave the next ones
/// some when the first do not move.
const SHARE: u32 = 8;

/// The guest is told about room once this part of its window is new. Small enough that it never runs dry
/// while the output moves, large enough that updates are rare.
const UPDATE_STEP: u32 = 4;

/// What the host has promised to take from one guest and has not passed on yet, in bytes: promised is
/// promised, whether the guest uses it or not.
#[derive(Debug, Clone, Default)]
pub struct Budget {
    promised: Arc<AtomicU32>,
}

impl Budget {
    /// How much may be promised to a stream that has `own` bytes of promises.
    fn window(&self, own: u32) -> u32 {
        let others = self.promised().saturating_sub(own);
        (BUDGET_BYTES.saturating_sub(others) / SHARE).max(LEAST_WINDOW_BYTES)
    }

    /// What is promised to all streams, in bytes.
    pub fn promised(&self) -> u32 {
        self.promised.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u32) {
        self.promised.fetch_add(bytes, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: u32) {
        self.promised.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Byte counters of one stream; all of them wrap, as those on the wire do.
#[derive(Debug, Default)]
pub struct Credit {
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
    received: u32,
    forwarded: u32,
    /// What the guest was told that may be `received` in the end. A promise is never taken back: a guest
    /// may have used it already.
    promised: u32,
    /// By how much the window has grown.
    grown: u32,
    budget: Budget,
}

impl Credit {
    /// Nothing sent, received or promised yet; promises will be out of `budget`.
    pub fn new(budget: &Budget) -> Self {
        Credit { budget: budget.clone(), ..Credit::default() }
    }

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
        if bytes > self.promised.wrapping_sub(self.received) {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// Notes that `bytes` left the host's buffer.
    pub fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        self.grown = self.grown.saturating_add(bytes).min(WINDOW_BYTES - LEAST_WINDOW_BYTES);
        self.budget.give_back(bytes);
    }

    /// Whether the guest should hear about new room.
    pub fn is_update_due(&self) -> bool {
        let window = self.window();
        window.saturating_sub(self.owed()) >= window / UPDATE_STEP
    }

    /// Tells the guest in `header` how much room there is.
    pub fn announce(&mut self, header: &mut Header) {
        let more = self.window().saturating_sub(self.owed());
        self.promised = self.promised.wrapping_add(more);
        self.budget.add(more);
        header.buffer_bytes = self.owed();
        header.forwarded = self.forwarded;
    }

    /// Takes back what the guest, which has forgotten the stream, will not use any more.
    pub fn forget_guest(&mut self) {
        self.budget.give_back(self.promised.wrapping_sub(self.received));
        self.promised = self.received;
    }

    /// What is promised and has not been passed on, in bytes.
    fn owed(&self) -> u32 {
        self.promised.wrapping_sub(self.forwarded)
    }

    /// How much should be promised.
    fn window(&self) -> u32 {
        (LEAST_WINDOW_BYTES + self.grown).min(self.budget.window(self.owed()))
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.budget.give_back(self.owed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(buffer_bytes: u32, forwarded: u32) -> Header {
        Header { buffer_bytes, forwarded, ..Header::default() }
    }

    /// What the guest is told about room.
    fn announced(credit: &mut Credit) -> u32 {
        let mut header = Header::default();
        credit.announce(&mut header);
        header.buffer_bytes
    }

    /// A stream that moved, and now has all that it was promised in flight.
    fn stuck(budget: &Budget) -> Credit {
        let mut credit = Credit::new(budget);
        for _ in 0..8 {
            let window = announced(&mut credit);
            assert!(credit.receive(window));
            credit.forward(window);
        }
        let window = announced(&mut credit);
        assert!(credit.receive(window));
        credit
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
        let mut credit = Credit::default();
        (credit.sent, credit.received) = (start, start);
        (credit.forwarded, credit.promised) = (start, start);

        credit.learn(&says(100, start));
        credit.spend(20);
        assert_eq!(credit.available(), 80);

        assert_eq!(announced(&mut credit), LEAST_WINDOW_BYTES);
        assert!(credit.receive(LEAST_WINDOW_BYTES));
        assert!(!credit.receive(1));
        credit.forward(20);
        assert_eq!(announced(&mut credit), LEAST_WINDOW_BYTES + 20);
        assert!(credit.receive(40));
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
    fn nothing_may_be_received_before_it_was_promised() {
        let mut credit = Credit::default();

        assert!(!credit.receive(1));
    }

    #[test]
    fn an_update_is_due_once_enough_was_forwarded() {
        let mut credit = Credit::default();
        announced(&mut credit);
        assert!(credit.receive(LEAST_WINDOW_BYTES));

        // What is forwarded makes room, and the window grow by as much.
        credit.forward(LEAST_WINDOW_BYTES / 8);
        assert!(!credit.is_update_due());
        credit.forward(LEAST_WINDOW_BYTES / 8);
        assert!(credit.is_update_due());

        announced(&mut credit);
        assert!(!credit.is_update_due());
    }

    #[test]
    fn the_window_of_a_stream_that_moves_grows_to_the_largest() {
        let mut credit = Credit::default();
        let mut windows = Vec::new();

        for _ in 0..100 {
            let window = announced(&mut credit);
            windows.push(window);
            assert!(credit.receive(window));
            credit.forward(window);
            assert!(credit.is_update_due());
        }

        assert!(windows.is_sorted());
        assert_eq!(windows[..4], [32 << 10, 64 << 10, 128 << 10, WINDOW_BYTES]);
        assert_eq!(windows.last(), Some(&WINDOW_BYTES));
    }

    #[test]
    fn streams_that_do_not_move_leave_a_little_for_each_of_the_others() {
        let budget = Budget::default();
        let stuck: Vec<_> = (0..1000).map(|_| stuck(&budget)).collect();

        assert!(budget.promised() <= BUDGET_BYTES + 1000 * LEAST_WINDOW_BYTES);
        let mut late = Credit::new(&budget);
        for _ in 0..100 {
            assert_eq!(announced(&mut late), LEAST_WINDOW_BYTES);
            assert!(late.receive(LEAST_WINDOW_BYTES));
            assert!(!late.receive(1));
            late.forward(LEAST_WINDOW_BYTES);
            assert!(late.is_update_due());
        }

        drop(stuck);
        assert_eq!(announced(&mut late), WINDOW_BYTES);
        drop(late);
        assert_eq!(budget.promised(), 0);
    }

    #[test]
    fn streams_that_were_busy_and_are_idle_leave_enough_for_the_next() {
        let budget = Budget::default();
        let _idle: Vec<_> = (0..100)
            .map(|_| {
                let mut credit = stuck(&budget);
                credit.forward(credit.owed());
                announced(&mut credit);
                credit
            })
            .collect();

        let mut late = Credit::new(&budget);

        assert!(budget.promised() > BUDGET_BYTES / 2);
        assert_eq!(announced(&mut late), 32 << 10);
    }

    #[test]
    fn a_promise_is_kept_when_promises_become_scarce() {
        let budget = Budget::default();
        let mut early = Credit::new(&budget);
        let first = announced(&mut early);
        assert!(early.receive(first));
        early.forward(first);
        let promised = announced(&mut early);
        assert!(promised > LEAST_WINDOW_BYTES);
        let _stuck: Vec<_> = (0..1000).map(|_| stuck(&budget)).collect();

        assert_eq!(announced(&mut early), promised);
        assert!(early.receive(promised));
        early.forward(promised);

        assert_eq!(announced(&mut early), LEAST_WINDOW_BYTES);
    }

    #[test]
    fn what_a_guest_that_is_gone_was_promised_is_for_others() {
        let budget = Budget::default();
        let mut credit = Credit::new(&budget);
        announced(&mut credit);
        assert!(credit.receive(100));

        credit.forget_guest();
        assert_eq!(budget.promised(), 100);

        credit.forward(100);
        assert_eq!(budget.promised(), 0);
    }
}
