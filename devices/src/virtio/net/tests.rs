//! A driver's frames against a network device on a socket pair.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::virtio::rate_limit::{Rate, RateLimits};
use crate::virtio::testing::{Driver, QUEUE_SIZE, memory};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// One end of a cable whose other end the test holds.
struct Cable {
    socket: UnixDatagram,
    offloads: Arc<AtomicU32>,
    attached: Arc<AtomicBool>,
}

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        self.offloads.store(offloads, Ordering::Relaxed);
        Ok(())
    }

    fn mtu(&self) -> Option<u16> {
        Some(1500)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        let before = self.attached.swap(attached, Ordering::Relaxed);
        // A tap refuses to be attached twice, too.
        if before == attached { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }
}

/// A cable and its other end.
fn cable() -> (Cable, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let attached = Arc::new(AtomicBool::new(true));
    (Cable { socket: ours, offloads: Arc::default(), attached }, theirs)
}

/// An idle device and the other end of its cable.
fn idle() -> (Net<Cable>, UnixDatagram) {
    let (ours, theirs) = cable();
    (Net::new(vec![ours], MAC), theirs)
}

fn active(driver: &Driver<'_>, features: u64) -> (Net<Cable>, UnixDatagram) {
    let (mut net, cable) = idle();
    net.activate(driver.activation_with(features)).unwrap();
    (net, cable)
}

/// A frame as it crosses the cable: an empty header and `length` bytes, all different enough.
fn frame(length: usize) -> Vec<u8> {
    let payload = (0..length).map(|i| u8::try_from(i % 251).unwrap());
    [0; HEADER_BYTES].into_iter().chain(payload).collect()
}

/// `frame` as the guest sees it, spread over `chains`.
fn with_num_buffers(mut frame: Vec<u8>, chains: u8) -> Vec<u8> {
    frame[10] = chains;
    frame
}

fn arrived(cable: &UnixDatagram) -> Vec<u8> {
    let mut data = vec![0; 1 << 17];
    let length = cable.recv(&mut data).unwrap_or(0);
    data.truncate(length);
    data
}

#[test]
fn a_frame_of_the_guest_arrives_in_one_piece() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, 0);
    let frame = frame(1000);

    driver.offer(1, &[&frame[..5], &frame[5..100], &frame[100..]], &[]);
    net.queue_ready(1).unwrap();

    assert_eq!(arrived(&cable), frame);
    assert_eq!(driver.used_of(1), [(0, 0)]);
}

#[test]
fn frames_too_short_or_too_long_are_dropped() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, 0);

    driver.offer(1, &[&frame(13)], &[]);
    driver.offer(1, &[&frame(70_000)], &[]);
    driver.offer(1, &[], &[1000]);
    net.queue_ready(1).unwrap();

    assert_eq!(arrived(&cable), b"");
    assert_eq!(driver.used_of(1).len(), 3);
}

#[test]
fn a_frame_the_cable_cannot_take_waits_for_it() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, 0);
    let full = std::iter::repeat_with(|| net.links.all()[0].socket.send(&frame(100)));
    let queued = full.take_while(Result::is_ok).count();

    driver.offer(1, &[&frame(1000)], &[]);
    net.queue_ready(1).unwrap();
    assert_eq!(driver.used_of(1), []);
    (0..queued).for_each(|_| _ = arrived(&cable));
    net.backend_ready(0, EventSet::OUT).unwrap();

    assert_eq!(arrived(&cable), frame(1000));
    assert_eq!(driver.used_of(1), [(0, 0)]);
}

#[test]
fn a_frame_fills_one_buffer_of_a_simple_driver() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, 0);

    driver.offer(0, &[], &[12, 1514]);
    cable.send(&frame(60)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();

    assert_eq!(driver.written(0, 0), with_num_buffers(frame(60), 1));
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_long_frame_is_spread_over_buffers() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, MERGEABLE);

    (0..4).for_each(|_| _ = driver.offer(0, &[], &[500]));
    cable.send(&frame(1300)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();

    let seen: Vec<u8> = (0..3).flat_map(|nth| driver.written(0, nth)).collect();
    assert_eq!(seen, with_num_buffers(frame(1300), 3));
    assert_eq!(driver.used().len(), 3);
}

