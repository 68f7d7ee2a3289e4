//! Registers of 32 bits that hold one half of something longer.

/// Where the 32-bit word number `select` of a feature set starts, if it has one.
pub(super) fn word_shift(select: u32) -> Option<u32> {
    matches!(select, 0 | 1).then(|| select * u32::BITS)
}

#[expect(clippy::cast_possible_truncation, reason = "one word of the value is what is wanted")]
pub(super) fn word(value: u64, select: u32) -> u32 {
    word_shift(select).map_or(0, |shift| (value >> shift) as u32)
}

pub(super) fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

pub(super) fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}
