//! A balloon between a driver that gives memory away and a host that asks for it.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;
use crate::virtio::testing::{Driver, MEMORY_BYTES, assert_shown, config_page, memory};

const BALLOON_PAGE: u64 = discard::BALLOON_PAGE as u64;
/// A page the tests give away, far from the rings and from the driver's buffers.
const PAGE: u64 = 768;
const ADDRESS: u64 = PAGE * BALLOON_PAGE;
const WRITE: u16 = 2;
const REPORTING: Offer =
    Offer { deflate_on_oom: false, statistics: false, free_page_hint: false, page_reporting: true };
const EVERYTHING: Offer =
    Offer { deflate_on_oom: true, statistics: true, free_page_hint: true, page_reporting: true };

/// A balloon whose driver took all that is offered.
fn active(offer: Offer, driver: &Driver<'_>) -> Balloon {
    let mut balloon = Balloon::new(offer, 0);
    balloon.activate(driver.activation_with(offer.features())).unwrap();
    balloon
}

fn fill(memory: &GuestMemoryMmap, pages: u64) {
    let ones = vec![1; usize::try_from(pages * BALLOON_PAGE).unwrap()];
    memory.write_slice(&ones, GuestAddress(ADDRESS)).unwrap();
}

/// Which of the pages from [`PAGE`] on read as zeros.
fn given_back(memory: &GuestMemoryMmap, pages: u64) -> Vec<u64> {
    let first_byte = |page| memory.read_obj::<u8>(GuestAddress(ADDRESS + page * BALLOON_PAGE));
    (0..pages).filter(|&page| first_byte(page).unwrap() == 0).collect()
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn piece(address: u64, bytes: u64) -> Descriptor {
    Descriptor::new(address, bytes.try_into().unwrap(), WRITE, 0)
}

fn config(balloon: &Balloon, offset: u64) -> u32 {
    let mut data = [0; 4];
    balloon.read_config(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn there_is_no_queue_for_what_is_not_offered() {
    let queues = |offer: Offer| Balloon::new(offer, 0).traits().queue_sizes.len();

    assert_eq!(queues(Offer::default()), 2);
    assert_eq!(queues(REPORTING), 3);
    assert_eq!(queues(EVERYTHING), 5);
}

#[test]
fn a_queue_of_a_feature_the_driver_lacks_has_no_number() {
    let without_statistics = EVERYTHING.features() & !(1 << STATS_VQ);

    assert_eq!(role(EVERYTHING.features(), 4), Some(Role::Report));
    assert_eq!(role(without_statistics, 2), Some(Role::Hint));
    assert_eq!(role(without_statistics, 3), Some(Role::Report));
    assert_eq!(role(without_statistics, 4), None);
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    fill(&memory, 8);

    let page = u32::try_from(PAGE).unwrap();
    driver.offer(0, &[&numbers(&[page + 5, page + 1, page, page + 1])], &[]);
    balloon.queue_ready(0).unwrap();

    assert_eq!(given_back(&memory, 8), [0, 1, 5]);
    assert_eq!(balloon.given_back_bytes(), 3 * BALLOON_PAGE);
    assert_eq!(driver.used_of(0).len(), 1);
}

#[test]
fn a_page_number_outside_memory_hurts_nobody() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    fill(&memory, 1);

    let past_the_end = u32::try_from(MEMORY_BYTES as u64 / BALLOON_PAGE).unwrap();
    driver.offer(0, &[&numbers(&[past_the_end, u32::MAX])], &[]);
    driver.offer(0, &[b"odd"], &[]);
    balloon.queue_ready(0).unwrap();

    assert!(given_back(&memory, 1).is_empty());
    assert_eq!(driver.used_of(0).len(), 2);
}

#[test]
fn a_chain_names_at_most_1024_pages() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    fill(&memory, 2);

    let page = u32::try_from(PAGE).unwrap();
    let mut pages = vec![page; MAX_PAGE_NUMBERS];
    pages.push(page + 1);
    driver.offer(0, &[&numbers(&pages)], &[]);
    balloon.queue_ready(0).unwrap();

    assert_eq!(given_back(&memory, 2), [0]);
}

#[test]
fn reported_memory_goes_back_to_the_host() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    fill(&memory, 8);

    let pieces = [piece(ADDRESS, 2 * BALLOON_PAGE), piece(ADDRESS + 6 * BALLOON_PAGE, 4096)];
    driver.offer_descriptors(2, &pieces);
    balloon.queue_ready(2).unwrap();

    assert_eq!(given_back(&memory, 8), [0, 1, 6]);
    assert_eq!(driver.used_of(2).len(), 1);
}

#[test]
fn what_the_device_may_only_read_is_not_forgotten() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    fill(&memory, 1);

    driver.offer_descriptors(2, &[Descriptor::new(ADDRESS, 4096, 0, 0)]);
    balloon.queue_ready(2).unwrap();

    assert!(given_back(&memory, 1).is_empty());
}

