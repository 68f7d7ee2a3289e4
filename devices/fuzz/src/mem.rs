//! Memory that is plugged in and out: requests about blocks.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use devices::virtio::mem::{BLOCK_BYTES, Backing, Host, Mem};

use crate::Seed;
use crate::guest::{Guest, REGIONS, memory};
use crate::script::{START, Step, broken_rings, input, request, words};

/// Requests (virtio 1.2, section 5.15.6).
const PLUG: u32 = 0;
const UNPLUG: u32 = 1;
const UNPLUG_ALL: u32 = 2;
const STATE: u32 = 3;

/// Bytes of an answer.
const ANSWER_BYTES: u32 = 10;

/// Has memory for every block.
struct Always;

impl Backing for Always {
    fn plug(&mut self, _range: &Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn unplug(&mut self, _range: &Range<u64>) -> io::Result<()> {
        Ok(())
    }
}

/// A guest with two blocks. The script's host says how much of it may be plugged.
fn guest() -> Guest {
    let memory = memory();
    let [.., (start, bytes)] = REGIONS;
    let mem = Mem::new(start..start + bytes as u64, Box::new(Always));
    let device = Arc::new(Mutex::new(mem));
    let host = Host::of(device.clone());
    let act = move |what: u8, _: &[u8]| {
        // More than there is is refused.
        let _ = host.request_mib(what.into());
        assert!(host.plugged_mib() << 20 <= bytes as u64, "more is plugged than there is");
    };
    Guest::with_memory(memory, device, Box::new(act))
}

/// Plays `data`, and then unplugs all.
pub fn run(data: &[u8]) {
    let mut guest = guest();
    guest.play(data);
    let answer = guest.ask(0, &words(&[UNPLUG_ALL, 0, 0, 0, 0, 0]), ANSWER_BYTES);
    assert_eq!(answer, Some(vec![0; ANSWER_BYTES as usize]), "nothing is plugged");
}

/// Requests about blocks that are there, that are not, and about none.
pub fn seeds() -> Vec<Seed> {
    let ask = |kind, address: u64, count| {
        let [low, high] = [address & 0xffff_ffff, address >> 32];
        let half = |value| u32::try_from(value).expect("half an address");
        words(&[kind, 0, half(low), half(high), count, 0])
    };
    let [.., (start, _)] = REGIONS;
    let good = [
        ask(STATE, start, 2),
        ask(PLUG, start, 1),
        ask(STATE, start, 2),
        ask(PLUG, start + BLOCK_BYTES, 1),
        ask(UNPLUG, start, 2),
        ask(UNPLUG_ALL, 0, 0),
    ];
    let bad = [
        ask(PLUG, start, 2),
        ask(PLUG, start, 0),
        ask(PLUG, start + 4096, 1),
        ask(PLUG, start - BLOCK_BYTES, 1),
        ask(PLUG, u64::MAX, 0xffff),
        ask(UNPLUG, start, 0xffff),
        ask(99, start, 1),
        words(&[PLUG, 0, 0]),
    ];
    let session = |requests: &[Vec<u8>]| {
        let asked = requests.iter().map(|bytes| request(0, 8, bytes, [ANSWER_BYTES, 0]));
        let begin = [START, Step::Host { what: 4, bytes: &[] }];
        input(&begin.into_iter().chain(asked).collect::<Vec<_>>())
    };
    vec![
        ("good", session(&good)),
        ("bad", session(&bad)),
        ("broken_rings", input(&broken_rings(0))),
    ]
}
