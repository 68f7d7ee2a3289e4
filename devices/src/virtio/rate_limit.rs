//! Token buckets that bound how much a device moves, and the timer that tells when it may go on.
//!
//! A device asks [`RateLimiter::admits`] before it takes a request and tells
//! [`RateLimiter::charge`] how large it was. A bucket may go into debt: the request that empties it
//! is done whole, and the next one waits until the debt is paid. So the rate holds exactly over
//! time, no request is too large, and none is overtaken for ever by smaller ones.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::Backend;

/// Tokens are counted in parts of this size, so that a slow rate gains some each nanosecond.
const PARTS_PER_TOKEN: i128 = 1_000_000_000;

/// How much of one thing may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// What may pass in a second, in the long run.
    pub per_second: NonZeroU64,
    /// What may pass at once after a time of rest.
    pub burst: NonZeroU64,
}

/// What bounds a device; without either rate nothing does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Rate of data, in bytes.
    pub bytes: Option<Rate>,
    /// Rate of requests or frames, whatever their size.
    pub operations: Option<Rate>,
}

/// A bucket that fills with time; pure: the caller says what time it is.
#[derive(Debug, Clone)]
struct Bucket {
    rate: Rate,
    /// What is left, in parts of a token; negative while a debt is paid off.
    parts: i128,
    /// When `parts` was right, since the limiter was made.
    filled_at: Duration,
}

/// Bounds the bytes and the operations of one device.
pub struct RateLimiter {
    /// None or up to two; each has to have tokens.
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    made_at: Instant,
    /// There is one if there is a bucket.
    timer: Option<TimerFd>,
}

impl Bucket {
    /// A full bucket at time zero.
    fn new(rate: Rate) -> Self {
        Bucket { rate, parts: parts(rate.burst.get()), filled_at: Duration::ZERO }
    }

    /// How long from `now` on there will not be a token. No time at all if there is one.
    fn wait(&mut self, now: Duration) -> Duration {
        self.fill(now);
        let missing = (PARTS_PER_TOKEN - self.parts).max(0);
        let per_nanosecond = i128::from(self.rate.per_second.get());
        let wait_ns = u64::try_from((missing + per_nanosecond - 1) / per_nanosecond);
        Duration::from_nanos(wait_ns.unwrap_or(u64::MAX))
    }

    /// Takes `tokens` out, or owes them.
    fn take(&mut self, tokens: u64) {
        self.parts = self.parts.saturating_sub(parts(tokens));
    }

    /// One second adds `per_second` tokens, so one nanosecond adds as many parts.
    fn fill(&mut self, now: Duration) {
        let elapsed_ns = now.saturating_sub(self.filled_at).as_nanos();
        self.filled_at = self.filled_at.max(now);
        let gained = i128::try_from(elapsed_ns)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.rate.per_second.get().into());
        let full = parts(self.rate.burst.get());
        self.parts = self.parts.saturating_add(gained).min(full);
    }
}

fn parts(tokens: u64) -> i128 {
    i128::from(tokens) * PARTS_PER_TOKEN
}

impl RateLimiter {
    /// A limiter with full buckets. The error is that the host has no timer left.
    pub fn new(limits: RateLimits) -> io::Result<Self> {
        let limited = limits.bytes.or(limits.operations).is_some();
        Ok(RateLimiter {
            bytes: limits.bytes.map(Bucket::new),
            operations: limits.operations.map(Bucket::new),
            made_at: Instant::now(),
            timer: limited.then(TimerFd::new).transpose()?,
        })
    }

    /// A limiter that admits everything.
    pub fn unlimited() -> Self {
        RateLimiter { bytes: None, operations: None, made_at: Instant::now(), timer: None }
    }

    /// Whether another request may be taken now. If not, the backend becomes ready when one may be.
    pub fn admits(&mut self) -> bool {
        let Some(timer) = &mut self.timer else { return true };
        let now = self.made_at.elapsed();
        let buckets = self.bytes.iter_mut().chain(&mut self.operations);
        let wait = buckets.map(|bucket| bucket.wait(now)).max().unwrap_or_default();
        if wait.is_zero() {
            return true;
        }
        // Armed again it expires at the new time only. A timer the kernel refuses must not stop the
        // device for ever, so then there is no limit.
        timer.reset(wait, None).is_err()
    }