#[test]
fn a_report_of_memory_the_guest_does_not_have_is_passed_over() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    fill(&memory, 1);

    let all_ones = u64::from(u32::MAX);
    driver.offer_descriptors(2, &[piece(u64::MAX, all_ones)]);
    driver.offer_descriptors(2, &[piece(ADDRESS, all_ones)]);
    driver.offer_descriptors(2, &[piece(1 << 40, 4096), piece(ADDRESS, 4096)]);
    balloon.queue_ready(2).unwrap();

    assert_eq!(balloon.given_back_bytes(), BALLOON_PAGE);
    assert_eq!(driver.used_of(2).len(), 3);
}

#[test]
fn free_pages_with_a_content_are_kept() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    fill(&memory, 1);

    balloon.write_config(POISON as u64, &0xaaaa_aaaa_u32.to_le_bytes());
    driver.offer_descriptors(2, &[piece(ADDRESS, 4096)]);
    balloon.queue_ready(2).unwrap();

    assert!(given_back(&memory, 1).is_empty());
    assert_eq!(driver.used_of(2).len(), 1);
}

#[test]
fn zeros_of_private_memory_on_a_file_are_kept_for_who_relies_on_them() {
    let report = |features| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY_BYTES as u64).unwrap();
        let (file, protection) = (FileOffset::new(file, 0), libc::PROT_READ | libc::PROT_WRITE);
        let region = MmapRegion::build(Some(file), MEMORY_BYTES, protection, libc::MAP_PRIVATE);
        let region = GuestRegionMmap::new(region.unwrap(), GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let driver = Driver::with_queues(&memory, 3);
        let mut balloon = Balloon::new(REPORTING, 0);
        balloon.activate(driver.activation_with(features)).unwrap();
        driver.offer_descriptors(2, &[piece(ADDRESS, 4096)]);
        balloon.queue_ready(2).unwrap();
        balloon.given_back_bytes()
    };

    assert_eq!(report(REPORTING.features()), 0);
    assert_eq!(report(REPORTING.features() & !(1 << PAGE_POISON)), BALLOON_PAGE);
}

#[test]
fn the_driver_writes_its_own_fields_only() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);

    balloon.write_config(0, &[0xff; 32]);
    balloon.write_config(u64::MAX, &[0xff; 8]);

    assert_eq!([0, 4, 8, 12, 16].map(|at| config(&balloon, at)), [0, u32::MAX, 0, u32::MAX, 0]);
}

#[test]
fn a_new_target_is_announced() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let host = Host::of(Arc::new(Mutex::new(active(REPORTING, &driver))));

    host.set_target_mib(3);
    host.lock().write_config(ACTUAL as u64, &512_u32.to_le_bytes());

    assert_eq!(config(&host.lock(), NUM_PAGES as u64), 768);
    assert_eq!(driver.config_changes(), 1);
    assert_eq!((host.target_mib(), host.size_mib()), (3, 2));
}

#[test]
fn every_field_that_changes_is_shown_at_once() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let mut balloon = active(EVERYTHING, &driver);
    let page = config_page(&mut balloon);

    balloon.set_target(5);
    assert_shown(&balloon, &page);
    balloon.write_config(4, &3_u32.to_le_bytes());
    assert_shown(&balloon, &page);
    assert!(balloon.start_hinting());
    assert_shown(&balloon, &page);
    let round = config(&balloon, 8);
    hint(&driver, &mut balloon, round);
    hint(&driver, &mut balloon, HINT_STOP);
    assert_eq!(config(&balloon, 8), HINT_DONE);
    assert_shown(&balloon, &page);
    balloon.reset();

    assert_shown(&balloon, &page);
}

/// One statistic as the driver writes it.
fn statistic(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn the_statistics_buffer_is_kept_until_there_is_a_question() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let mut balloon = active(EVERYTHING, &driver);

    driver.offer(STATISTICS, &[&statistic(4, 7)], &[]);
    balloon.queue_ready(STATISTICS).unwrap();
    assert_eq!(driver.used_of(STATISTICS), []);
    assert_eq!(balloon.request_statistics().unwrap(), Some(1));

    assert_eq!(driver.used_of(STATISTICS).len(), 1);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(balloon.statistics().free_bytes, Some(7));
}

#[test]
fn a_second_statistics_buffer_comes_back_at_once() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let mut balloon = active(EVERYTHING, &driver);

    driver.offer(STATISTICS, &[&statistic(4, 7)], &[]);
    let second = driver.offer(STATISTICS, &[&statistic(4, 8)], &[]);
    balloon.queue_ready(STATISTICS).unwrap();

    assert_eq!(driver.used_of(STATISTICS), [(second.into(), 0)]);
    assert_eq!(balloon.statistics().free_bytes, Some(7));
}