#[test]
fn buffers_a_frame_did_not_need_serve_the_next() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, MERGEABLE);

    (0..5).for_each(|_| _ = driver.offer(0, &[], &[500]));
    cable.send(&frame(60)).unwrap();
    cable.send(&frame(70)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();

    assert_eq!(driver.written(0, 0), with_num_buffers(frame(60), 1));
    assert_eq!(driver.written(0, 1), with_num_buffers(frame(70), 1));
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_frame_that_fits_needs_no_room_for_the_largest() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, MERGEABLE);

    (0..3).for_each(|_| _ = driver.offer(0, &[], &[500]));
    cable.send(&frame(600)).unwrap();
    cable.send(&frame(60)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();

    let seen: Vec<u8> = (0..2).flat_map(|nth| driver.written(0, nth)).collect();
    assert_eq!(seen, with_num_buffers(frame(600), 2));
    assert_eq!(driver.written(0, 2), with_num_buffers(frame(60), 1));
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_frame_that_does_not_fit_waits_for_more_buffers_and_the_next_behind_it() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, MERGEABLE);

    driver.offer(0, &[], &[500]);
    cable.send(&frame(1000)).unwrap();
    cable.send(&frame(60)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();
    driver.offer(0, &[], &[500]);
    net.queue_ready(0).unwrap();
    assert_eq!(driver.used(), []);
    (0..6).for_each(|_| _ = driver.offer(0, &[], &[500]));
    net.queue_ready(0).unwrap();

    let seen: Vec<u8> = (0..3).flat_map(|nth| driver.written(0, nth)).collect();
    assert_eq!(seen, with_num_buffers(frame(1000), 3));
    assert_eq!(driver.written(0, 3), with_num_buffers(frame(60), 1));
}

#[test]
fn a_frame_longer_than_the_whole_queue_is_dropped_for_the_next() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, MERGEABLE);

    (0..QUEUE_SIZE / 2).for_each(|_| _ = driver.offer(0, &[], &[12, 8]));
    cable.send(&frame(1400)).unwrap();
    cable.send(&frame(60)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();

    let seen: Vec<u8> = (0..4).flat_map(|nth| driver.written(0, nth)).collect();
    assert_eq!(seen, with_num_buffers(frame(60), 4));
    assert_eq!(driver.used().len(), 4);
}

#[test]
fn a_frame_that_waits_is_charged_for_once() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (net, cable) = idle();
    let rate = Rate { per_second: NonZeroU64::MIN, burst: NonZeroU64::MIN };
    let one = RateLimiter::new(RateLimits { bytes: None, operations: Some(rate) }).unwrap();
    let mut net = net.limited(one, RateLimiter::unlimited());
    net.activate(driver.activation_with(MERGEABLE)).unwrap();

    driver.offer(0, &[], &[500]);
    cable.send(&frame(1000)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();
    (0..3).for_each(|_| _ = driver.offer(0, &[], &[500]));
    net.queue_ready(0).unwrap();

    assert_eq!(driver.used().len(), 3);
}

#[test]
fn segmentation_offload_needs_room_for_64_kib() {
    let (net, _cable) = idle();
    assert_eq!(net.room(0), Room::Chain);
    assert_eq!(net.room(MERGEABLE), Room::Bytes(12 + 18 + 1500));
    assert_eq!(net.room(MERGEABLE | 1 << VIRTIO_NET_F_GUEST_TSO4), Room::Bytes(MAX_FRAME_BYTES));
}

#[test]
fn receive_buffers_that_make_no_sense_come_back_empty() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, MERGEABLE);

    driver.offer_descriptors(0, &[Descriptor::new(1 << 40, 2000, 2, 0)]);
    driver.offer(0, &[], &[11]);
    driver.offer(0, &[b"wrong direction"], &[]);
    driver.offer(0, &[], &[2000]);
    cable.send(&frame(60)).unwrap();
    net.queue_ready(0).unwrap();

    assert_eq!(driver.used()[..3], [(0, 0), (1, 0), (2, 0)]);
    assert_eq!(driver.written(0, 3), with_num_buffers(frame(60), 1));
}

#[test]
fn a_head_outside_the_table_breaks_the_receive_queue() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, _cable) = active(&driver, MERGEABLE);

    driver.offer_head(0, 4711);

    assert!(net.queue_ready(0).is_err());
}

#[test]
fn the_link_is_told_what_was_negotiated() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let features = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO6;

    let (net, _cable) = active(&driver, features);

    let offloads = net.links.all()[0].offloads.load(Ordering::Relaxed);
    assert_eq!(offloads, libc::TUN_F_CSUM | libc::TUN_F_TSO6);
}

