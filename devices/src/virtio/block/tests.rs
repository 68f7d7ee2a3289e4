//! A driver's requests against a block device on a temporary file.

use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;

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

fn active(driver: &Driver<'_>, image: &NamedTempFile, read_only: bool) -> Block {
    let disk = Disk::open(image.path(), read_only).unwrap();
    let mut block = Block::new(disk, read_only, "the-disk", RateLimiter::unlimited());
    block.activate(driver.activation()).unwrap();
    block
}

fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// What the device writes in answer to one request.
fn answer(read_only: bool, readable: &[&[u8]], writable: &[u32]) -> Vec<u8> {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), read_only);

    driver.offer(0, readable, writable);
    block.queue_ready(0).unwrap();

    driver.written(0, 0)
}

#[test]
fn a_read_moves_the_sectors_and_says_ok() {
    let answer = answer(false, &[&header(VIRTIO_BLK_T_IN, 2)], &[1024, 1]);
    assert_eq!(answer, [vec![2; 512], vec![3; 512], vec![OK]].concat());
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let header = header(VIRTIO_BLK_T_IN, 2);
    let answer = answer(false, &[&header[..5], &header[5..]], &[100, 0, 413]);
    assert_eq!(answer, [vec![2; 512], vec![OK]].concat());
}

#[test]
fn a_write_reaches_the_file() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let image = image();
    let mut block = active(&driver, &image, false);

    driver.offer(0, &[&header(VIRTIO_BLK_T_OUT, 7), &[0xa5; 512]], &[1]);
    block.queue_ready(0).unwrap();

    let mut sector = [0; 512];
    image.as_file().read_exact_at(&mut sector, 7 * 512).unwrap();
    assert_eq!(sector, [0xa5; 512]);
    assert_eq!(driver.written(0, 0), [OK]);
}

#[test]
fn a_write_to_a_read_only_disk_fails() {
    let answer = answer(true, &[&header(VIRTIO_BLK_T_OUT, 0), &[0; 512]], &[1]);
    assert_eq!(answer, [IO_ERROR]);
}

#[test]
fn a_read_past_the_end_fails_and_moves_no_bytes() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), false);

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
    let mut block = active(&driver, &image, false);

    image.as_file().set_len(0).unwrap();
    driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]);
    block.queue_ready(0).unwrap();

    assert_eq!(driver.buffer(16 + 512, 1), [IO_ERROR]);
}

#[test]
fn a_flush_says_ok() {
    assert_eq!(answer(false, &[&header(VIRTIO_BLK_T_FLUSH, 0)], &[1]), [OK]);
}

#[test]
fn the_id_is_padded_with_zeros() {
    let answer = answer(false, &[&header(VIRTIO_BLK_T_GET_ID, 0)], &[20, 1]);
    assert_eq!(answer, b"the-disk\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn an_unknown_request_is_unsupported() {
    assert_eq!(answer(false, &[&header(99, 0)], &[1]), [UNSUPPORTED]);
}

#[test]
fn a_short_header_fails() {
    assert_eq!(answer(false, &[&[0; 15]], &[1]), [IO_ERROR]);
}

#[test]
fn a_chain_without_room_for_a_status_comes_back_empty() {
    assert_eq!(answer(false, &[&header(VIRTIO_BLK_T_IN, 0)], &[]), []);
    assert_eq!(answer(false, &[&header(VIRTIO_BLK_T_IN, 0)], &[0]), []);
}

#[test]
fn buffers_outside_memory_come_back_empty() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), false);

    driver.offer_descriptors(
        0,
        &[
            Descriptor::new(u64::MAX, 16, 0, 0),
            Descriptor::new(1 << 40, 512, 2, 0),
            Descriptor::new(0x2_0000, 1, 2, 0),
        ],
    );
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used(), [(0, 0)]);
}

#[test]
fn a_chain_that_loops_ends() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let mut block = active(&driver, &image(), false);

    driver.write_descriptor(0, 0, Descriptor::new(0x2_0000, 512, 2 | 1, 0));
    driver.offer_head(0, 0);
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used(), [(0, 1)]);
}

#[test]
fn the_configuration_space_has_capacity_segments_and_block_size() {
    let block =
        Block::new(Disk::open(image().path(), true).unwrap(), true, "", RateLimiter::unlimited());
    let mut config = [0xff; 28];
    block.read_config(0, &mut config);
    assert_eq!(config[0..8], 8u64.to_le_bytes());
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..28], 512u64.to_le_bytes());
}

#[test]
fn a_read_only_disk_says_so() {
    let features = |read_only| {
        let disk = Disk::open(image().path(), true).unwrap();
        Block::new(disk, read_only, "", RateLimiter::unlimited()).traits().features
            & 1 << VIRTIO_BLK_F_RO
    };
    assert_ne!(features(true), 0);
    assert_eq!(features(false), 0);
}

#[test]
fn a_limit_holds_requests_up_until_its_timer_expires() {
    let memory = memory();
    let driver = Driver::new(&memory);
    let bytes_per_second = NonZeroU64::new(10_000).unwrap();
    let bytes = Some(Rate { per_second: bytes_per_second, burst: NonZeroU64::MIN });
    let limiter = RateLimiter::new(RateLimits { bytes, operations: None }).unwrap();
    let disk = Disk::open(image().path(), false).unwrap();
    let mut block = Block::new(disk, false, "", limiter);
    block.activate(driver.activation()).unwrap();
    (0..2).for_each(|_| _ = driver.offer(0, &[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1]));

    let asked_at = Instant::now();
    block.queue_ready(0).unwrap();
    assert_eq!(driver.used().len(), 1);
    wait_until_readable(block.backends()[0].fd);
    block.backend_ready(0, EventSet::IN).unwrap();

    assert_eq!(driver.used().len(), 2);
    assert!(asked_at.elapsed() >= Duration::from_millis(51));
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
    let mut block = active(&driver, &image(), false);

    block.reset();
    block.reset();
    driver.offer(0, &[&header(VIRTIO_BLK_T_FLUSH, 0)], &[1]);
    block.queue_ready(0).unwrap();

    assert_eq!(driver.used(), []);
}
