//! A driver's requests against a block device on a temporary file.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::request::HEADER_BYTES;
use super::*;
use crate::virtio::rate_limit::{Rate, RateLimits};
use crate::virtio::testing::{Driver, memory};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A disk of 8 sectors; sector N holds bytes of the value N.
fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    for sector in 0..8 {
        file.as_file().write_all_at(&[sector; 512], u64::from(sector) * 512).unwrap();
    }
    file
}

const READ_ONLY: Access = Access { read_only: true, direct: false };
const READ_WRITE: Access = Access { read_only: false, direct: false };

fn block(image: &NamedTempFile, access: Access) -> Block {
    of_disk(Disk::open(image.path(), access).unwrap())
}

fn of_disk(disk: Disk) -> Block {
    Block::new(disk, "the-disk", 1, RateLimiter::unlimited(), None)
}

fn active(driver: &Driver<'_>, image: &NamedTempFile, access: Access) -> Block {
    let mut block = block(image, access);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();
    block
}

fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// What the device writes in answer to one request.
fn answer(access: Access, readable: &[&[u8]], writable: &[u32]) -> Vec<u8> {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), access);

    driver.offer(0, readable, writable);
    block.queue_ready(0).unwrap();

    driver.written(0, 0)
}

#[test]
fn a_read_moves_the_sectors_and_says_ok() {
    let answer = answer(READ_WRITE, &[&header(VIRTIO_BLK_T_IN, 2)], &[1024, 1]);
    assert_eq!(answer, [vec![2; 512], vec![3; 512], vec![OK]].concat());
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let header = header(VIRTIO_BLK_T_IN, 2);
    let answer = answer(READ_WRITE, &[&header[..5], &header[5..]], &[100, 0, 413]);
    assert_eq!(answer, [vec![2; 512], vec![OK]].concat());
}

#[test]
fn a_write_reaches_the_file() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = active(&driver, &image, READ_WRITE);

    driver.offer(0, &[&header(VIRTIO_BLK_T_OUT, 7), &[0xa5; 512]], &[1]);
    block.queue_ready(0).unwrap();

    let mut sector = [0; 512];
    image.as_file().read_exact_at(&mut sector, 7 * 512).unwrap();
    assert_eq!(sector, [0xa5; 512]);
    assert_eq!(driver.written(0, 0), [OK]);
}

#[test]
fn a_write_to_a_read_only_disk_fails() {
    let answer = answer(READ_ONLY, &[&header(VIRTIO_BLK_T_OUT, 0), &[0; 512]], &[1]);
    assert_eq!(answer, [IO_ERROR]);
}

#[test]
fn a_read_past_the_end_fails_and_moves_no_bytes() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), READ_WRITE);

    driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 7)], &[1024, 1]);
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used(), [(0, 1)]);
    assert_eq!(driver.buffer(16, 1025), [vec![0; 1024], vec![IO_ERROR]].concat());
}

#[test]
fn a_disk_that_shrank_fails_reads() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = active(&driver, &image, READ_WRITE);

    image.as_file().set_len(0).unwrap();
    driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]);
    block.queue_ready(0).unwrap();

    assert_eq!(driver.buffer(16 + 512, 1), [IO_ERROR]);
}

/// The status of a request on a disk that takes writes, but has no way to make them last.
fn status_without_storage(features: u64, readable: &[&[u8]]) -> Vec<u8> {
    let memory = memory();
    let driver = Driver::new(&memory);
    let zero = File::options().read(true).write(true).open("/dev/zero").unwrap();
    let mut block = of_disk(Disk::endless(zero));
    block.activate(driver.activation_with(features)).unwrap();

    driver.offer(0, readable, &[1]);
    block.queue_ready(0).unwrap();

    driver.written(0, 0)
}

#[test]
fn a_write_of_a_driver_that_cannot_flush_lasts_when_it_is_over() {
    let write = [&header(VIRTIO_BLK_T_OUT, 0)[..], &[1; 512]];
    let flush = [&header(VIRTIO_BLK_T_FLUSH, 0)[..]];

    assert_eq!(status_without_storage(1 << VIRTIO_BLK_F_FLUSH, &flush), [IO_ERROR]);
    assert_eq!(status_without_storage(1 << VIRTIO_BLK_F_FLUSH, &write), [OK]);
    assert_eq!(status_without_storage(0, &write), [IO_ERROR]);
}

#[test]
fn what_may_take_long_leaves_the_others_their_turn() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), READ_WRITE);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN] {
        driver.offer(0, &[&header(kind, 0), &ranges(&[(1, 1, 0)])], &[1]);
    }

    block.queue_ready(0).unwrap();
    assert_eq!(driver.used().len(), 1);
    assert!(driver.kicked(0));
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used().len(), 2);
    assert!(!driver.kicked(0));
}

#[test]
fn a_flush_says_ok() {
    assert_eq!(answer(READ_WRITE, &[&header(VIRTIO_BLK_T_FLUSH, 0)], &[1]), [OK]);
}