#[test]
fn the_configuration_space_has_mac_status_and_mtu() {
    let (net, _cable) = idle();
    let mut config = [0xff; 14];
    net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 0x05, 0, 0]);
}

#[test]
fn is_silent_before_activation_and_after_reset() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (mut net, cable) = active(&driver, 0);

    net.reset();
    net.reset();
    driver.offer(1, &[&frame(100)], &[]);
    net.queue_ready(1).unwrap();
    net.backend_ready(0, EventSet::IN | EventSet::OUT).unwrap();

    assert_eq!(arrived(&cable), b"");
}

const SEVERAL: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

/// Number of the control queue of a device with two pairs.
const CONTROL: usize = 4;

/// An active device with two pairs, and the other end of the cable of each.
fn two_pairs(driver: &Driver<'_>, features: u64) -> (Net<Cable>, [UnixDatagram; 2]) {
    let (cables, others): (Vec<_>, Vec<_>) = [cable(), cable()].into_iter().unzip();
    let mut net = Net::new(cables, MAC);
    net.activate(driver.activation_with(features)).unwrap();
    (net, others.try_into().unwrap())
}

/// Has the driver send a control command through `queue`; returns the answer.
fn command(net: &mut Net<Cable>, driver: &Driver<'_>, queue: usize, bytes: &[u8]) -> Vec<u8> {
    let nth = driver.used_of(queue).len();
    driver.offer(queue, &[&bytes[..2], &bytes[2..]], &[1]);
    net.queue_ready(queue).unwrap();
    driver.written(queue, nth)
}

fn attached(net: &Net<Cable>) -> Vec<bool> {
    net.links.all().iter().map(|link| link.attached.load(Ordering::Relaxed)).collect()
}

#[test]
fn a_device_of_one_pair_has_no_control_queue() {
    let (net, _cable) = idle();
    assert_eq!(net.traits().features & SEVERAL, 0);
    assert_eq!(net.traits().queue_sizes, [256, 256]);
}

#[test]
fn a_device_of_two_pairs_says_so() {
    let net = Net::new(vec![cable().0, cable().0], MAC);
    let mut pairs = [0; 2];
    net.read_config(8, &mut pairs);
    assert_eq!(pairs, [2, 0]);
    assert_eq!(net.traits().features & SEVERAL, SEVERAL);
    assert_eq!(net.traits().queue_sizes, [256; 5]);
}

#[test]
fn a_driver_starts_with_one_pair_and_gets_the_other_when_it_asks() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, cables) = two_pairs(&driver, SEVERAL);
    assert_eq!(attached(&net), [true, false]);

    driver.offer(3, &[&frame(100)], &[]);
    net.queue_ready(3).unwrap();
    assert_eq!(driver.used_of(3), []);
    assert_eq!(command(&mut net, &driver, CONTROL, &[4, 0, 2, 0]), [0]);
    assert_eq!(attached(&net), [true, true]);
    assert!(driver.kicked(2) && driver.kicked(3));
    net.queue_ready(3).unwrap();

    assert_eq!(arrived(&cables[0]), b"");
    assert_eq!(arrived(&cables[1]), frame(100));
}

#[test]
fn each_pair_receives_from_its_own_link() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, cables) = two_pairs(&driver, SEVERAL);
    command(&mut net, &driver, CONTROL, &[4, 0, 2, 0]);

    driver.offer(0, &[], &[1536]);
    driver.offer(2, &[], &[1536]);
    cables[1].send(&frame(70)).unwrap();
    cables[0].send(&frame(60)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();
    assert_eq!(driver.used_of(2), []);
    net.backend_ready(1, EventSet::IN).unwrap();

    assert_eq!(driver.written(0, 0), with_num_buffers(frame(60), 1));
    assert_eq!(driver.written(2, 0), with_num_buffers(frame(70), 1));
}

#[test]
fn a_pair_the_driver_gave_up_is_silent() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, cables) = two_pairs(&driver, SEVERAL);
    command(&mut net, &driver, CONTROL, &[4, 0, 2, 0]);

    assert_eq!(command(&mut net, &driver, CONTROL, &[4, 0, 1, 0]), [0]);
    driver.offer(2, &[], &[1536]);
    cables[1].send(&frame(60)).unwrap();
    net.backend_ready(1, EventSet::IN).unwrap();

    assert_eq!(attached(&net), [true, false]);
    assert_eq!(driver.used_of(2), []);
}

