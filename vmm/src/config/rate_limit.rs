//! How much a device may move, as plain data.

use std::num::NonZeroU64;

use devices::virtio::rate_limit::{Rate, RateLimits};
use serde::{Deserialize, Serialize};

use super::Problems;

/// How much a device may move, as token buckets: a bucket holds up to its burst, which may be used
/// at once, and gets its rate back each second. Without a rate there is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimitConfig {
    /// Rate of data, at least 1.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    /// Data that may move at once after a time of rest, in bytes, at least 1. One second's worth if
    /// it is not given; not without `bytes_per_second`.
    #[serde(default)]
    pub bytes_burst: Option<u64>,
    /// Rate of requests or frames, whatever their size, at least 1.
    #[serde(default)]
    pub operations_per_second: Option<u64>,
    /// Requests or frames that may pass at once after a time of rest, at least 1. One second's worth
    /// if it is not given; not without `operations_per_second`.
    #[serde(default)]
    pub operations_burst: Option<u64>,
}

impl RateLimitConfig {
    /// Checks every field; `field` is the path of this one.
    pub(super) fn validate(&self, field: &str, found: &mut Problems) {
        let buckets = [
            ("bytes", self.bytes_per_second, self.bytes_burst),
            ("operations", self.operations_per_second, self.operations_burst),
        ];
        for (what, per_second, burst) in buckets {
            let rate_field = format!("{field}.{what}_per_second");
            let burst_field = format!("{field}.{what}_burst");
            if burst.is_some() && per_second.is_none() {
                found.add(&burst_field, format!("must come with {rate_field}"));
            }
            found.in_range(&rate_field, per_second.unwrap_or(1), 1, u64::MAX);
            found.in_range(&burst_field, burst.unwrap_or(1), 1, u64::MAX);
        }
    }

    /// The same for a device. A rate of zero, which `validate` refuses, is no limit.
    pub(crate) fn limits(&self) -> RateLimits {
        let rate = |per_second: Option<u64>, burst: Option<u64>| {
            let per_second = per_second.and_then(NonZeroU64::new)?;
            Some(Rate { per_second, burst: burst.and_then(NonZeroU64::new).unwrap_or(per_second) })
        };
        RateLimits {
            bytes: rate(self.bytes_per_second, self.bytes_burst),
            operations: rate(self.operations_per_second, self.operations_burst),
        }
    }
}