    /// Counts one operation that moved `bytes`.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }

    /// What a device with this limiter waits on; nothing if there is no limit. It is to look at the
    /// queues again that `admits` held up.
    pub fn backend(&self) -> Option<Backend> {
        let timer = self.timer.as_ref()?;
        Some(Backend { fd: timer.as_raw_fd(), events: EventSet::IN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(per_second: u64, burst: u64) -> Rate {
        Rate {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst).unwrap(),
        }
    }

    const START: Duration = Duration::ZERO;

    #[test]
    fn a_full_bucket_gives_its_burst_at_once() {
        let mut bucket = Bucket::new(rate(10, 3));

        for _ in 0..3 {
            assert_eq!(bucket.wait(START), Duration::ZERO);
            bucket.take(1);
        }

        assert_eq!(bucket.wait(START), Duration::from_millis(100));
    }

    #[test]
    fn tokens_come_back_at_the_rate() {
        let mut bucket = Bucket::new(rate(10, 3));
        bucket.take(3);

        assert_eq!(bucket.wait(Duration::from_millis(40)), Duration::from_millis(60));
        assert_eq!(bucket.wait(Duration::from_millis(100)), Duration::ZERO);
    }

    #[test]
    fn a_debt_is_paid_off_before_the_next_token() {
        let mut bucket = Bucket::new(rate(1000, 1000));
        bucket.take(5000);

        assert_eq!(bucket.wait(START), Duration::from_millis(4001));
        assert_eq!(bucket.wait(Duration::from_millis(4001)), Duration::ZERO);
    }

    #[test]
    fn rest_fills_no_more_than_the_burst() {
        let mut bucket = Bucket::new(rate(10, 3));
        bucket.take(3);

        let later = Duration::from_secs(3600);
        assert_eq!(bucket.wait(later), Duration::ZERO);
        bucket.take(3);

        assert_eq!(bucket.wait(later), Duration::from_millis(100));
    }

    #[test]
    fn a_busy_bucket_gives_its_rate_to_the_token() {
        let mut bucket = Bucket::new(rate(3, 1));
        let mut now = START;
        let mut taken = 0;

        while now < Duration::from_secs(100) {
            now += bucket.wait(now);
            bucket.take(1);
            taken += 1;
        }

        assert_eq!(taken, 301);
    }

    #[test]
    fn a_clock_that_steps_back_takes_and_gives_nothing() {
        let mut bucket = Bucket::new(rate(10, 3));
        let late = Duration::from_secs(10);
        bucket.wait(late);
        bucket.take(3);

        assert_eq!(bucket.wait(START), Duration::from_millis(100));
        assert_eq!(bucket.wait(late), Duration::from_millis(100));
    }

    #[test]
    fn the_largest_numbers_overflow_nothing() {
        let mut bucket = Bucket::new(rate(u64::MAX, u64::MAX));
        bucket.wait(Duration::MAX);
        (0..3).for_each(|_| bucket.take(u64::MAX));
        assert_eq!(bucket.wait(Duration::MAX), Duration::from_nanos(2_000_000_001));

        let mut slow = Bucket::new(rate(1, 1));
        (0..3).for_each(|_| slow.take(u64::MAX));
        assert_eq!(slow.wait(START), Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn without_a_rate_everything_is_admitted_and_nothing_waited_on() {
        let mut limiter = RateLimiter::unlimited();

        limiter.charge(u64::MAX);

        assert!(limiter.admits());
        assert!(limiter.backend().is_none());
    }

    #[test]
    fn either_bucket_holds_a_request_up() {
        let hour = rate(1, 3600);
        let only_bytes = RateLimits { bytes: Some(hour), operations: None };
        let only_operations = RateLimits { bytes: None, operations: Some(hour) };

        for limits in [only_bytes, only_operations] {
            let mut limiter = RateLimiter::new(limits).unwrap();
            (0..3600).for_each(|_| limiter.charge(1));
            assert!(!limiter.admits());
        }
    }

    #[test]
    fn the_timer_expires_when_tokens_are_back() {
        let operations = Some(rate(100, 1));
        let mut limiter = RateLimiter::new(RateLimits { bytes: None, operations }).unwrap();
        limiter.charge(0);

        assert!(!limiter.admits());
        limiter.timer.as_mut().unwrap().wait().unwrap();

        assert!(limiter.admits());
    }
}
