//! A driver's requests against a block device whose host has an io_uring.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Bytes, GuestAddress};

use super::request::HEADER_BYTES;
use super::transfer::MOST_IN_FLIGHT;
use super::*;
use crate::virtio::testing::{Driver, memory};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// 4 MiB; each sector has its number, modulo 251, in every byte.
fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..4 << 20).map(|byte| u8::try_from(byte / 512 % 251).unwrap()).collect();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    file
}

fn block_on(path: &Path, queues: u16) -> Block {
    let disk = Disk::open(path, Access::default()).unwrap();
    Block::new(disk, "ring", queues, RateLimiter::unlimited(), Some(Ring::open().unwrap()))
}

fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Plays the event loop until `queue` has given back `count` chains.
fn serve_until(block: &mut Block, driver: &Driver<'_>, queue: usize, count: usize) {
    let fd = block.backends().last().unwrap().fd;
    block.queue_ready(queue).unwrap();
    while driver.used_of(queue).len() < count {
        if driver.kicked(queue) {
            block.queue_ready(queue).unwrap();
            continue;
        }
        let mut ready = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: `ready` is one descriptor, which the device keeps open.
        assert_eq!(unsafe { libc::poll(&raw mut ready, 1, 10_000) }, 1);
        block.backend_ready(0, EventSet::IN).unwrap();
    }
}

#[test]
#[ignore = "needs io_uring"]
fn a_read_moves_the_sectors_into_all_pieces() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = block_on(image().path(), 1);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();

    driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 2)], &[100, 924, 1]);
    serve_until(&mut block, &driver, 0, 1);

    assert_eq!(driver.written(0, 0), [vec![2; 512], vec![3; 512], vec![OK]].concat());
    assert_eq!(driver.interrupts(), 1);
}

#[test]
#[ignore = "needs io_uring"]
fn a_write_and_a_flush_reach_the_file() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = block_on(image.path(), 1);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();

    driver.offer(0, &[&header(VIRTIO_BLK_T_OUT, 7), &[0xa5; 512]], &[1]);
    driver.offer(0, &[&header(VIRTIO_BLK_T_FLUSH, 0)], &[1]);
    serve_until(&mut block, &driver, 0, 2);

    let mut sector = [0; 512];
    image.as_file().read_exact_at(&mut sector, 7 * 512).unwrap();
    assert_eq!(sector, [0xa5; 512]);
    assert_eq!([driver.written(0, 0), driver.written(0, 1)].concat(), [OK, OK]);
}

#[test]
#[ignore = "needs io_uring"]
fn a_disk_that_shrank_fails_reads() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = block_on(image.path(), 1);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();

    image.as_file().set_len(512).unwrap();
    driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[1024, 1]);
    serve_until(&mut block, &driver, 0, 1);

    assert_eq!(driver.buffer(16 + 1024, 1), [IO_ERROR]);
}

#[test]
#[ignore = "needs io_uring"]
fn what_a_ring_does_not_do_is_done_without_it() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = block_on(image.path(), 1);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();

    let range = [&8u64.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat();
    driver.offer(0, &[&header(VIRTIO_BLK_T_DISCARD, 0), &range], &[1]);
    serve_until(&mut block, &driver, 0, 1);

    let mut byte = [0xff];
    image.as_file().read_exact_at(&mut byte, 8 * 512).unwrap();
    assert_eq!((driver.written(0, 0), byte), (vec![OK], [0]));
}

#[test]
#[ignore = "needs io_uring"]
fn a_write_of_a_driver_that_cannot_flush_lasts_without_a_flush_by_the_thread() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let zero = File::options().read(true).write(true).open("/dev/zero").unwrap();
    let ring = Some(Ring::open().unwrap());
    let disk = Disk::endless(zero);
    let mut block = Block::new(disk, "zero", 1, RateLimiter::unlimited(), ring);
    block.activate(driver.activation()).unwrap();

    driver.offer(0, &[&header(VIRTIO_BLK_T_OUT, 0), &[1; 512]], &[1]);
    serve_until(&mut block, &driver, 0, 1);

    // Which would fail there.
    assert_eq!(driver.written(0, 0), [OK]);
}

#[test]
#[ignore = "needs io_uring"]
fn a_write_of_a_driver_that_cannot_flush_reaches_the_file() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = block_on(image.path(), 1);
    block.activate(driver.activation()).unwrap();

    driver.offer(0, &[&header(VIRTIO_BLK_T_OUT, 7), &[0xa5; 512]], &[1]);
    serve_until(&mut block, &driver, 0, 1);

    let mut sector = [0; 512];
    image.as_file().read_exact_at(&mut sector, 7 * 512).unwrap();
    assert_eq!((driver.written(0, 0), sector), (vec![OK], [0xa5; 512]));
}