#[test]
fn the_id_is_padded_with_zeros() {
    let answer = answer(READ_WRITE, &[&header(VIRTIO_BLK_T_GET_ID, 0)], &[20, 1]);
    assert_eq!(answer, b"the-disk\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn an_unknown_request_is_unsupported() {
    assert_eq!(answer(READ_WRITE, &[&header(99, 0)], &[1]), [UNSUPPORTED]);
}

#[test]
fn a_short_header_fails() {
    assert_eq!(answer(READ_WRITE, &[&[0; 15]], &[1]), [IO_ERROR]);
}

#[test]
fn a_chain_without_room_for_a_status_comes_back_empty() {
    assert_eq!(answer(READ_WRITE, &[&header(VIRTIO_BLK_T_IN, 0)], &[]), []);
    assert_eq!(answer(READ_WRITE, &[&header(VIRTIO_BLK_T_IN, 0)], &[0]), []);
}

#[test]
fn buffers_outside_memory_fail_where_the_driver_can_be_told() {
    const IN_MEMORY: u64 = 0x2_0000;
    const OUTSIDE: u64 = 1 << 40;
    for (header, data, status, written) in [
        (u64::MAX, IN_MEMORY, IN_MEMORY + 512, 1),
        (IN_MEMORY, OUTSIDE, IN_MEMORY + 512, 1),
        (IN_MEMORY, IN_MEMORY, OUTSIDE, 0),
    ] {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut block = active(&driver, &image(), READ_WRITE);

        driver.offer_descriptors(
            0,
            &[
                Descriptor::new(header, 16, 0, 0),
                Descriptor::new(data, 512, 2, 0),
                Descriptor::new(status, 1, 2, 0),
            ],
        );
        block.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, written)]);
        let told: u8 = memory.read_obj(GuestAddress(IN_MEMORY + 512)).unwrap();
        assert_eq!(u32::from(told), written * u32::from(IO_ERROR));
    }
}

#[test]
fn a_chain_that_loops_ends() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), READ_WRITE);

    driver.write_descriptor(0, 0, Descriptor::new(0x2_0000, 512, 2 | 1, 0));
    driver.offer_head(0, 0);
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used(), [(0, 1)]);
}

#[test]
fn the_configuration_space_is_that_of_the_disk() {
    let block = block(&image(), READ_ONLY);
    let mut config = [0xff; 64];

    block.read_config(0, &mut config);

    assert_eq!(config[0..8], 8u64.to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
}

#[test]
fn a_read_only_disk_says_so() {
    let features = |access| block(&image(), access).traits().features & 1 << VIRTIO_BLK_F_RO;
    assert_ne!(features(READ_ONLY), 0);
    assert_eq!(features(READ_WRITE), 0);
}

/// Ranges for discard and write zeroes: first sector, number of sectors, flags.
fn ranges(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let bytes = ranges.iter().flat_map(|&(sector, sectors, flags)| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    });
    bytes.collect()
}

/// The status of one request of `kind` with these ranges, and what the disk then has, a byte for
/// each sector.
fn change(access: Access, kind: u32, segments: &[(u64, u32, u32)]) -> (u8, [u8; 8]) {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = active(&driver, &image, access);

    driver.offer(0, &[&header(kind, 0), &ranges(segments)], &[1]);
    block.queue_ready(0).unwrap();

    let mut disk = [0; 8 * 512];
    image.as_file().read_exact_at(&mut disk, 0).unwrap();
    (driver.written(0, 0)[0], std::array::from_fn(|sector| disk[sector * 512 + 511]))
}

#[test]
fn discarded_ranges_read_as_zeros_in_a_file() {
    let outcome = change(READ_WRITE, VIRTIO_BLK_T_DISCARD, &[(1, 2, 0), (7, 1, 0)]);
    assert_eq!(outcome, (OK, [0, 0, 0, 3, 4, 5, 6, 0]));
}

#[test]
fn zeroed_ranges_read_as_zeros() {
    let outcome = change(READ_WRITE, VIRTIO_BLK_T_WRITE_ZEROES, &[(5, 3, 1)]);
    assert_eq!(outcome, (OK, [0, 1, 2, 3, 4, 0, 0, 0]));
}

#[test]
fn a_bad_range_leaves_the_good_ones_alone() {
    let whole = [0, 1, 2, 3, 4, 5, 6, 7];
    let past_the_end = change(READ_WRITE, VIRTIO_BLK_T_DISCARD, &[(1, 2, 0), (7, 2, 0)]);
    assert_eq!(past_the_end, (IO_ERROR, whole));
    let unknown_flag = change(READ_WRITE, VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, 4)]);
    assert_eq!(unknown_flag, (UNSUPPORTED, whole));
}

#[test]
fn a_read_only_disk_keeps_its_data() {
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let outcome = change(READ_ONLY, kind, &[(1, 2, 0)]);
        assert_eq!(outcome, (IO_ERROR, [0, 1, 2, 3, 4, 5, 6, 7]));
    }
}

