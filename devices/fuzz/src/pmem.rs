//! The persistent memory device: flushes, right and wrong.

use devices::virtio::pmem::Pmem;

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, broken_rings, chain, input, words};

/// Plays `data`, and then flushes.
pub fn run(data: &[u8]) {
    let mut guest = Guest::new(Pmem::new(4 << 20, 2 << 20), Box::new(|_, _| ()));
    guest.play(data);
    assert_eq!(guest.ask(0, &words(&[0]), 4), Some(vec![0; 4]), "a flush succeeds");
}

/// A flush, something else, too little, and no room.
pub fn seeds() -> Vec<Seed> {
    let (flush, unknown) = (words(&[0]), words(&[7]));
    let steps = [
        START,
        chain(0, &flush, 4),
        chain(0, &unknown, 4),
        chain(0, &flush[..2], 4),
        chain(0, &flush, 0),
        chain(0, b"", u32::MAX),
    ];
    vec![("flushes", input(&steps)), ("broken_rings", input(&broken_rings(0)))]
}