/// A pipe as a disk: reads of it stay in flight until somebody writes.
fn pipe_disk() -> (Disk, File) {
    let (read, write) = nix::unistd::pipe().unwrap();
    (Disk::endless(File::from(read)), File::from(write))
}

/// An active block device on it, in which `reads` of one sector are in flight.
fn reading_block(driver: &Driver<'_>, reads: usize) -> (Block, File) {
    let (disk, write) = pipe_disk();
    let ring = Some(Ring::open().unwrap());
    let mut block = Block::new(disk, "pipe", 1, RateLimiter::unlimited(), ring);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();
    (0..reads).for_each(|_| _ = driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]));
    block.queue_ready(0).unwrap();
    assert_eq!(driver.used(), []);
    (block, write)
}

#[test]
#[ignore = "needs io_uring"]
fn more_requests_than_may_be_in_flight_wait_and_are_all_answered() {
    const QUEUES: usize = 4;
    const READS: usize = 20;
    let memory = memory();
    let driver = Driver::with_queues(&memory, QUEUES);
    let (disk, mut write) = pipe_disk();
    let ring = Some(Ring::open().unwrap());
    let mut block = Block::new(disk, "pipe", 4, RateLimiter::unlimited(), ring);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();
    for queue in 0..QUEUES {
        (0..READS).for_each(|_| _ = driver.offer(queue, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]));
        block.queue_ready(queue).unwrap();
    }
    const { assert!(QUEUES * READS > MOST_IN_FLIGHT) };
    assert!(block.active.as_ref().unwrap().is_full);

    write.write_all(&[7; QUEUES * READS * 512]).unwrap();
    (0..QUEUES).for_each(|queue| serve_until(&mut block, &driver, queue, READS));

    for queue in 0..QUEUES {
        let all_answered =
            (0..READS).all(|nth| driver.written(queue, nth) == [vec![7; 512], vec![OK]].concat());
        assert!(all_answered);
    }
}

#[test]
#[ignore = "needs io_uring"]
fn nothing_is_written_to_the_guest_after_a_reset() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let (mut block, mut write) = reading_block(&driver, 1);

    let (done, is_done) = std::sync::mpsc::channel();
    let resetting = std::thread::spawn(move || {
        block.reset();
        done.send(()).unwrap();
        block
    });
    let early = is_done.recv_timeout(Duration::from_millis(100));
    assert!(early.is_err(), "the reset did not wait for the read in flight");
    write.write_all(&[0xa5; 512]).unwrap();
    let mut block = resetting.join().unwrap();

    memory.write_slice(&[0; 1024], GuestAddress(0x1_0000)).unwrap();
    block.backend_ready(0, EventSet::IN).unwrap();
    assert_eq!(driver.used(), []);
    assert_eq!(driver.buffer(0, 1024), [0; 1024]);
}

#[test]
#[ignore = "needs io_uring"]
fn a_device_settles_once_the_host_has_finished_what_is_in_flight() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let (mut block, mut write) = reading_block(&driver, 2);

    assert!(!block.settle(Instant::now() + Duration::from_millis(5)).unwrap());
    write.write_all(&[0xa5; 512]).unwrap();
    while driver.used().is_empty() {
        assert!(!block.settle(Instant::now() + Duration::from_millis(5)).unwrap());
    }
    write.write_all(&[0xa5; 512]).unwrap();

    assert!(block.settle(Instant::now() + Duration::from_secs(30)).unwrap());
    assert_eq!(driver.used().len(), 2);
}

#[test]
#[ignore = "needs io_uring"]
fn all_that_is_in_flight_is_over_when_the_device_stands_still() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = block_on(image.path(), 1);
    block.activate(driver.activation_with(1 << VIRTIO_BLK_F_FLUSH)).unwrap();
    (0..10).for_each(|sector| {
        driver.offer(0, &[&header(VIRTIO_BLK_T_IN, sector)], &[512, 1]);
    });

    block.queue_ready(0).unwrap();
    let positions = block.quiesce().unwrap();

    assert_eq!(driver.used().len(), 10);
    assert_eq!((positions[0].next_available, positions[0].next_used), (10, 10));
    assert!(driver.interrupts() > 0);
}