#[test]
fn impossible_numbers_of_pairs_are_refused() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, _cables) = two_pairs(&driver, SEVERAL);

    for pairs in [[0, 0], [3, 0], [0, 0x80]] {
        let bytes = [4, 0, pairs[0], pairs[1]];
        assert_eq!(command(&mut net, &driver, CONTROL, &bytes), [1]);
    }

    assert_eq!(attached(&net), [true, false]);
}

#[test]
fn commands_of_other_classes_are_refused() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, _cables) = two_pairs(&driver, SEVERAL);

    for class in [0, 1, 2, 3, 5, 255] {
        assert_eq!(command(&mut net, &driver, CONTROL, &[class, 0, 1, 0]), [1]);
    }
}

#[test]
fn a_command_without_room_for_an_answer_comes_back() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, _cables) = two_pairs(&driver, SEVERAL);

    driver.offer(CONTROL, &[&[4, 0, 2, 0]], &[]);
    driver.offer(CONTROL, &[], &[1]);
    driver.offer_descriptors(CONTROL, &[Descriptor::new(1 << 40, 4, 0, 0)]);
    net.queue_ready(CONTROL).unwrap();

    let lengths: Vec<u32> = driver.used_of(CONTROL).iter().map(|used| used.1).collect();
    assert_eq!(lengths, [0, 1, 0]);
}

#[test]
fn pairs_that_cannot_be_attached_are_refused() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, _cables) = two_pairs(&driver, SEVERAL);
    // Attaching what is attached fails.
    net.links.all()[1].attached.store(true, Ordering::Relaxed);

    assert_eq!(command(&mut net, &driver, CONTROL, &[4, 0, 2, 0]), [1]);
    assert_eq!(net.links.attached(), 1);
}

#[test]
fn a_driver_whose_device_was_taken_away_gets_an_answer_to_its_commands() {
    for (features, control) in [(SEVERAL, CONTROL), (1 << VIRTIO_NET_F_CTRL_VQ, 2)] {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 5);
        let (mut net, cables) = two_pairs(&driver, features);
        command(&mut net, &driver, control, &[4, 0, 1, 0]);
        driver.offer(0, &[], &[1536]);

        let positions = net.quiesce().unwrap();
        let gone = net.stand_in().unwrap();
        let mut gone = gone.lock().unwrap();
        gone.activate(driver.activation_at(features, &positions)).unwrap();
        driver.offer(control, &[&[4, 0], &[1, 0]], &[1]);
        driver.offer(1, &[&frame(60)], &[]);
        (0..5).for_each(|index| gone.queue_ready(index).unwrap());

        assert_eq!(driver.written(control, 1), [1]);
        assert_eq!((driver.used_of(0).len(), driver.used_of(1).len()), (0, 1));
        assert_eq!(arrived(&cables[0]), b"");
        // Whoever waits for the end of the driver's wait finds the device where the driver does.
        let positions = gone.quiesce().unwrap();
        assert_eq!((positions[control].next_used, positions[1].next_used), (2, 1));
    }
}

#[test]
fn nobody_stands_in_for_a_device_without_commands() {
    assert!(idle().0.stand_in().is_none());
}

#[test]
fn without_several_pairs_the_control_queue_follows_the_first() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, _cables) = two_pairs(&driver, 1 << VIRTIO_NET_F_CTRL_VQ);

    assert_eq!(command(&mut net, &driver, 2, &[4, 0, 2, 0]), [1]);
    assert_eq!(command(&mut net, &driver, 2, &[4, 0, 1, 0]), [0]);
}

#[test]
fn a_new_driver_starts_with_one_pair_again() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut net, _cables) = two_pairs(&driver, SEVERAL);
    command(&mut net, &driver, CONTROL, &[4, 0, 2, 0]);

    net.reset();
    net.activate(driver.activation_with(SEVERAL)).unwrap();

    assert_eq!(attached(&net), [true, false]);
}

/// A limiter that admits nothing for an hour.
fn exhausted() -> RateLimiter {
    let rate = Rate { per_second: NonZeroU64::MIN, burst: NonZeroU64::MIN };
    let mut limiter = RateLimiter::new(RateLimits { bytes: None, operations: Some(rate) }).unwrap();
    (0..3600).for_each(|_| limiter.charge(0));
    limiter
}

/// A limiter that lets a frame of more than `bytes` through, and the next one a moment later.
fn a_moment_after(bytes: u64) -> RateLimiter {
    let rate = Rate { per_second: NonZeroU64::new(5 * bytes).unwrap(), burst: NonZeroU64::MIN };
    RateLimiter::new(RateLimits { bytes: Some(rate), operations: None }).unwrap()
}

