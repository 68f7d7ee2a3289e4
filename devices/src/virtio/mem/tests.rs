//! A memory device between a driver that plugs and a host that says how much.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::virtio::testing::{Driver, assert_shown, config_page, memory};

/// Where the blocks are.
const START: u64 = 2 << 20;

const DONE: u16 = 0;
const DENIED: u16 = 1;
const BUSY: u16 = 2;
const WRONG: u16 = 3;

/// Says what it was asked for, or refuses it.
struct Ledger {
    tell: Sender<Change>,
    refuses: Arc<AtomicBool>,
}

#[derive(Debug, PartialEq, Eq)]
enum Change {
    Plug(Range<u64>),
    Unplug(Range<u64>),
}

impl Ledger {
    /// One that refuses what is asked for once it is told to, and what it says.
    fn new() -> (Box<Self>, Receiver<Change>, Arc<AtomicBool>) {
        let ((tell, told), refuses) = (channel(), Arc::new(AtomicBool::new(false)));
        (Box::new(Ledger { tell, refuses: refuses.clone() }), told, refuses)
    }

    fn take(&self, change: Change) -> io::Result<()> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        // Most tests do not listen.
        let _ = self.tell.send(change);
        Ok(())
    }
}

impl Backing for Ledger {
    fn plug(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.take(Change::Plug(range.clone()))
    }

    fn unplug(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.take(Change::Unplug(range.clone()))
    }
}

/// An idle device of `blocks` blocks.
fn idle(blocks: u64) -> Mem {
    Mem::new(START..START + blocks * BLOCK_BYTES, Ledger::new().0)
}

/// A device of one block, of which `requested_mib` MiB shall be plugged.
fn active(driver: &Driver<'_>, requested_mib: u32) -> Host {
    activated(driver, requested_mib, idle(1))
}

fn activated(driver: &Driver<'_>, requested_mib: u32, device: Mem) -> Host {
    let host = Host::of(Arc::new(Mutex::new(device)));
    host.request_mib(requested_mib).unwrap();
    host.lock().activate(driver.activation()).unwrap();
    host
}

fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// `(answer, state)` of the device to a request about `count` blocks from `address` on.
fn ask(driver: &Driver<'_>, host: &Host, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let nth = driver.used().len();
    driver.offer(0, &[&request(kind, address, count)], &[10]);
    host.lock().queue_ready(0).unwrap();
    let answer = driver.written(0, nth);
    assert_eq!(answer.len(), ANSWER_BYTES);
    let half = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
    (half(0), half(8))
}

#[test]
fn a_block_that_the_host_cannot_change_stays_as_it_is() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let (backing, _, refuses) = Ledger::new();
    let host = activated(&driver, 2, Mem::new(START..START + BLOCK_BYTES, backing));

    refuses.store(true, Ordering::Relaxed);
    assert_eq!(ask(&driver, &host, PLUG, START, 1), (BUSY, 0));
    assert_eq!(host.plugged_mib(), 0);

    refuses.store(false, Ordering::Relaxed);
    assert_eq!(ask(&driver, &host, PLUG, START, 1), (DONE, 0));
    refuses.store(true, Ordering::Relaxed);
    for kind in [UNPLUG, UNPLUG_ALL] {
        assert_eq!(ask(&driver, &host, kind, START, 1), (BUSY, 0));
        assert_eq!(host.plugged_mib(), 2);
    }
}

#[test]
fn what_was_plugged_is_memory_when_a_machine_goes_on() {
    let mut old = idle(4);
    old.blocks.set(&(1..3), true);
    let (backing, told, _) = Ledger::new();
    let mut new = Mem::new(START..START + 4 * BLOCK_BYTES, backing);

    new.restore(&old.save()).unwrap();

    let plugged = START + BLOCK_BYTES..START + 3 * BLOCK_BYTES;
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [Change::Plug(plugged)]);
}

#[test]
fn a_block_is_plugged_and_unplugged() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 2);

    assert_eq!(ask(&driver, &host, STATE, START, 1), (DONE, 1));
    assert_eq!(ask(&driver, &host, PLUG, START, 1), (DONE, 0));
    assert_eq!(ask(&driver, &host, STATE, START, 1), (DONE, 0));
    assert_eq!(host.plugged_mib(), 2);
    assert_eq!(ask(&driver, &host, UNPLUG, START, 1), (DONE, 0));
    assert_eq!(host.plugged_mib(), 0);
}

