//! The memory balloon: page numbers, reports, hints and statistics.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::virtio::balloon::{Balloon, Host, Offer};

use crate::Seed;
use crate::guest::{Guest, memory};
use crate::script::{START, Step, broken_rings, chain, request, variant, words};

/// What the first byte of an input chooses.
const STATISTICS: u8 = 1;
const HINTS: u8 = 2;
const REPORTS: u8 = 4;
const ALL: u8 = 7;

/// Queues of a balloon that offers everything (virtio 1.2, section 5.5.2).
const INFLATE: u8 = 0;
const DEFLATE: u8 = 1;
const STATISTICS_QUEUE: u8 = 2;
const HINT_QUEUE: u8 = 3;
const REPORT_QUEUE: u8 = 4;

/// Where the configuration space has the command of the round of hints, and the poison.
const POISON: u16 = 0x100 + 12;

/// The number of the first round of hints.
const FIRST_ROUND: u32 = 2;

/// A guest with a balloon. The script's host does by `what` all that a host can.
fn guest(variant: u8) -> Guest {
    let offer = Offer {
        deflate_on_oom: true,
        statistics: variant & STATISTICS != 0,
        free_page_hint: variant & HINTS != 0,
        page_reporting: variant & REPORTS != 0,
    };
    let device = Arc::new(Mutex::new(Balloon::new(offer, 1)));
    let host = Host::of(device.clone());
    let act = move |what: u8, bytes: &[u8]| match what % 4 {
        0 => host.set_target_mib(bytes.first().map_or(u32::MAX, |&target| target.into())),
        1 => _ = host.ask_for_free_pages(),
        // A queue that is broken is an error, which the driver was told of.
        2 => _ = host.statistics(Duration::ZERO),
        _ => _ = (host.target_mib(), host.size_mib(), host.given_back_bytes()),
    };
    Guest::with_memory(memory(), device, Box::new(act))
}

/// Plays `data`, whose first byte chooses what is offered, and then inflates by a page.
pub fn run(data: &[u8]) {
    let Some((&variant, data)) = data.split_first() else { return };
    let mut guest = guest(variant);
    guest.play(data);
    assert_eq!(guest.ask(INFLATE, &words(&[0x200]), 0), Some(Vec::new()), "a page is taken");
}

/// Every way to give memory back, with memory that is there and that is not.
pub fn seeds() -> Vec<Seed> {
    let pages = words(&[0x200, 0x201, 0x203, 0x203]);
    let nowhere = words(&[u32::MAX, 0x150, 0, 0xfff]);
    let many = vec![0xff; 2000];
    let inflate = [
        START,
        chain(INFLATE, &pages, 0),
        chain(INFLATE, &nowhere, 0),
        chain(INFLATE, &many, 0),
        chain(INFLATE, &pages[..7], 8),
        chain(DEFLATE, &pages, 0),
        Step::WriteBytes { offset: 0x104, bytes: &[4, 0, 0, 0] },
        Step::Host { what: 0, bytes: &[2] },
        Step::Host { what: 3, bytes: &[] },
    ];
    let answer = [0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 1, 1, 1, 1, 1, 1, 1];
    let statistics = [
        START,
        chain(STATISTICS_QUEUE, &answer, 0),
        Step::Host { what: 2, bytes: &[] },
        chain(STATISTICS_QUEUE, &answer[..13], 0),
        chain(STATISTICS_QUEUE, &answer, 0),
    ];
    let (round, stop) = (words(&[FIRST_ROUND]), words(&[0]));
    let hints = [
        START,
        Step::Host { what: 1, bytes: &[] },
        chain(HINT_QUEUE, &round, 0),
        chain(HINT_QUEUE, b"", 0x1_0000),
        request(HINT_QUEUE, 0, b"", [4096, u32::MAX]),
        chain(HINT_QUEUE, &stop, 0),
        chain(HINT_QUEUE, b"", 4096),
    ];
    let reports = [
        START,
        request(REPORT_QUEUE, 0, b"", [0x1_0000, 0x1_0000]),
        request(REPORT_QUEUE, 0, b"", [1, u32::MAX]),
        Step::WriteBytes { offset: POISON, bytes: &[0xaa; 4] },
        chain(REPORT_QUEUE, b"", 0x1_0000),
    ];
    vec![
        ("inflate", variant(ALL, &inflate)),
        ("inflate_only", variant(0, &inflate)),
        ("statistics", variant(ALL, &statistics)),
        ("hints", variant(ALL, &hints)),
        ("reports", variant(ALL, &reports)),
        ("broken_rings", variant(0, &broken_rings(INFLATE))),
        ("broken_statistics_rings", variant(STATISTICS, &broken_rings(STATISTICS_QUEUE))),
        ("broken_hint_rings", variant(ALL, &broken_rings(HINT_QUEUE))),
    ]
}