#[test]
fn frames_of_the_guest_wait_for_their_limit() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (net, cable) = idle();
    let mut net = net.limited(RateLimiter::unlimited(), a_moment_after(1000));
    net.activate(driver.activation()).unwrap();

    driver.offer(1, &[&frame(1000)], &[]);
    driver.offer(1, &[&frame(1001)], &[]);
    net.queue_ready(1).unwrap();
    assert_eq!(driver.used_of(1), [(0, 0)]);
    serve_backend(&mut net, 1);

    assert_eq!(arrived(&cable), frame(1000));
    assert_eq!(arrived(&cable), frame(1001));
}

#[test]
fn frames_for_the_guest_wait_for_their_limit() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (net, cable) = idle();
    let mut net = net.limited(a_moment_after(1000), RateLimiter::unlimited());
    net.activate(driver.activation()).unwrap();

    (0..2).for_each(|_| _ = driver.offer(0, &[], &[1536]));
    cable.send(&frame(1000)).unwrap();
    cable.send(&frame(1001)).unwrap();
    net.backend_ready(0, EventSet::IN).unwrap();
    assert_eq!(driver.used().len(), 1);
    serve_backend(&mut net, 1);

    assert_eq!(driver.written(0, 1), with_num_buffers(frame(1001), 1));
}

#[test]
fn a_limit_of_one_direction_leaves_the_other_alone() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let (net, cable) = idle();
    let mut net = net.limited(exhausted(), RateLimiter::unlimited());
    net.activate(driver.activation()).unwrap();

    driver.offer(0, &[], &[1536]);
    driver.offer(1, &[&frame(1000)], &[]);
    cable.send(&frame(60)).unwrap();
    net.queue_ready(1).unwrap();
    net.queue_ready(0).unwrap();

    assert_eq!(arrived(&cable), frame(1000));
    assert_eq!(driver.used(), []);
}

#[test]
fn pairs_take_turns_in_what_a_limiter_admits() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (cables, _others): (Vec<_>, Vec<_>) = [cable(), cable()].into_iter().unzip();
    let limiter = a_moment_after(1000);
    let mut net = Net::new(cables, MAC).limited(RateLimiter::unlimited(), limiter);
    net.activate(driver.activation_with(SEVERAL)).unwrap();
    command(&mut net, &driver, CONTROL, &[4, 0, 2, 0]);

    for queue in [1, 3] {
        (0..3).for_each(|_| _ = driver.offer(queue, &[&frame(1000)], &[]));
    }
    net.queue_ready(1).unwrap();
    (0..3).for_each(|_| serve_backend(&mut net, 2));

    assert_eq!([driver.used_of(1).len(), driver.used_of(3).len()], [2, 2]);
}

/// An active device on a new tap that the kernel serves.
fn served_by_kernel(driver: &Driver<'_>, memory: &GuestMemoryMmap, tap: &str) -> Net<Tap> {
    let tap = vec![Tap::open(tap, Missing::Create).unwrap()];
    let vhost = Vhost::new(Vhost::open_files(1).unwrap(), &tap, memory).unwrap();
    let mut net = Net::new(tap, MAC).served_by(vhost);
    net.activate(driver.activation_with(1 << VIRTIO_F_VERSION_1)).unwrap();
    net
}

/// Waits for backend `index` and lets the device serve it.
fn serve_backend<L: Link>(net: &mut Net<L>, index: usize) {
    let fd = net.backends()[index].fd;
    let mut ready = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: `ready` is one descriptor that stays open during the call.
    assert_eq!(unsafe { libc::poll(&raw mut ready, 1, 10_000) }, 1);
    net.backend_ready(index, EventSet::IN).unwrap();
}

#[test]
#[ignore = "needs root, /dev/net/tun and /dev/vhost-net"]
fn the_kernel_sends_frames_and_says_so() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let mut net = served_by_kernel(&driver, &memory, "coracle-vhost");
    assert!(!net.serves(0) && !net.serves(1));

    driver.offer(1, &[&frame(100)], &[]);
    driver.kick(1);
    serve_backend(&mut net, 0);

    assert_eq!(driver.used_of(1), [(0, 0)]);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
#[ignore = "needs root, /dev/net/tun and /dev/vhost-net"]
fn a_queue_the_kernel_cannot_use_needs_a_reset() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let mut net = served_by_kernel(&driver, &memory, "coracle-broken");

    driver.offer_descriptors(1, &[Descriptor::new(1 << 40, 100, 0, 0)]);
    driver.kick(1);
    serve_backend(&mut net, 1);

    assert!(driver.told_to_reset());
    assert!(net.active.is_none());
}