#[test]
fn whoever_asks_gets_the_answer_that_comes_after() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let host = Host::of(Arc::new(Mutex::new(active(EVERYTHING, &driver))));
    driver.offer(STATISTICS, &[&statistic(4, 7)], &[]);
    host.lock().queue_ready(STATISTICS).unwrap();

    let asking = thread::spawn({
        let host = host.clone();
        move || host.statistics(Duration::from_secs(60)).unwrap()
    });
    driver.wait_for_interrupt();
    driver.offer(STATISTICS, &[&statistic(4, 9)], &[]);
    host.lock().queue_ready(STATISTICS).unwrap();

    assert_eq!(asking.join().unwrap().unwrap().free_bytes, Some(9));
}

#[test]
fn a_driver_that_does_not_answer_is_not_waited_for() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let host = Host::of(Arc::new(Mutex::new(active(EVERYTHING, &driver))));

    assert_eq!(host.statistics(Duration::from_millis(1)).unwrap(), None);
    host.lock().reset();
    assert_eq!(host.statistics(Duration::from_secs(60)).unwrap(), None);
}

const HINTS: usize = 3;

/// The driver's part of a round of hints: command, one page, command.
fn hint(driver: &Driver<'_>, balloon: &mut Balloon, command: u32) {
    driver.offer(HINTS, &[&command.to_le_bytes()], &[]);
    balloon.queue_ready(HINTS).unwrap();
    driver.offer_descriptors(HINTS, &[piece(ADDRESS, 4096)]);
    balloon.queue_ready(HINTS).unwrap();
    driver.offer(HINTS, &[&HINT_STOP.to_le_bytes()], &[]);
    balloon.queue_ready(HINTS).unwrap();
}

#[test]
fn a_round_of_hints_gives_memory_back_and_ends() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let mut balloon = active(EVERYTHING, &driver);
    fill(&memory, 2);

    assert!(balloon.start_hinting());
    let command = config(&balloon, HINT_COMMAND as u64);
    hint(&driver, &mut balloon, command);

    assert_eq!(command, FIRST_ROUND);
    assert_eq!(given_back(&memory, 2), [0]);
    assert_eq!(config(&balloon, HINT_COMMAND as u64), HINT_DONE);
    assert_eq!((driver.config_changes(), driver.used_of(HINTS).len()), (2, 3));
}

#[test]
fn hints_nobody_asked_for_are_passed_over() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let mut balloon = active(EVERYTHING, &driver);
    fill(&memory, 1);

    for command in [HINT_STOP, HINT_DONE, FIRST_ROUND, u32::MAX] {
        hint(&driver, &mut balloon, command);
    }
    balloon.start_hinting();
    hint(&driver, &mut balloon, FIRST_ROUND + 1);

    assert!(given_back(&memory, 1).is_empty());
    assert_eq!(config(&balloon, HINT_COMMAND as u64), FIRST_ROUND);
}

#[test]
fn hints_are_taken_before_their_driver_goes_on() {
    let with_hints = Balloon::new(EVERYTHING, 0);
    let without = Balloon::new(REPORTING, 0);

    assert_eq!(
        [1, 2, 3, 4].map(|index| with_hints.serves_at_once(index)),
        [false, true, true, true]
    );
    assert!(!without.serves_at_once(2));
}

#[test]
fn a_reset_forgets_the_driver_and_not_the_host() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 3);
    let mut balloon = active(REPORTING, &driver);
    balloon.set_target(5);
    driver.offer_descriptors(2, &[piece(ADDRESS, 4096)]);
    balloon.queue_ready(2).unwrap();
    balloon.write_config(ACTUAL as u64, &[1; 4]);
    balloon.write_config(POISON as u64, &[1; 4]);

    balloon.reset();
    balloon.reset();
    balloon.queue_ready(0).unwrap();

    assert_eq!([0, 4, 8, 12].map(|at| config(&balloon, at)), [5, 0, 0, 0]);
    assert_eq!(balloon.given_back_bytes(), BALLOON_PAGE);
    assert!(!balloon.start_hinting());
}

#[test]
fn a_balloon_built_anew_asks_with_the_buffer_that_the_old_one_held() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let mut old = active(EVERYTHING, &driver);
    old.set_target(7);
    old.write_config(4, &3u32.to_le_bytes());
    driver.offer(STATISTICS, &[&[4, 0, 1, 0, 0, 0, 0, 0, 0, 0]], &[]);
    old.queue_ready(STATISTICS).unwrap();
    assert!(old.start_hinting());
    let command = config(&old, 8);

    let mut new = Balloon::new(EVERYTHING, 0);
    driver.hand_over(EVERYTHING.features(), &mut old, &mut new);
    new.queue_ready(STATISTICS).unwrap();

    assert_eq!([0, 4, 8].map(|offset| config(&new, offset)), [7, 3, command]);
    assert_eq!(driver.used_of(STATISTICS), []);
    assert!(new.request_statistics().unwrap().is_some());
    assert_eq!(driver.used_of(STATISTICS), [(0, 0)]);
    assert!(new.start_hinting());
    assert_eq!(config(&new, 8), command + 1);
}
