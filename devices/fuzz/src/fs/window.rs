//! The window of the file system device: files that are mapped in it, and buffers that lie there.

use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use devices::virtio::fs::{SLOT_BYTES, Window};

use super::{
    COPY_FILE_RANGE, DESTROY, FORGET, LOOKUP, OPEN, READ, REQUESTS, SETATTR, SHARE, UNLINK, WINDOW,
    WRITE, fuse, init,
};
use crate::guest::{HostEnd, REGIONS};
use crate::script::{self, QUIET, Step, input, request, variant, words};

/// Operations (linux/fuse.h).
const SETUPMAPPING: u32 = 48;
const REMOVEMAPPING: u32 = 49;

/// Where the guest has its window, right behind its memory, and its size in bytes.
pub(super) const START: u64 = REGIONS[2].0 + REGIONS[2].1 as u64;
pub(super) const BYTES: u64 = 2 * SLOT_BYTES;

/// Most mappings of the process in a window: two for each slot.
const MOST_MAPPINGS: usize = 4;

/// What the host does, as a script says it: it gives the file `a` another length, which follows, or puts
/// zeros behind the ends of files, as for a processor that cannot go on.
const LENGTH: u8 = 0;
const PATCH: u8 = 1;

/// What others do on the host.
pub(super) fn host(window: Option<Arc<Window>>) -> HostEnd {
    // The guest may put something else in its place.
    let file = File::options().write(true).open(Path::new(SHARE).join("a")).expect("it is there");
    Box::new(move |what, bytes| {
        match (what, bytes, &window) {
            (LENGTH, &[low, middle, high, ..], _) => {
                let length = u32::from_le_bytes([low, middle, high, 0]);
                file.set_len(length.into()).expect("a file of any length has room");
            }
            (PATCH, _, Some(window)) => {
                window.patch();
            }
            _ => {}
        }
        let mapped = window.as_ref().map_or(Vec::new(), |window| mappings(window));
        assert!(mapped.len() <= MOST_MAPPINGS, "too much is mapped: {mapped:#?}");
    })
}

/// Mappings of this process that lie in `window` or beside it, as /proc shows them.
pub(super) fn mappings(window: &Window) -> Vec<String> {
    let start = window.address() as u64;
    let all = fs::read_to_string("/proc/self/maps").expect("it is mounted");
    let lies = |line: &&str| {
        let place = line.split_once(' ').and_then(|(place, _)| place.split_once('-'));
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        place.and_then(|(from, to)| Some(number(from)?..number(to)?)).is_some_and(
            |Range { start: from, end: to }| from < start + window.bytes() && to > start,
        )
    };
    all.lines().filter(lies).map(str::to_owned).collect()
}

/// A guest with a window that mounts the directory, and has some of its buffers there.
struct Mapping {
    script: Vec<u8>,
    /// Number of the next descriptor.
    next: u16,
}

/// Where a chain has its buffers: for the device to read, with the data of a write as the second, and to
/// fill, the header of the answer and its data.
const ARGUMENTS: u16 = 1;
const HEAD_OF_ANSWER: u16 = 2;
const DATA: u16 = 3;

impl Mapping {
    fn new() -> Self {
        let mut new = Mapping { script: variant(WINDOW, &[script::START]), next: 0 };
        new.ask(&init());
        for (parent, name) in [(1, b"a\0"), (1, b"b\0"), (3, b"c\0")] {
            new.ask(&fuse(LOOKUP, parent, name));
        }
        new
    }

    /// Sends a request that lies in memory.
    fn ask(&mut self, bytes: &[u8]) {
        self.next += if bytes.len() > 40 { 4 } else { 3 };
        self.script.extend(input(&[request(REQUESTS, 40, bytes, [16, 4096])]));
    }

    /// Sends a request, cut after `cut` bytes, whose buffer number `nth` is `place`.
    fn ask_at(&mut self, bytes: &[u8], cut: u16, nth: u16, place: Range<u64>) {
        let index = self.next + nth;
        let more = if nth == DATA { 0 } else { 1 };
        let flags = more | if nth < HEAD_OF_ANSWER { 0 } else { 2 };
        let length = u32::try_from(place.end - place.start).expect("a small buffer");
        let (queue, address, next) = (REQUESTS, place.start, index + 1);
        self.next += 4;
        self.script.extend(input(&[
            Step::Chain { queue, how: QUIET, cut, readable: bytes, writable: [16, 4096] },
            Step::Descriptor { queue, index, address, length, flags, next },
            Step::Kick { queue },
        ]));
    }

    fn host(&mut self, what: u8, bytes: &[u8]) {
        self.script.extend(input(&[Step::Host { what, bytes }]));
    }
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Maps a file at `place` in the window, to read and write.
fn map(node: u32, offset: u64, bytes: u64, place: u64) -> Vec<u8> {
    fuse(SETUPMAPPING, node, &longs(&[0, offset, bytes, 3, place]))
}

fn unmap(place: u64, bytes: u64) -> Vec<u8> {
    fuse(REMOVEMAPPING, 1, &[words(&[1]), longs(&[place, bytes])].concat())
}

/// `size` bytes of the file `node`, from its beginning on.
fn read(node: u32, handle: u64, size: u32) -> Vec<u8> {
    fuse(READ, node, &[longs(&[handle, 0]), words(&[size, 0, 0, 0, 0, 0])].concat())
}

/// The same with bytes to be written.
fn write(node: u32, handle: u64, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).expect("a short write");
    let arguments = [longs(&[handle, 0]), words(&[size, 0, 0, 0, 0, 0])].concat();
    fuse(WRITE, node, &[&arguments, bytes].concat())
}