#[test]
fn every_queue_is_served() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let disk = Disk::open(image().path(), READ_WRITE).unwrap();
    let mut block = Block::new(disk, "", 3, RateLimiter::unlimited(), None);
    assert_eq!(block.traits().queue_sizes.len(), 3);
    block.activate(driver.activation()).unwrap();

    for queue in 0..3 {
        driver.offer(queue, &[&header(VIRTIO_BLK_T_IN, queue as u64)], &[512, 1]);
        block.queue_ready(queue).unwrap();
    }

    let first_bytes = [0, 1, 2].map(|queue| driver.written(queue, 0)[0]);
    assert_eq!(first_bytes, [0, 1, 2]);
}

#[test]
fn a_guest_that_asks_for_much_at_once_is_not_interrupted() {
    // In a thread of its own, whose class nobody else changes.
    let classes = thread::spawn(|| {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut block = active(&driver, &image(), READ_WRITE);
        [1, 8].map(|requests| {
            (0..requests)
                .for_each(|_| _ = driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]));
            block.queue_ready(0).unwrap();
            // SAFETY: the call takes a number; 0 is this thread.
            unsafe { libc::sched_getscheduler(0) }
        })
    });

    assert_eq!(classes.join().unwrap(), [libc::SCHED_OTHER, libc::SCHED_BATCH]);
}

#[test]
fn a_queue_that_is_not_there_is_nothing() {
    let memory = memory();
    let driver = Driver::new(&memory);
    active(&driver, &image(), READ_WRITE).queue_ready(1).unwrap();
}

#[test]
fn another_number_of_queues_is_refused() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let error = block(&image(), READ_WRITE).activate(driver.activation()).unwrap_err();
    assert_eq!(error.to_string(), "expected 1 queues, got 2");
}

/// A device that reads one sector in 51.2 ms.
fn slow(image: &NamedTempFile, queues: u16) -> Block {
    let per_second = NonZeroU64::new(10_000).unwrap();
    let bytes = Some(Rate { per_second, burst: NonZeroU64::MIN });
    let limiter = RateLimiter::new(RateLimits { bytes, operations: None }).unwrap();
    let disk = Disk::open(image.path(), READ_WRITE).unwrap();
    Block::new(disk, "", queues, limiter, None)
}

#[test]
fn a_limit_holds_requests_up_until_its_timer_expires() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = slow(&image(), 1);
    block.activate(driver.activation()).unwrap();
    (0..2).for_each(|_| _ = driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]));

    let asked_at = Instant::now();
    block.queue_ready(0).unwrap();
    assert_eq!(driver.used().len(), 1);
    assert!(!driver.kicked(0));
    wait_until_readable(block.backends()[0].fd);
    block.backend_ready(0, EventSet::IN).unwrap();
    assert!(driver.kicked(0));
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used().len(), 2);
    assert!(asked_at.elapsed() >= Duration::from_millis(51));
}

#[test]
fn a_limit_outlives_a_reset() {
    let memory = memory();
    let mut block = slow(&image(), 1);
    let driver = Driver::new(&memory);
    block.activate(driver.activation()).unwrap();
    driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[1024, 1]);
    block.queue_ready(0).unwrap();
    assert_eq!(driver.used().len(), 1);

    block.reset();
    let memory = crate::virtio::testing::memory();
    let next = Driver::new(&memory);
    block.activate(next.activation()).unwrap();
    next.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]);
    block.queue_ready(0).unwrap();

    assert_eq!(next.used(), []);
}

/// Blocks until `fd` has something to read.
fn wait_until_readable(fd: RawFd) {
    let mut ready = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: `ready` is one descriptor, which the caller keeps open.
    assert_eq!(unsafe { libc::poll(&raw mut ready, 1, 10_000) }, 1);
}

#[test]
fn is_silent_before_activation_and_after_reset() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), READ_WRITE);

    block.reset();
    block.reset();
    driver.offer(0, &[&header(VIRTIO_BLK_T_FLUSH, 0)], &[1]);
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used(), []);
}

#[test]
fn a_disk_built_anew_serves_what_comes_next() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut old = active(&driver, &image, READ_WRITE);
    driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]);
    old.queue_ready(0).unwrap();
    driver.offer(0, &[&header(VIRTIO_BLK_T_OUT, 1), &[9; 512]], &[1]);

    // The old one still has the image's lock.
    let mut new = of_disk(Disk::endless(image.reopen().unwrap()));
    driver.hand_over(0, &mut old, &mut new);
    drop(old);
    new.queue_ready(0).unwrap();

    assert_eq!(driver.used().len(), 2);
    assert_eq!(driver.written(0, 1), [OK]);
    let mut sector = [0; 512];
    image.as_file().read_exact_at(&mut sector, 512).unwrap();
    assert_eq!(sector, [9; 512]);
}
