//! The entropy device.

use std::fs::File;

use devices::virtio::rng::Rng;

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, broken_rings, chain, input};

/// A guest with an entropy device.
pub(crate) fn guest() -> Guest {
    let source = File::open("/dev/urandom").expect("every host has one");
    Guest::new(Rng::new(source), Box::new(|_, _| ()))
}

/// Plays `data`, and then asks for random bytes.
pub fn run(data: &[u8]) {
    let mut guest = guest();
    guest.play(data);
    let random = guest.ask(0, b"", 16).expect("an answer");
    assert_eq!(random.len(), 16, "a whole buffer of random bytes");
}

/// Requests small, absurd and empty.
pub fn seeds() -> Vec<Seed> {
    vec![
        (
            "requests",
            input(&[START, chain(0, b"", 64), chain(0, b"x", u32::MAX), chain(0, b"", 0)]),
        ),
        ("broken_rings", input(&broken_rings(0))),
    ]
}
