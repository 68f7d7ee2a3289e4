//! Which blocks of a memory device are plugged.

use std::ops::Range;

use super::State;

/// Size and alignment of a block, in bytes: what the host's page tables map at once.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// The blocks of a region of guest memory, one bit each.
pub struct Blocks {
    start: u64,
    count: usize,
    plugged: Vec<u64>,
    plugged_count: u64,
}

impl Blocks {
    /// The blocks of the `bytes` bytes from guest address `start` on, all unplugged.
    pub fn new(start: u64, bytes: u64) -> Self {
        let count = usize::try_from(bytes / BLOCK_BYTES).expect("the region is mapped");
        Blocks { start, count, plugged: vec![0; count.div_ceil(64)], plugged_count: 0 }
    }

    /// Guest-physical start of the region.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Size of the region, in bytes.
    pub fn bytes(&self) -> u64 {
        self.count as u64 * BLOCK_BYTES
    }

    /// How much of it is plugged, in bytes.
    pub fn plugged_bytes(&self) -> u64 {
        self.plugged_count * BLOCK_BYTES
    }

    /// The numbers of `count` blocks from guest address `address` on; `None` unless there is at least
    /// one, the address is that of a block, and all are in the region.
    pub fn find(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start)?;
        if offset % BLOCK_BYTES != 0 || count == 0 {
            return None;
        }
        let first = usize::try_from(offset / BLOCK_BYTES).ok()?;
        let end = first.checked_add(count.into())?;
        (end <= self.count).then_some(first..end)
    }

    /// The state of these blocks, of which there is at least one.
    pub fn state(&self, blocks: &Range<usize>) -> State {
        match blocks.clone().filter(|&block| self.is_plugged(block)).count() {
            0 => State::Unplugged,
            count if count == blocks.len() => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// Plugs or unplugs these blocks, all of which are in the other state.
    pub fn set(&mut self, blocks: &Range<usize>, plugged: bool) {
        for block in blocks.clone() {
            self.plugged[block / 64] ^= 1 << (block % 64);
        }
        let count = blocks.len() as u64;
        self.plugged_count =
            if plugged { self.plugged_count + count } else { self.plugged_count - count };
    }

    /// Where the plugged blocks are, neighbours together.
    pub fn plugged(&self) -> impl Iterator<Item = Range<u64>> {
        let is_edge = |block: &usize| {
            self.is_plugged_at(Some(*block)) != self.is_plugged_at(block.checked_sub(1))
        };
        let mut edges = (0..=self.count).filter(is_edge);
        let address = |block: usize| self.start + block as u64 * BLOCK_BYTES;
        std::iter::from_fn(move || Some(address(edges.next()?)..address(edges.next()?)))
    }

    /// A bit for each block, from the lowest one on.
    pub fn bits(&self) -> &[u64] {
        &self.plugged
    }

    /// Plugs the blocks whose bits are set and unplugs all others; `false`, and changes nothing, if
    /// these are not the bits of as many blocks.
    pub fn set_bits(&mut self, bits: &[u64]) -> bool {
        let past_the_end = match (bits.last(), self.count % 64) {
            (Some(last), used @ 1..) => last >> used,
            _ => 0,
        };
        if bits.len() != self.plugged.len() || past_the_end != 0 {
            return false;
        }
        self.plugged.copy_from_slice(bits);
        self.plugged_count = bits.iter().map(|word| u64::from(word.count_ones())).sum();
        true
    }

    /// Unplugs everything.
    pub fn clear(&mut self) {
        self.plugged.fill(0);
        self.plugged_count = 0;
    }

    /// Whether there is such a block, and it is plugged.
    fn is_plugged_at(&self, block: Option<usize>) -> bool {
        block.is_some_and(|block| block < self.count && self.is_plugged(block))
    }

    fn is_plugged(&self, block: usize) -> bool {
        self.plugged[block / 64] & 1 << (block % 64) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1 << 32;

    fn blocks() -> Blocks {
        Blocks::new(START, 100 * BLOCK_BYTES)
    }

    #[test]
    fn only_whole_blocks_of_the_region_are_found() {
        let blocks = blocks();
        let find = |address, count| blocks.find(address, count);

        assert_eq!(find(START + 98 * BLOCK_BYTES, 2), Some(98..100));
        assert_eq!(find(START + 98 * BLOCK_BYTES, 3), None);
        assert_eq!(find(START + 100 * BLOCK_BYTES, 1), None);
        assert_eq!(find(START - BLOCK_BYTES, 2), None);
        assert_eq!(find(START + 4096, 1), None);
        assert_eq!(find(START, 0), None);
        assert_eq!(find(u64::MAX, u16::MAX), None);
    }

    #[test]
    fn blocks_are_counted_as_they_change() {
        let mut blocks = blocks();

        blocks.set(&(60..70), true);
        blocks.set(&(64..65), false);

        assert_eq!(blocks.plugged_bytes(), 9 * BLOCK_BYTES);
        assert_eq!(blocks.state(&(60..64)), State::Plugged);
        assert_eq!(blocks.state(&(64..65)), State::Unplugged);
        assert_eq!(blocks.state(&(60..70)), State::Mixed);
    }

    #[test]
    fn plugged_neighbours_come_together() {
        let mut blocks = blocks();
        for plugged in [0..1, 3..5, 63..66, 98..100] {
            blocks.set(&plugged, true);
        }

        let plugged: Vec<_> = blocks.plugged().collect();

        let range = |from: u64, to: u64| START + from * BLOCK_BYTES..START + to * BLOCK_BYTES;
        assert_eq!(plugged, [range(0, 1), range(3, 5), range(63, 66), range(98, 100)]);
    }

    #[test]
    fn blocks_survive_as_bits() {
        let mut old = blocks();
        old.set(&(60..70), true);

        let mut new = blocks();
        assert!(new.set_bits(old.bits()));

        assert_eq!(new.plugged_bytes(), 10 * BLOCK_BYTES);
        assert_eq!(new.state(&(60..70)), State::Plugged);
    }

    #[test]
    fn bits_of_more_blocks_than_there_are_are_refused() {
        let mut blocks = blocks();

        assert!(!blocks.set_bits(&[0]));
        assert!(!blocks.set_bits(&[0, 1 << 36]));
        assert!(blocks.set_bits(&[0, 1 << 35]));
    }
}
