//! What a guest says about its memory (virtio 1.2, section 5.5.6.3).

/// Size of one statistic, in bytes: a tag of 16 bits and a value of 64, without a gap.
const ENTRY_BYTES: usize = 10;

/// Most bytes of statistics looked at: room for more tags than any driver knows.
pub const MAX_BYTES: usize = 64 * ENTRY_BYTES;

/// What a guest says about its memory; `None` for what it does not say. A guest may say anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Swapped in since it started, in bytes.
    pub swapped_in_bytes: Option<u64>,
    /// Swapped out since it started, in bytes.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that had to wait for a disk.
    pub major_faults: Option<u64>,
    /// Page faults that had not.
    pub minor_faults: Option<u64>,
    /// Memory it uses for nothing, in bytes.
    pub free_bytes: Option<u64>,
    /// Memory it has, in bytes, without what is in the balloon.
    pub total_bytes: Option<u64>,
    /// Memory a new program could get without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// Memory that holds files and can be reclaimed at once, in bytes.
    pub cached_bytes: Option<u64>,
    /// Huge pages that were handed out.
    pub huge_pages: Option<u64>,
    /// Huge pages that could not be handed out.
    pub huge_page_failures: Option<u64>,
}

impl Statistics {
    /// Reads what the driver wrote. Tags nobody knows and half an entry at the end are passed over.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Statistics::default();
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let (tag, value) = entry.split_at(2);
            let tag = u16::from_le_bytes(tag.try_into().expect("split at 2"));
            let value = u64::from_le_bytes(value.try_into().expect("10 less 2"));
            let field = match tag {
                0 => &mut statistics.swapped_in_bytes,
                1 => &mut statistics.swapped_out_bytes,
                2 => &mut statistics.major_faults,
                3 => &mut statistics.minor_faults,
                4 => &mut statistics.free_bytes,
                5 => &mut statistics.total_bytes,
                6 => &mut statistics.available_bytes,
                7 => &mut statistics.cached_bytes,
                8 => &mut statistics.huge_pages,
                9 => &mut statistics.huge_page_failures,
                _ => continue,
            };
            *field = Some(value);
        }
        statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_tags_and_half_an_entry_are_passed_over() {
        let mut bytes = vec![4, 0, 1, 2, 0, 0, 0, 0, 0, 0];
        bytes.extend([0xff, 0xff, 9, 9, 9, 9, 9, 9, 9, 9]);
        bytes.extend([9, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([5, 0, 1]);

        let statistics = Statistics::parse(&bytes);

        let expected = Statistics {
            free_bytes: Some(0x201),
            huge_page_failures: Some(7),
            ..Statistics::default()
        };
        assert_eq!(statistics, expected);
    }
}