/// Where the data of a write is cut off from what comes before.
const BEFORE_DATA: u16 = 80;

/// A file that is mapped is written to another one and read to.
pub(super) fn data() -> Vec<u8> {
    let mut guest = Mapping::new();
    guest.ask(&fuse(OPEN, 2, &words(&[2, 0])));
    guest.ask(&fuse(OPEN, 4, &words(&[2, 0])));
    guest.ask(&map(2, 0, SLOT_BYTES, 0));
    let places = [
        START..START + 64,
        // Beyond the file, in the next slot and across its beginning, across both ends of the window.
        START + (1 << 20)..START + (1 << 20) + 64,
        START + SLOT_BYTES..START + SLOT_BYTES + 64,
        START + SLOT_BYTES - 8..START + SLOT_BYTES + 56,
        START - 8..START + 56,
        START + BYTES - 8..START + BYTES + 56,
    ];
    for place in places {
        guest.ask_at(&write(4, 2, &[1; 64]), BEFORE_DATA, ARGUMENTS, place.clone());
        guest.ask_at(&read(2, 1, 64), 40, DATA, place);
    }
    guest.ask(&map(4, 0, SLOT_BYTES, 0));
    guest.ask(&map(2, 0, BYTES, 0));
    guest.ask_at(&read(4, 2, 64), 40, DATA, START..START + 64);
    guest.ask(&unmap(0, SLOT_BYTES));
    guest.ask(&unmap(0, BYTES));
    guest.ask(&fuse(COPY_FILE_RANGE, 2, &longs(&[0, 0, 4, 0, 0, 64, 0])));
    guest.host(PATCH, b"");
    guest.script
}

/// Headers, arguments, and the head of an answer lie where a file is, and where nothing is.
pub(super) fn headers() -> Vec<u8> {
    let mut guest = Mapping::new();
    guest.ask(&fuse(OPEN, 2, &words(&[2, 0])));
    guest.ask(&map(2, 0, SLOT_BYTES, 0));
    for start in [START, START + SLOT_BYTES, START - 8] {
        for (nth, bytes) in [(0, 40), (ARGUMENTS, 40), (HEAD_OF_ANSWER, 16), (DATA, 4096)] {
            guest.ask_at(&read(2, 1, 64), 40, nth, start..start + bytes);
            guest.ask_at(&fuse(LOOKUP, 1, b"a\0"), 40, nth, start..start + bytes);
        }
    }
    guest.script
}

/// A file that is mapped becomes shorter and longer, by the host and by the guest, while its data moves.
pub(super) fn lengths() -> Vec<u8> {
    let mut guest = Mapping::new();
    guest.ask(&fuse(OPEN, 2, &words(&[2, 0])));
    guest.ask(&fuse(OPEN, 4, &words(&[2, 0])));
    guest.ask(&map(2, 0, BYTES, 0));
    let data = START..START + 64;
    for length in [[0; 3], [0, 0x10, 0], [0, 0, 0x30], [0xff; 3]] {
        guest.host(LENGTH, &length);
        guest.ask_at(&write(4, 2, &[1; 64]), BEFORE_DATA, ARGUMENTS, data.clone());
        guest.host(PATCH, b"");
        guest.host(PATCH, b"");
        guest.ask_at(&read(4, 2, 64), 40, DATA, data.clone());
    }
    // FATTR_SIZE (linux/fuse.h): one byte is left, then three slots.
    for size in [1, 3 * SLOT_BYTES] {
        let attributes = longs(&[8, 0, size, 0, 0, 0, 0, 0, 0, 0, 0]);
        guest.ask(&fuse(SETATTR, 2, &attributes));
        guest.host(PATCH, b"");
    }
    guest.ask(&fuse(DESTROY, 0, b""));
    guest.script
}

/// Mappings of what cannot be mapped, outside, in part, and of what is gone.
pub(super) fn lies() -> Vec<Vec<u8>> {
    vec![
        fuse(LOOKUP, 1, b"a\0"),
        fuse(LOOKUP, 1, b"l\0"),
        fuse(LOOKUP, 1, b"p\0"),
        map(2, 0, SLOT_BYTES, BYTES),
        map(2, 0, u64::MAX, 0),
        map(2, u64::MAX - SLOT_BYTES + 1, SLOT_BYTES, 0),
        map(2, 1 << 62, SLOT_BYTES, 0),
        map(2, 0, 4096, 0),
        map(2, 4096, SLOT_BYTES, 0),
        map(1, 0, SLOT_BYTES, 0),
        map(5, 0, SLOT_BYTES, 0),
        map(6, 0, SLOT_BYTES, 0),
        unmap(0, SLOT_BYTES),
        unmap(u64::MAX, u64::MAX),
        unmap(4096, 4096),
        fuse(REMOVEMAPPING, 1, &words(&[u32::MAX])),
        fuse(REMOVEMAPPING, 1, &words(&[3])),
        map(2, 0, SLOT_BYTES, SLOT_BYTES),
        fuse(UNLINK, 1, b"a\0"),
        fuse(FORGET, 2, &longs(&[u64::MAX])),
        map(2, 0, SLOT_BYTES, 0),
        unmap(SLOT_BYTES, SLOT_BYTES),
    ]
}
