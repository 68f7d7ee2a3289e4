//! What a driver reads about a block device before it uses it: features and configuration space; pure.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::request::{
    Limits, MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS,
    SECTOR_BYTES,
};

/// Size of each queue, in descriptors.
pub const QUEUE_SIZE: u16 = 128;

/// Buffers of a request beside its header and its status: what a direct chain has room for.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Discards of less than a page free nothing in most file systems; in sectors.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;

/// Bytes of the configuration space up to and with `write_zeroes_may_unmap` (virtio 1.2, section
/// 5.2.4), filled up to a whole word.
pub const CONFIG_BYTES: usize = 60;

/// What the driver is told about a disk.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// Its size, and whether it may be written.
    pub limits: Limits,
    /// Queues the driver may use.
    pub queues: u16,
    /// What requests should be multiples of, in bytes; a power of two of at least a sector.
    pub block_bytes: u64,
    /// Whether zeros may be written by giving storage back.
    pub zeroes_may_unmap: bool,
}

impl Facts {
    /// The feature bits of the device (virtio 1.2, section 5.2.3).
    pub fn features(&self) -> u64 {
        let when = |condition: bool, feature: u32| u64::from(condition) << feature;
        let writable = !self.limits.read_only;
        1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | when(!writable, VIRTIO_BLK_F_RO)
            | when(writable, VIRTIO_BLK_F_DISCARD)
            | when(writable, VIRTIO_BLK_F_WRITE_ZEROES)
            | when(self.queues > 1, VIRTIO_BLK_F_MQ)
            | when(self.block_bytes > SECTOR_BYTES, VIRTIO_BLK_F_TOPOLOGY)
    }

    /// The configuration space (virtio 1.2, section 5.2.4). Fields whose feature is not offered are
    /// not looked at.
    pub fn space(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let sectors_of_block = self.block_bytes / SECTOR_BYTES;
        put(0, &self.limits.sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &SECTOR_BYTES.to_le_bytes()[..4]); // blk_size
        put(24, &sectors_of_block.ilog2().to_le_bytes()[..1]); // physical_block_exp
        put(26, &sectors_of_block.to_le_bytes()[..2]); // min_io_size
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &(MAX_SEGMENTS as u64).to_le_bytes()[..4]);
        put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &(MAX_ZEROES_SEGMENTS as u64).to_le_bytes()[..4]);
        put(56, &[u8::from(self.zeroes_may_unmap)]);
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts {
        limits: Limits { sectors: 8, read_only: false },
        queues: 1,
        block_bytes: SECTOR_BYTES,
        zeroes_may_unmap: true,
    };

    fn has(facts: Facts, feature: u32) -> bool {
        facts.features() & 1 << feature != 0
    }

    fn word(facts: Facts, offset: usize) -> u32 {
        u32::from_le_bytes(*facts.space()[offset..].first_chunk().unwrap())
    }

    #[test]
    fn the_space_has_capacity_segments_and_block_size() {
        assert_eq!([word(FACTS, 0), word(FACTS, 4)], [8, 0]);
        assert_eq!(word(FACTS, 12), 126);
        assert_eq!(word(FACTS, 20), 512);
    }

    #[test]
    fn the_space_has_the_limits_of_discard_and_write_zeroes() {
        let fields = [36, 40, 44, 48, 52, 56].map(|offset| word(FACTS, offset));
        assert_eq!(fields, [1 << 17, 16, 8, 1 << 14, 1, 1]);
    }

    #[test]
    fn a_read_only_disk_says_so_and_offers_no_change() {
        let limits = Limits { read_only: true, ..FACTS.limits };
        let changes = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];

        assert!(changes.iter().all(|&feature| has(FACTS, feature)));
        assert!(!changes.iter().any(|&feature| has(Facts { limits, ..FACTS }, feature)));
        assert!(!has(FACTS, VIRTIO_BLK_F_RO) && has(Facts { limits, ..FACTS }, VIRTIO_BLK_F_RO));
    }

    #[test]
    fn several_queues_are_offered_and_one_is_not() {
        let several = Facts { queues: 4, ..FACTS };

        assert!(!has(FACTS, VIRTIO_BLK_F_MQ));
        assert!(has(several, VIRTIO_BLK_F_MQ));
        assert_eq!(several.space()[34..36], [4, 0]);
    }

    #[test]
    fn blocks_larger_than_a_sector_are_shown_as_physical_ones() {
        let large = Facts { block_bytes: 4096, ..FACTS };

        assert!(!has(FACTS, VIRTIO_BLK_F_TOPOLOGY));
        assert!(has(large, VIRTIO_BLK_F_TOPOLOGY));
        assert_eq!(large.space()[24..28], [3, 0, 8, 0]);
        assert_eq!(word(large, 20), 512);
    }
}