#[test]
fn more_than_the_host_wants_is_denied() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 0);

    assert_eq!(ask(&driver, &host, PLUG, START, 1), (DENIED, 0));
    assert_eq!(host.plugged_mib(), 0);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 2);

    for (kind, address, count) in [
        (PLUG, START, 2),
        (PLUG, START, 0),
        (PLUG, START + 4096, 1),
        (PLUG, 0, 1),
        (PLUG, u64::MAX, u16::MAX),
        (UNPLUG, START, 1),
        (STATE, START, 2),
        (4, START, 1),
    ] {
        assert_eq!(ask(&driver, &host, kind, address, count), (WRONG, 0));
    }
    ask(&driver, &host, PLUG, START, 1);
    assert_eq!(ask(&driver, &host, PLUG, START, 1), (WRONG, 0));
}

#[test]
fn unplugged_memory_goes_back_to_the_host() {
    for kind in [UNPLUG, UNPLUG_ALL] {
        let memory = memory();
        let driver = Driver::new(&memory);
        let (backing, told, _) = Ledger::new();
        let block = START..START + BLOCK_BYTES;
        let host = activated(&driver, 2, Mem::new(block.clone(), backing));

        for request in [UNPLUG_ALL, PLUG, kind, UNPLUG_ALL] {
            assert_eq!(ask(&driver, &host, request, START, 1), (DONE, 0));
        }

        let changes = [Change::Plug(block.clone()), Change::Unplug(block)];
        assert_eq!(told.try_iter().collect::<Vec<_>>(), changes);
        assert_eq!(host.plugged_mib(), 0);
    }
}

#[test]
fn nothing_happens_without_room_for_the_answer() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 2);

    driver.offer(0, &[&request(PLUG, START, 1)], &[9]);
    driver.offer(0, &[&request(PLUG, START, 1)], &[]);
    driver.offer_descriptors(0, &[Descriptor::new(1 << 40, 24, 0, 0)]);
    host.lock().queue_ready(0).unwrap();

    assert_eq!(driver.used().iter().map(|(_, written)| written).sum::<u32>(), 0);
    assert_eq!(driver.used().len(), 3);
    assert_eq!(host.plugged_mib(), 0);
}

#[test]
fn half_a_request_is_refused() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 2);

    driver.offer(0, &[&[0; 23]], &[10]);
    host.lock().queue_ready(0).unwrap();

    assert_eq!(driver.written(0, 0), Answer::Wrong.bytes());
}

#[test]
fn a_new_request_of_the_host_is_announced() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 0);

    host.request_mib(2).unwrap();

    let mut config = [0; 56];
    host.lock().read_config(0, &mut config);
    let fields: Vec<_> =
        config.chunks(8).map(|field| u64::from_le_bytes(field.try_into().unwrap())).collect();
    assert_eq!(fields, [BLOCK_BYTES, 0, START, BLOCK_BYTES, BLOCK_BYTES, 0, 2 << 20]);
    assert_eq!(driver.config_changes(), 1);
}

#[test]
fn what_is_plugged_and_what_is_asked_for_is_shown_at_once() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 2);
    let page = config_page(&mut *host.lock());

    for kind in [PLUG, UNPLUG, PLUG, UNPLUG_ALL] {
        assert_eq!(ask(&driver, &host, kind, START, 1), (DONE, 0));
        assert_shown(&*host.lock(), &page);
    }
    host.request_mib(0).unwrap();

    assert_shown(&*host.lock(), &page);
}

#[test]
fn the_host_can_ask_for_whole_blocks_it_has() {
    let memory = memory();
    let host = active(&Driver::new(&memory), 0);

    assert_eq!(
        host.request_mib(4).unwrap_err().to_string(),
        "4 MiB is not a multiple of 2 up to 2"
    );
    assert!(host.request_mib(1).is_err());
    assert!(host.request_mib(u32::MAX).is_err());
}

#[test]
fn what_is_plugged_outlives_its_driver() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let host = active(&driver, 2);
    ask(&driver, &host, PLUG, START, 1);

    host.lock().reset();
    driver.offer(0, &[&request(UNPLUG_ALL, 0, 0)], &[10]);
    host.lock().queue_ready(0).unwrap();

    assert_eq!(host.plugged_mib(), 2);
}

#[test]
fn a_device_built_anew_knows_what_is_plugged() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let old = active(&driver, 2);
    assert_eq!(ask(&driver, &old, PLUG, START, 1), (DONE, 0));

    let new = Host::of(Arc::new(Mutex::new(idle(1))));
    driver.hand_over(0, &mut *old.lock(), &mut *new.lock());

    assert_eq!(new.plugged_mib(), 2);
    assert_eq!(ask(&driver, &new, STATE, START, 1), (DONE, 0));
    assert_eq!(ask(&driver, &new, UNPLUG, START, 1), (DONE, 0));
}

#[test]
fn the_state_of_a_larger_device_is_refused() {
    let state = idle(65).save();

    assert!(matches!(idle(1).restore(&state), Err(RestoreError::Other { .. })));
}
