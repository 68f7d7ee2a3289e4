//! The block device: request headers, ranges, statuses.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use devices::virtio::block::{Access, Block, Disk, Ring};
use devices::virtio::rate_limit::{Rate, RateLimiter, RateLimits};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, Step, broken_rings, request, variant, words};

/// Size of the disk, in bytes.
const DISK_BYTES: u64 = 64 << 10;

/// What the first byte of an input chooses.
const READ_ONLY: u8 = 1;
const TWO_QUEUES: u8 = 2;
const RING: u8 = 4;
const LIMITED: u8 = 8;

/// Request types (virtio 1.2, section 5.2.6).
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// A guest with a disk, and the file that is the disk.
pub(crate) fn guest(variant: u8) -> (Guest, File) {
    let file = File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.set_len(DISK_BYTES).expect("a small file");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let access = Access { read_only: variant & READ_ONLY != 0, direct: false };
    let disk = Disk::open(&path, access).expect("the file is there");
    let limiter = if variant & LIMITED == 0 { RateLimiter::unlimited() } else { slow() };
    // A host without io_uring takes the other way.
    let ring = (variant & RING != 0).then(|| Ring::open().ok()).flatten();
    let queues = if variant & TWO_QUEUES == 0 { 1 } else { 2 };
    let block = Block::new(disk, "disk", queues, limiter, ring);
    (Guest::new(block, Box::new(|_, _| ())), file)
}

/// A few requests, and then one in a long time.
fn slow() -> RateLimiter {
    let number = |value| NonZeroU64::new(value).expect("it is not zero");
    let rate = |burst| Some(Rate { per_second: number(1), burst: number(burst) });
    let limits = RateLimits { bytes: rate(4096), operations: rate(8) };
    RateLimiter::new(limits).expect("a timer")
}

/// Plays `data`, whose first byte chooses the disk, and then reads a sector.
pub fn run(data: &[u8]) {
    let Some((&variant, data)) = data.split_first() else { return };
    let (mut guest, file) = guest(variant);
    guest.play(data);
    let bytes = file.metadata().expect("it is open").len();
    assert_eq!(bytes, DISK_BYTES, "the disk changed its size");
    if variant & (LIMITED | RING) == 0 {
        let answer = guest.ask(0, &words(&[READ, 0, 0, 0]), 513).expect("an answer");
        assert_eq!((answer.len(), answer.last()), (513, Some(&0)), "a sector and its status");
    }
}

/// Requests of every type, and some that lie.
pub fn seeds() -> Vec<Seed> {
    let header = |kind, sector| words(&[kind, 0, sector, 0]);
    let data = [header(WRITE, 3), vec![7; 512]].concat();
    let far = [header(WRITE, 127), vec![7; 1024]].concat();
    let crooked = [header(WRITE, 0), vec![7; 100]].concat();
    let (read, flush, id) = (header(READ, 3), header(FLUSH, 0), header(ID, 0));
    let range = |kind, sectors, flags| [header(kind, 0), words(&[8, 0, sectors, flags])].concat();
    let (discard, zeroes) = (range(DISCARD, 8, 0), range(ZEROES, 8, 1));
    let (wrong_flags, too_long) = (range(DISCARD, 8, 1), range(ZEROES, u32::MAX, 0));
    let overflow = words(&[READ, 0, u32::MAX, u32::MAX]);
    let good = [
        START,
        request(0, 16, &data, [1, 0]),
        request(0, 16, &read, [512, 1]),
        request(0, 16, &flush, [1, 0]),
        request(0, 16, &id, [20, 1]),
        request(0, 16, &discard, [1, 0]),
        request(0, 16, &zeroes, [1, 0]),
    ];
    let bad = [
        START,
        request(0, 16, &far, [1, 0]),
        request(0, 16, &crooked, [1, 0]),
        request(0, 16, &overflow, [512, 1]),
        request(0, 16, &wrong_flags, [1, 0]),
        request(0, 16, &too_long, [1, 0]),
        request(0, 5, &read[..10], [1, 0]),
        request(0, 16, &read, [0, 0]),
        request(0, 16, &id, [3, 1]),
        Step::Read { offset: 0x100, length: 64 },
    ];
    vec![
        ("good", variant(0, &good)),
        ("bad", variant(0, &bad)),
        ("read_only", variant(READ_ONLY, &good)),
        ("ring", variant(RING | TWO_QUEUES, &good)),
        ("limited", variant(LIMITED, &good)),
        ("broken_rings", variant(TWO_QUEUES, &broken_rings(1))),
    ]
}
