//! The console.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use devices::virtio::console::Console;

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, Step, broken_rings, chain, input};

/// A guest whose console types what the script's host says; nothing at all ends the typing.
pub(crate) fn guest() -> Guest {
    let (ours, mut theirs) = UnixStream::pair().expect("two descriptors");
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).expect("a socket has this mode");
    }
    let console = Console::new(Some(ours.into()), Box::new(io::sink()));
    let host = move |_, bytes: &[u8]| {
        // What does not fit is lost, and so is what comes after the end.
        let _ = theirs.write(bytes);
        if bytes.is_empty() {
            let _ = theirs.shutdown(Shutdown::Write);
        }
    };
    Guest::new(console, Box::new(host))
}

/// Plays `data`, and then prints something.
pub fn run(data: &[u8]) {
    let mut guest = guest();
    guest.play(data);
    assert_eq!(guest.ask(1, b"still here", 0), Some(Vec::new()), "what is printed is given back");
}

/// Typing and printing, in all orders.
pub fn seeds() -> Vec<Seed> {
    let typed = |bytes| Step::Host { what: 0, bytes };
    let steps = [
        START,
        chain(1, b"hello\n", 0),
        typed(b"early"),
        chain(0, b"", 3),
        chain(0, b"", 64),
        typed(b"late"),
        typed(b""),
        chain(0, b"wrong way", 0),
        chain(1, b"", 16),
    ];
    vec![
        ("typing_and_printing", input(&steps)),
        ("broken_receive_rings", input(&broken_rings(0))),
        ("broken_transmit_rings", input(&broken_rings(1))),
    ]
}