#[test]
#[ignore = "needs root, /dev/net/tun and /dev/vhost-net"]
fn the_kernel_leaves_the_queues_of_a_driver_that_is_gone_alone() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let mut net = served_by_kernel(&driver, &memory, "coracle-gone");

    net.reset();
    driver.offer(1, &[&frame(100)], &[]);
    driver.kick(1);
    let fd = net.backends()[0].fd;
    let mut signal = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: `signal` is one descriptor that stays open during the call.
    assert_eq!(unsafe { libc::poll(&raw mut signal, 1, 500) }, 0);

    assert_eq!(driver.used_of(1), []);
}

/// Who has 192.0.2.1? Tell 192.0.2.2 at [`MAC`].
fn arp_request() -> Vec<u8> {
    let ethernet = [&[0xff; 6][..], &MAC, &[0x08, 0x06]].concat();
    let kind = [0, 1, 8, 0, 6, 4, 0, 1];
    let addresses = [&MAC[..], &[192, 0, 2, 2], &[0; 6], &[192, 0, 2, 1]].concat();
    [&[0; HEADER_BYTES][..], &ethernet, &kind, &addresses].concat()
}

#[test]
#[ignore = "needs root, /dev/net/tun and ip(8)"]
fn the_host_answers_over_a_tap() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let mut net = Net::new(vec![Tap::open("coracle-arp", Missing::Create).unwrap()], MAC);
    let offloads = RECEIVE_OFFLOADS.iter().fold(0, |bits, (feature, _)| bits | 1 << feature);
    net.activate(driver.activation_with(MERGEABLE | offloads)).unwrap();
    let ip = "ip addr add 192.0.2.1/24 dev coracle-arp && ip link set coracle-arp up";
    assert!(std::process::Command::new("sh").args(["-c", ip]).status().unwrap().success());

    (0..60).for_each(|_| _ = driver.offer(0, &[], &[1536]));
    driver.offer(1, &[&arp_request()], &[]);
    net.queue_ready(1).unwrap();
    // The host has more to say than the answer.
    let is_answer =
        |nth| driver.written(0, nth).get(24..34) == Some(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    while !(0..driver.used().len()).any(is_answer) {
        net.queue_ready(0).unwrap();
    }
}

#[test]
fn a_device_built_anew_fills_the_buffers_that_the_old_one_held() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 2);
    let features = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let (mut old, old_cable) = active(&driver, features);
    (0..3).for_each(|_| _ = driver.offer(0, &[], &[2048]));
    old_cable.send(&frame(100)).unwrap();
    old.queue_ready(0).unwrap();
    driver.offer(1, &[&frame(60)], &[]);

    let (mut new, cable) = idle();
    let offloads = new.links.all()[0].offloads.clone();
    driver.hand_over(features, &mut old, &mut new);
    cable.send(&frame(200)).unwrap();
    new.queue_ready(0).unwrap();
    new.queue_ready(1).unwrap();

    assert_eq!(driver.written(0, 0), with_num_buffers(frame(100), 1));
    assert_eq!(driver.written(0, 1), with_num_buffers(frame(200), 1));
    assert_eq!(arrived(&old_cable), b"");
    assert_eq!(arrived(&cable), frame(60));
    assert_eq!(offloads.load(Ordering::Relaxed), libc::TUN_F_CSUM);
}

#[test]
fn a_device_built_anew_uses_as_many_pairs_as_the_old_one() {
    let memory = memory();
    let driver = Driver::with_queues(&memory, 5);
    let (mut old, _old_cables) = two_pairs(&driver, SEVERAL);
    driver.offer(CONTROL, &[&[4, 0, 2, 0]], &[1]);
    old.queue_ready(CONTROL).unwrap();

    let (ours, _first) = cable();
    let (other, second) = cable();
    let mut new = Net::new(vec![ours, other], MAC);
    driver.hand_over(SEVERAL, &mut old, &mut new);
    driver.offer(3, &[&frame(60)], &[]);
    new.queue_ready(3).unwrap();

    assert_eq!(arrived(&second), frame(60));
    driver.offer(CONTROL, &[&[4, 0, 1, 0]], &[1]);
    new.queue_ready(CONTROL).unwrap();
    assert_eq!(driver.written(CONTROL, 1), [0]);
}
