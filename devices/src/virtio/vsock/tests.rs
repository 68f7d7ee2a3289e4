//! The device as its guest and its host see it, without a VM.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::Shutdown;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::credit::{BUDGET_BYTES, LEAST_WINDOW_BYTES, WINDOW_BYTES};
use super::packet::{
    HEADER_LENGTH, HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::*;
use crate::listener::Listener;
use crate::virtio::testing::{AVAILABLE, Driver, QUEUE_SIZE, RINGS, USED, memory};

const CID: u32 = 3;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 5000;
/// More than the 4 KiB of a Linux guest, so that a test moves much data in few packets.
const RECEIVE_BYTES: u32 = 0x8000;
const RECEIVE_BUFFERS: usize = 32;

/// A guest with a driver that keeps the receive queue full of one-piece buffers, as Linux does.
struct Guest<'m> {
    device: Vsock,
    host: Host,
    driver: Driver<'m>,
    /// Packets taken from the receive queue so far.
    taken: usize,
    /// What each packet says about the guest's buffer.
    window: u32,
    forwarded: u32,
}

type Packet = (Header, Vec<u8>);

impl<'m> Guest<'m> {
    fn boot(memory: &'m GuestMemoryMmap) -> Self {
        let (device, host) = Vsock::new(CID).unwrap();
        Guest::boot_with(memory, device, host)
    }

    fn boot_with(memory: &'m GuestMemoryMmap, device: Vsock, host: Host) -> Self {
        let driver = Driver::with_queues(memory, 3);
        let mut guest = Guest { device, host, driver, taken: 0, window: 256 << 10, forwarded: 0 };
        guest.device.activate(guest.driver.activation()).unwrap();
        (0..RECEIVE_BUFFERS).for_each(|_| _ = guest.driver.offer(0, &[], &[RECEIVE_BYTES]));
        guest.device.queue_ready(0).unwrap();
        guest
    }

    /// Runs the event loop once and takes what arrived.
    fn packets(&mut self) -> Vec<Packet> {
        self.device.backend_ready(0, EventSet::IN).unwrap();
        let packets: Vec<Packet> = (self.taken..self.driver.used().len())
            .map(|nth| self.driver.written(0, nth))
            .map(|bytes| {
                let (header, data) = bytes.split_first_chunk().unwrap();
                (Header::decode(header), data.to_vec())
            })
            .collect();
        self.taken += packets.len();
        packets.iter().for_each(|_| _ = self.driver.offer(0, &[], &[RECEIVE_BYTES]));
        self.device.queue_ready(0).unwrap();
        packets
    }

    fn only_packet(&mut self) -> Packet {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    fn ops(&mut self) -> Vec<Op> {
        self.packets().iter().map(|(header, _)| Op::from_number(header.op).unwrap()).collect()
    }

    fn header(&self, op: Op, host_port: u32) -> Header {
        Header {
            source_cid: CID.into(),
            destination_cid: HOST_CID,
            source_port: GUEST_PORT,
            destination_port: host_port,
            socket_type: TYPE_STREAM,
            op: op as u16,
            buffer_bytes: self.window,
            forwarded: self.forwarded,
            ..Header::default()
        }
    }

    /// Sends a packet as Linux does: the header and the data in buffers of their own.
    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        let header = header.encode();
        let buffers: &[&[u8]] = if data.is_empty() { &[&header] } else { &[&header, data] };
        self.driver.offer(1, buffers, &[]);
        self.device.queue_ready(1).unwrap();
    }

    fn send(&mut self, op: Op, host_port: u32) {
        let header = self.header(op, host_port);
        self.send_raw(&header, &[]);
    }

    fn shutdown(&mut self, host_port: u32, flags: u32) {
        let header = Header { flags, ..self.header(Op::Shutdown, host_port) };
        self.send_raw(&header, &[]);
    }

    fn data(&mut self, host_port: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        let header = Header { length, ..self.header(Op::Data, host_port) };
        self.send_raw(&header, data);
    }

    /// Connects to `PORT`, on which the host waits with `stream`.
    fn connect(&mut self, stream: HostStream) {
        self.host.listen(PORT, stream).unwrap();
        assert!(self.packets().is_empty());
        self.send(Op::Request, PORT);
        assert_eq!(self.packets()[0].0.op, Op::Response as u16);
    }
}

fn socket() -> (UnixStream, HostStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let input = Some(theirs.try_clone().unwrap().into());
    (ours, HostStream { input, output: Some(theirs.into()), on_close: None })
}

fn pipe() -> (File, OwnedFd, OwnedFd, File) {
    fn one() -> (OwnedFd, OwnedFd) {
        let mut fds = [0; 2];
        // SAFETY: `fds` has room for the two descriptors, which nobody else owns afterwards.
        unsafe {
            assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC), 0);
            (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
        }
    }
    let (input, writer) = one();
    let (reader, output) = one();
    (writer.into(), input, output, reader.into())
}

fn is_blocked<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

fn available(reader: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // It ends with EAGAIN, or at the end of the file.
    let _ = reader.read_to_end(&mut bytes);
    bytes
}

#[test]
fn the_configuration_space_is_the_context_identifier() {
    let (device, _host) = Vsock::new(0x0102).unwrap();
    let mut whole = [0xff; 8];
    let mut past = [0xff; 2];

    device.read_config(0, &mut whole);
    device.read_config(u64::MAX, &mut past);

    assert_eq!(whole, [2, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(past, [0, 0]);
}

#[test]
fn a_host_stream_reaches_the_guest_and_data_flows_both_ways() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    ours.write_all(b"early").unwrap();

    guest.host.connect(GUEST_PORT, stream).unwrap();
    let (request, _) = guest.only_packet();
    assert_eq!(request.op, Op::Request as u16);
    assert_eq!((request.source_cid, request.destination_cid), (HOST_CID, CID.into()));
    assert_eq!((request.destination_port, request.socket_type), (GUEST_PORT, TYPE_STREAM));
    assert_eq!(request.buffer_bytes, LEAST_WINDOW_BYTES);

    guest.send(Op::Response, request.source_port);
    let (header, data) = guest.only_packet();
    assert_eq!((header.op, header.length), (Op::Data as u16, 5));
    assert_eq!(data, b"early");

    guest.data(request.source_port, b"answer");
    assert_eq!(available(&mut ours), b"answer");
}

#[test]
fn a_stream_asked_for_before_activation_is_requested_after_it() {
    let (mut device, host) = Vsock::new(CID).unwrap();
    let (_ours, stream) = socket();
    host.connect(GUEST_PORT, stream).unwrap();
    device.backend_ready(0, EventSet::IN).unwrap();
    // A driver resets a device before it uses it.
    device.reset();

    let memory = memory();
    let mut guest = Guest::boot_with(&memory, device, host);

    assert_eq!(guest.ops(), [Op::Request]);
}

#[test]
fn a_guest_that_is_quicker_than_the_event_finds_the_port_open() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();

    guest.host.listen(PORT, stream).unwrap();
    guest.send(Op::Request, PORT);

    assert_eq!(guest.packets()[0].0.op, Op::Response as u16);
}

#[test]
fn a_refused_stream_is_closed() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.host.connect(GUEST_PORT, stream).unwrap();
    let (request, _) = guest.only_packet();

    guest.send(Op::Reset, request.source_port);

    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_port_accepts_one_connection() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();
    guest.connect(stream);

    let again = Header { source_port: GUEST_PORT + 1, ..guest.header(Op::Request, PORT) };
    guest.send_raw(&again, &[]);

    let (header, _) = guest.only_packet();
    assert_eq!((header.op, header.destination_port), (Op::Reset as u16, GUEST_PORT + 1));
}

#[test]
fn an_unknown_port_is_refused_whatever_is_sent_to_it() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);

    for op in [Op::Request, Op::Response, Op::Data, Op::Shutdown, Op::CreditRequest] {
        guest.send(op, 9);

        let (header, _) = guest.only_packet();
        assert_eq!(header.op, Op::Reset as u16);
        assert_eq!((header.source_port, header.destination_port), (9, GUEST_PORT));
    }
    guest.send(Op::Reset, 9);
    assert!(guest.packets().is_empty());
}

#[test]
fn the_end_of_the_input_leaves_the_other_direction_open() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.connect(stream);

    ours.shutdown(Shutdown::Write).unwrap();
    let (header, _) = guest.only_packet();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_SEND));

    guest.data(PORT, b"still here");
    assert_eq!(available(&mut ours), b"still here");
    guest.shutdown(PORT, SHUTDOWN_SEND);
    assert_eq!(guest.ops(), [Op::Reset]);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guest_that_stops_sending_still_receives() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.connect(stream);

    guest.shutdown(PORT, SHUTDOWN_SEND);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);

    ours.write_all(b"more").unwrap();
    assert_eq!(guest.only_packet().1, b"more");
}

#[test]
fn a_guest_that_closes_gets_its_reset_after_its_last_byte_is_written() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    let (closed, on_close) = UnixStream::pair().unwrap();
    closed.set_nonblocking(true).unwrap();
    guest.connect(HostStream { on_close: Some(on_close.into()), ..stream });
    fill_output(&mut guest);

    guest.shutdown(PORT, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert!(!guest.ops().contains(&Op::Reset));
    assert!(is_blocked(&(&closed).read(&mut [0])));

    let mut received = 0;
    while received < WINDOW_BYTES as usize {
        received += available(&mut ours).len();
        guest.device.backend_ready(0, EventSet::IN).unwrap();
    }
    assert_eq!(guest.ops(), [Op::Reset]);
    assert_eq!((&closed).read(&mut [0]).unwrap(), 0);
}

/// Sends as much as the guest may, so that some of it waits in the host's memory; the sockets'
/// own buffers are smaller than that.
fn fill_output(guest: &mut Guest<'_>) {
    for _ in 0..WINDOW_BYTES / 0x4000 {
        guest.data(PORT, &[7; 0x4000]);
    }
}

#[test]
fn a_guest_that_resets_still_gets_its_last_bytes_out() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.connect(stream);
    fill_output(&mut guest);

    guest.send(Op::Reset, PORT);
    let mut received = Vec::new();
    while received.len() < WINDOW_BYTES as usize {
        received.extend(available(&mut ours));
        guest.device.backend_ready(0, EventSet::IN).unwrap();
    }

    assert_eq!(received, vec![7; WINDOW_BYTES as usize]);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_stream_without_input_is_half_closed_at_once() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();

    guest.host.connect(GUEST_PORT, HostStream { input: None, ..stream }).unwrap();
    let (request, _) = guest.only_packet();
    guest.send(Op::Response, request.source_port);

    let (header, _) = guest.only_packet();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_SEND));
}

#[test]
fn a_greeting_comes_before_the_input_and_its_end() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    ours.write_all(b"input").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();

    guest.host.greet(GUEST_PORT, b"hello".to_vec(), stream).unwrap();
    let (request, _) = guest.only_packet();
    guest.window = 3;
    guest.send(Op::Response, request.source_port);
    assert_eq!(guest.packets()[0].1, b"hel");
    guest.window = 100;
    guest.send(Op::CreditUpdate, request.source_port);

    let packets = guest.packets();
    assert_eq!((&packets[0].1[..], &packets[1].1[..]), (&b"lo"[..], &b"input"[..]));
    assert_eq!(packets[2].0.op, Op::Shutdown as u16);
}

#[test]
fn a_greeting_without_input_is_sent_before_the_half_close() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();

    guest.host.greet(GUEST_PORT, b"hello".to_vec(), HostStream { input: None, ..stream }).unwrap();
    let (request, _) = guest.only_packet();
    guest.window = 0;
    guest.send(Op::Response, request.source_port);
    assert!(!guest.ops().contains(&Op::Shutdown));
    guest.window = 100;
    guest.send(Op::CreditUpdate, request.source_port);

    assert_eq!(guest.ops(), [Op::Data, Op::Shutdown]);
}

#[test]
fn a_stream_without_output_discards_and_returns_the_credit() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();
    guest.connect(HostStream { output: None, ..stream });

    fill_output(&mut guest);
    guest.data(PORT, b"more than one window");

    let packets = guest.packets();
    assert!(packets.iter().all(|(header, _)| header.op == Op::CreditUpdate as u16));
    assert!(packets.last().unwrap().0.forwarded >= WINDOW_BYTES / 4 * 3);
}

#[test]
fn an_output_that_nobody_reads_resets_the_stream() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_writer, input, output, reader) = pipe();
    guest.connect(HostStream { input: Some(input), output: Some(output), on_close: None });
    drop(reader);

    guest.data(PORT, b"nobody hears");

    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn a_slow_output_holds_back_only_its_own_stream() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_slow, stream) = socket();
    guest.connect(stream);
    fill_output(&mut guest);
    let (mut quick, stream) = socket();
    guest.host.connect(GUEST_PORT + 1, stream).unwrap();
    let request = guest.packets().pop().unwrap().0;
    let from_quick = |header: Header| Header { source_port: GUEST_PORT + 1, ..header };
    let response = from_quick(guest.header(Op::Response, request.source_port));
    guest.send_raw(&response, &[]);

    let data = from_quick(Header { length: 2, ..guest.header(Op::Data, request.source_port) });
    guest.send_raw(&data, b"go");

    assert_eq!(available(&mut quick), b"go");
}

#[test]
fn more_than_the_window_resets_the_stream() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();
    guest.connect(stream);
    fill_output(&mut guest);
    assert!(!guest.ops().contains(&Op::Reset));

    // What the socket took returned credit, so the window has to be filled again.
    for _ in 0..WINDOW_BYTES / 0x4000 + 1 {
        guest.data(PORT, &[7; 0x4000]);
    }

    assert!(guest.ops().contains(&Op::Reset));
}

#[test]
fn nothing_is_read_for_a_guest_without_room_until_it_has_some() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.window = 4;
    guest.connect(stream);

    ours.write_all(b"sixteen bytes...").unwrap();
    assert_eq!(guest.packets()[0].1, b"sixt");
    assert!(guest.packets().iter().all(|(header, _)| header.op == Op::CreditRequest as u16));
    assert!(guest.packets().is_empty());

    guest.forwarded = 4;
    guest.window = 100;
    guest.send(Op::CreditUpdate, PORT);
    assert_eq!(guest.only_packet().1, b"een bytes...");
}

#[test]
fn a_large_window_is_filled() {
    const BYTES: u64 = 3 << 20;
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    guest.window = 8 << 20;
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    let input = Some(file.try_clone().unwrap().into());
    guest.connect(HostStream { input, ..HostStream::default() });

    // It never says what it took: Linux sees no reason to while most of its window is free.
    (0..100).for_each(|_| _ = guest.packets());

    assert_eq!(file.stream_position().unwrap(), BYTES);
}

#[test]
fn one_packet_takes_a_bounded_part_of_a_huge_buffer() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.connect(stream);
    // Refusals use the small buffers up.
    (0..RECEIVE_BUFFERS).for_each(|_| guest.send(Op::Data, PORT + 1));
    guest.driver.offer(0, &[], &[RECEIVE_BYTES * 4]);

    ours.write_all(&[7; 100 << 10]).unwrap();
    guest.device.backend_ready(0, EventSet::IN).unwrap();

    let (_, bytes) = *guest.driver.used().last().unwrap();
    assert_eq!(bytes, HEADER_LENGTH + (64 << 10));
}

#[test]
fn a_length_beyond_the_packet_resets_the_stream() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();
    guest.connect(stream);

    let header = Header { length: 1000, ..guest.header(Op::Data, PORT) };
    guest.send_raw(&header, b"short");

    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn a_length_of_four_gibibytes_resets_the_stream() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, stream) = socket();
    guest.connect(stream);

    let header = Header { length: u32::MAX, ..guest.header(Op::Data, PORT) };
    guest.send_raw(&header, b"short");

    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn packets_and_buffers_that_make_no_sense_are_survived() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.connect(stream);

    let readable = |address, length| Descriptor::new(address, length, 0, 0);
    let lies = [
        vec![readable(0x1_0000, 10)],
        vec![Descriptor::new(0x1_0000, 44, 2, 0)],
        vec![readable(u64::MAX - 8, 44)],
        vec![readable(0x7fff_ffff_0000, u32::MAX)],
        vec![readable(0x1_0000, 0); 40],
    ];
    for lie in &lies {
        guest.driver.offer_descriptors(1, lie);
        guest.device.queue_ready(1).unwrap();
    }
    let stranger = Header { source_cid: 77, ..guest.header(Op::Reset, PORT) };
    guest.send_raw(&stranger, &[]);
    let unknown = Header { op: 99, destination_port: 9, ..guest.header(Op::Data, PORT) };
    guest.send_raw(&unknown, &[]);
    assert_eq!(guest.ops(), [Op::Reset]);

    guest.data(PORT, b"alive");
    assert_eq!(available(&mut ours), b"alive");
}

#[test]
fn a_receive_buffer_without_room_for_data_is_returned_empty() {
    let memory = memory();
    let (mut device, host) = Vsock::new(CID).unwrap();
    let driver = Driver::with_queues(&memory, 3);
    device.activate(driver.activation()).unwrap();
    let (_ours, stream) = socket();
    host.connect(GUEST_PORT, stream).unwrap();

    driver.offer(0, &[], &[HEADER_LENGTH]);
    driver.offer(0, &[&[0; 4096]], &[]);
    driver.offer(0, &[], &[20, 30]);
    device.backend_ready(0, EventSet::IN).unwrap();

    assert_eq!(driver.used(), [(0, 0), (1, 0), (2, HEADER_LENGTH)]);
}

/// Makes everything that was given back available again, unless so many packets were taken.
fn refill(memory: &GuestMemoryMmap, packets: u16) {
    let used = |rings| memory.read_obj::<u16>(GuestAddress(rings + USED + 2)).unwrap();
    if used(RINGS) < packets {
        for rings in [0, RINGS] {
            let available = GuestAddress(rings + AVAILABLE + 2);
            memory.write_obj(used(rings).wrapping_add(QUEUE_SIZE), available).unwrap();
        }
    }
}

#[test]
fn a_guest_that_refills_both_queues_for_ever_does_not_keep_the_event_loop() {
    const PACKETS: u16 = 20_000;
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let refused = guest.header(Op::Request, PORT).encode();
    let packet = guest.driver.offer(1, &[&refused], &[]);
    (1..QUEUE_SIZE).for_each(|_| guest.driver.offer_head(1, packet));
    (32..QUEUE_SIZE).for_each(|head| guest.driver.offer_head(0, head - 32));
    let other_vcpu = memory.clone();
    guest.driver.on_interrupt(move || refill(&other_vcpu, PACKETS));

    guest.device.queue_ready(1).unwrap();

    let taken: u16 = memory.read_obj(GuestAddress(RINGS + USED + 2)).unwrap();
    assert!(taken < 2000, "{taken} packets in one go");
    assert!(guest.driver.kicked(1), "the rest has its turn later");
}

#[test]
fn refusals_wait_for_the_guest_without_growing() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let request = guest.header(Op::Request, 9).encode();
    let offered = 150;

    for _ in 0..offered / 3 {
        (0..3).for_each(|_| _ = guest.driver.offer(1, &[&request], &[]));
        guest.device.queue_ready(1).unwrap();
    }
    let taken = guest.driver.used_of(1).len();
    assert!(taken < offered, "the device has to stop at some point");
    let mut refused = 0;
    while refused < offered {
        refused += guest.packets().len();
    }

    assert_eq!(guest.driver.used_of(1).len(), offered);
}

#[test]
fn a_guest_that_begins_and_ends_streams_and_takes_nothing_makes_nothing_grow() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let mut others = Vec::new();

    for _ in 0..4 * RECEIVE_BUFFERS {
        let (other, stream) = socket();
        others.push(other);
        guest.host.listen(PORT, stream).unwrap();
        guest.send(Op::Request, PORT);
        guest.send(Op::Reset, PORT);
    }

    assert!(guest.driver.used_of(0).len() <= RECEIVE_BUFFERS);
    assert_eq!(guest.device.muxer.turns(), 0);
}

#[test]
fn data_spread_over_several_buffers_is_joined() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.connect(stream);

    let header = Header { length: 6, ..guest.header(Op::Data, PORT) };
    let header = header.encode();
    guest.driver.offer(1, &[&header[..20], &header[20..], b"ab", b"cdef"], &[]);
    guest.device.queue_ready(1).unwrap();

    assert_eq!(available(&mut ours), b"abcdef");
}

#[test]
fn regular_files_and_dev_null_are_streams_too() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"from a file").unwrap();
    file.rewind().unwrap();
    let null = File::options().write(true).open("/dev/null").unwrap();
    let (input, output) = (Some(file.into()), Some(null.into()));

    guest.host.connect(GUEST_PORT, HostStream { input, output, on_close: None }).unwrap();
    let (request, _) = guest.only_packet();
    guest.send(Op::Response, request.source_port);
    guest.data(request.source_port, b"into the void");
    guest.send(Op::CreditRequest, request.source_port);

    let packets = guest.packets();
    assert_eq!(packets[0].1, b"from a file");
    assert_eq!(packets[1].0.op, Op::Shutdown as u16);
    assert_eq!(packets[2].0.forwarded, 13);
}

#[test]
fn ten_megabytes_cross_two_pipes_in_order() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut writer, input, output, mut reader) = pipe();
    guest.connect(HostStream { input: Some(input), output: Some(output), on_close: None });
    let total = 10 << 20;
    let pattern = |offset: usize| u8::try_from((offset / 251 + offset) % 256).unwrap();
    let (mut written, mut echoed, mut read) = (0, 0, 0);

    while read < total {
        let chunk: Vec<u8> = (written..total.min(written + 0x8000)).map(pattern).collect();
        written += writer.write(&chunk).unwrap_or(0);
        for (header, data) in guest.packets() {
            // The echo stays within the window, as at most a pipe full is under way.
            if header.op == Op::Data as u16 {
                echoed += data.len();
                guest.forwarded = guest.forwarded.wrapping_add(header.length);
                guest.data(PORT, &data);
            }
        }
        for byte in available(&mut reader) {
            assert_eq!(byte, pattern(read));
            read += 1;
        }
    }

    assert_eq!((written, echoed), (total, total));
}

#[test]
fn a_reset_of_the_device_ends_its_streams_and_is_reported() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (mut ours, stream) = socket();
    guest.connect(stream);

    guest.device.reset();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);

    let memory = crate::virtio::testing::memory();
    let mut guest = Guest::boot_with(&memory, guest.device, guest.host);
    guest.driver.offer(2, &[], &[4]);
    guest.device.queue_ready(2).unwrap();
    assert_eq!(guest.driver.written(2, 0), [0; 4]);
    assert!(guest.packets().is_empty());
}

#[test]
fn every_change_on_the_host_is_an_edge_on_the_one_backend() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let epoll = Epoll::new().unwrap();
    let [backend] = guest.device.backends()[..] else { panic!("one backend") };
    let event = EpollEvent::new(backend.events | EventSet::EDGE_TRIGGERED, 1);
    epoll.ctl(ControlOperation::Add, backend.fd, event).unwrap();
    let pending = || epoll.wait(0, &mut [EpollEvent::default(); 4]).unwrap();
    assert_eq!(pending(), 0);

    let (mut ours, stream) = socket();
    guest.host.listen(PORT, stream).unwrap();
    assert_eq!(pending(), 1);
    guest.packets();
    guest.send(Op::Request, PORT);
    guest.packets();
    pending();
    guest.packets();
    assert_eq!(pending(), 0);

    for _ in 0..3 {
        ours.write_all(b"x").unwrap();
        assert_eq!(pending(), 1);
        assert_eq!(guest.only_packet().1, b"x");
        assert_eq!(pending(), 0);
    }
}

/// A guest that other processes reach through the unix socket `v` in `folder`.
fn boot_with_socket<'m>(memory: &'m GuestMemoryMmap, folder: &tempfile::TempDir) -> Guest<'m> {
    let socket = Listener::bind(&folder.path().join("v")).unwrap();
    let (device, host) = Vsock::with_socket(CID, socket).unwrap();
    Guest::boot_with(memory, device, host)
}

fn dial(folder: &tempfile::TempDir) -> UnixStream {
    let client = UnixStream::connect(folder.path().join("v")).unwrap();
    client.set_nonblocking(true).unwrap();
    client
}

/// A client that asked for `GUEST_PORT`, and the REQUEST the guest got for it.
fn call(guest: &mut Guest<'_>, folder: &tempfile::TempDir) -> (UnixStream, Header) {
    let mut client = dial(folder);
    client.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes()).unwrap();
    let request = settled(guest).pop().unwrap().0;
    assert_eq!(request.op, Op::Request as u16);
    (client, request)
}

/// Every packet until none comes any more. Who is let in is heard the next time round.
fn settled(guest: &mut Guest<'_>) -> Vec<Packet> {
    let mut all = guest.packets();
    loop {
        let more = guest.packets();
        if more.is_empty() {
            return all;
        }
        all.extend(more);
    }
}

#[test]
fn a_client_of_the_socket_hears_ok_and_has_a_stream() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let (mut client, request) = call(&mut guest, &folder);
    assert_eq!(request.destination_port, GUEST_PORT);
    assert!(is_blocked(&client.read(&mut [0])));

    guest.send(Op::Response, request.source_port);
    guest.data(request.source_port, b"hello");

    let expected = format!("OK {}\nhello", request.source_port);
    assert_eq!(available(&mut client), expected.as_bytes());
    client.write_all(b"answer").unwrap();
    assert_eq!(guest.only_packet().1, b"answer");
}

#[test]
fn a_client_the_guest_refuses_is_hung_up_on() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let (mut client, request) = call(&mut guest, &folder);

    guest.send(Op::Reset, request.source_port);

    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_a_client_says_before_the_ok_reaches_the_guest() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let mut client = dial(&folder);
    let text = "x".repeat(100);

    client.write_all(format!("CONNECT {GUEST_PORT}\n{text}").as_bytes()).unwrap();
    let request = settled(&mut guest).pop().unwrap().0;
    guest.send(Op::Response, request.source_port);

    let data: Vec<u8> = settled(&mut guest).into_iter().flat_map(|(_, data)| data).collect();
    assert_eq!(data, text.as_bytes());
}

#[test]
fn a_line_that_comes_in_pieces_is_put_together() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let mut client = dial(&folder);

    for piece in ["CONN", "ECT 50", "00"] {
        client.write_all(piece.as_bytes()).unwrap();
        assert!(settled(&mut guest).is_empty());
    }
    client.write_all(b"\n").unwrap();

    assert_eq!(settled(&mut guest)[0].0.destination_port, GUEST_PORT);
}

#[test]
fn a_client_that_says_something_else_or_too_much_is_hung_up_on() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);

    for line in ["GET / HTTP/1.1\r\n".to_owned(), "1".repeat(33)] {
        let mut client = dial(&folder);
        client.write_all(line.as_bytes()).unwrap();

        assert!(settled(&mut guest).is_empty());

        // What was not read makes the end a reset.
        let end = client.read(&mut [0]);
        assert!(!is_blocked(&end) && !matches!(end, Ok(1)), "{end:?}");
    }
}

#[test]
fn silent_clients_do_not_close_the_door() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    raise_descriptor_limit();
    let mut first = dial(&folder);
    let _silent: Vec<UnixStream> = (0..1024)
        .map(|_| {
            let client = dial(&folder);
            guest.packets();
            client
        })
        .collect();

    let (_client, request) = call(&mut guest, &folder);

    assert_eq!(request.destination_port, GUEST_PORT);
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_client_at_the_door_is_an_edge_on_the_one_backend() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let epoll = Epoll::new().unwrap();
    let [backend] = guest.device.backends()[..] else { panic!("one backend") };
    let event = EpollEvent::new(backend.events | EventSet::EDGE_TRIGGERED, 1);
    epoll.ctl(ControlOperation::Add, backend.fd, event).unwrap();
    let pending = || epoll.wait(0, &mut [EpollEvent::default(); 4]).unwrap();
    let mut client = dial(&folder);
    client.write_all(b"CONNECT 5000\n").unwrap();

    let mut packets = Vec::new();
    while pending() > 0 {
        packets.extend(guest.packets());
    }

    assert_eq!(packets.len(), 1);
}

#[test]
fn a_connection_of_the_guest_goes_to_the_socket_of_its_port() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let service = UnixListener::bind(folder.path().join("v_1024")).unwrap();

    guest.send(Op::Request, PORT);
    assert_eq!(guest.ops(), [Op::Response]);
    guest.data(PORT, b"request");

    let (mut stream, _) = service.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    assert_eq!(available(&mut stream), b"request");
    stream.write_all(b"reply").unwrap();
    assert_eq!(guest.only_packet().1, b"reply");
}

#[test]
fn a_port_on_which_nobody_of_the_host_listens_is_refused() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);

    guest.send(Op::Request, PORT);

    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn a_service_that_does_not_accept_does_not_stop_the_device() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let service = UnixListener::bind(folder.path().join("v_1024")).unwrap();
    // SAFETY: listening again on an open socket only changes how many may wait.
    assert_eq!(unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&service), 0) }, 0);

    let ops: Vec<Op> = (0..3)
        .flat_map(|nth| {
            let request = Header { source_port: 100 + nth, ..guest.header(Op::Request, PORT) };
            guest.send_raw(&request, &[]);
            guest.ops()
        })
        .collect();

    assert_eq!(ops, [Op::Response, Op::Reset, Op::Reset]);
}

#[test]
fn the_handle_comes_before_the_socket_of_a_port() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let service = UnixListener::bind(folder.path().join("v_1024")).unwrap();
    service.set_nonblocking(true).unwrap();
    let (mut ours, stream) = socket();

    guest.connect(stream);
    guest.data(PORT, b"in process");

    assert_eq!(available(&mut ours), b"in process");
    assert!(is_blocked(&service.accept()));
}

/// Streams take three descriptors each here: two of the device, one of the client.
fn raise_descriptor_limit() {
    // SAFETY: both calls only use the structure they are given.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
}

#[test]
fn two_thousand_streams_at_once_each_carry_their_own_bytes() {
    const STREAMS: usize = 2000;
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    raise_descriptor_limit();
    let mut clients = Vec::new();
    let mut ports = Vec::new();

    while clients.len() < STREAMS {
        let batch = (0..50).map(|_| dial(&folder));
        clients.extend(batch.map(|mut client| {
            client.write_all(b"CONNECT 5000\n").unwrap();
            client
        }));
        ports.extend(settled(&mut guest).into_iter().map(|(header, _)| header.source_port));
    }
    ports.iter().for_each(|&port| guest.send(Op::Response, port));
    for client in &mut clients {
        let answer = String::from_utf8(available(client)).unwrap();
        assert!(answer.starts_with("OK ") && answer.ends_with('\n'), "{answer:?}");
        client.write_all(answer.as_bytes()).unwrap();
    }
    let packets = settled(&mut guest);
    for (header, data) in &packets {
        assert_eq!(*data, format!("OK {}\n", header.source_port).into_bytes());
        guest.data(header.source_port, data);
    }

    assert_eq!(packets.len(), STREAMS);
    let echoes: std::collections::BTreeSet<_> = clients.iter_mut().map(available).collect();
    assert_eq!(echoes.len(), STREAMS);
}

#[test]
fn a_client_that_does_not_read_slows_only_its_own_stream() {
    const CHUNK: usize = 0x4000;
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = boot_with_socket(&memory, &folder);
    let (mut slow, to_slow) = call(&mut guest, &folder);
    let (mut quick, to_quick) = call(&mut guest, &folder);
    guest.send(Op::Response, to_slow.source_port);
    guest.send(Op::Response, to_quick.source_port);
    for client in [&mut slow, &mut quick] {
        assert!(available(client).starts_with(b"OK "));
    }

    // As much as the guest may send to somebody who reads nothing.
    (0..WINDOW_BYTES as usize / CHUNK).for_each(|_| guest.data(to_slow.source_port, &[1; CHUNK]));
    let mut received = 0;
    for _ in 0..256 {
        guest.data(to_quick.source_port, &[2; CHUNK]);
        received += available(&mut quick).len();
        assert!(settled(&mut guest).iter().all(|(header, _)| header.op != Op::Reset as u16));
    }
    assert_eq!(received, 256 * CHUNK);

    let mut late = Vec::new();
    while late.len() < WINDOW_BYTES as usize {
        late.extend(available(&mut slow));
        guest.packets();
    }
    assert_eq!(late, vec![1; WINDOW_BYTES as usize]);
}

/// The guest's end of a stream to `PORT` of the host.
struct Sender {
    port: u32,
    sent: u32,
    /// The last packet of the stream.
    heard: Header,
}

impl Sender {
    /// Connects from `port`; whatever comes out at the host can be read from the file.
    fn connect(guest: &mut Guest<'_>, port: u32) -> (Self, File) {
        let (_writer, _input, output, reader) = pipe();
        let stream = HostStream { output: Some(output), ..HostStream::default() };
        guest.host.listen(PORT, stream).unwrap();
        guest.packets();
        let request = guest.header(Op::Request, PORT);
        guest.send_raw(&Header { source_port: port, ..request }, &[]);
        let heard = settled(guest).pop().unwrap().0;
        (Sender { port, sent: 0, heard }, reader)
    }

    /// Sends as long as there is credit, but not many bytes more than `most`.
    fn send(&mut self, guest: &mut Guest<'_>, most: u32) {
        let before = self.sent;
        while self.sent - before < most {
            let end = self.heard.forwarded.wrapping_add(self.heard.buffer_bytes);
            let length = (end - self.sent).min(0x4000);
            if length == 0 {
                return;
            }
            let header = guest.header(Op::Data, PORT);
            let header = Header { source_port: self.port, length, ..header };
            guest.send_raw(&header, &vec![7; length as usize]);
            self.sent += length;
            self.hear(guest);
        }
    }

    fn hear(&mut self, guest: &mut Guest<'_>) {
        for (header, _) in settled(guest) {
            assert_eq!((header.op, header.destination_port), (Op::CreditUpdate as u16, self.port));
            self.heard = header;
        }
    }
}

#[test]
fn a_stream_goes_on_when_all_the_others_are_stuck() {
    const STUCK: u32 = 80;
    const STREAMED: usize = 1 << 20;
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    raise_descriptor_limit();

    let mut readers = Vec::new();
    for port in 1..=STUCK {
        let (mut sender, mut reader) = Sender::connect(&mut guest, port);
        for _ in 0..4 {
            sender.send(&mut guest, WINDOW_BYTES / 4);
            available(&mut reader);
            sender.hear(&mut guest);
        }
        sender.send(&mut guest, u32::MAX);
        readers.push(reader);
    }
    let promised = guest.device.muxer.promised();
    let (mut sender, mut reader) = Sender::connect(&mut guest, STUCK + 1);
    let mut received = 0;
    while received < STREAMED {
        sender.send(&mut guest, WINDOW_BYTES);
        received += available(&mut reader).len();
        sender.hear(&mut guest);
    }

    assert!(promised > BUDGET_BYTES / 2, "{promised}");
    assert!(promised <= BUDGET_BYTES + STUCK * LEAST_WINDOW_BYTES, "{promised}");
}

/// A stream of the host's that the guest has accepted: its other end, and the packet that asked for it.
fn streaming(guest: &mut Guest<'_>) -> (UnixStream, Header) {
    let (ours, theirs) = socket();
    guest.host.connect(GUEST_PORT, theirs).unwrap();
    let (request, _) = guest.only_packet();
    guest.send(Op::Response, request.source_port);
    (ours, request)
}

/// Puts a fresh device in the place of the guest's.
fn build_anew(guest: &mut Guest<'_>) {
    let (mut device, host) = Vsock::new(CID).unwrap();
    guest.driver.hand_over(0, &mut guest.device, &mut device);
    (guest.device, guest.host) = (device, host);
    guest.device.queue_ready(EVENT_QUEUE).unwrap();
}

#[test]
fn the_guest_of_a_device_built_anew_hears_that_its_streams_are_gone() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let (_ours, old) = streaming(&mut guest);
    guest.driver.offer(EVENT_QUEUE, &[], &[4]);
    guest.device.queue_ready(EVENT_QUEUE).unwrap();
    assert_eq!(guest.driver.used_of(EVENT_QUEUE), []);

    build_anew(&mut guest);

    assert_eq!(guest.driver.written(EVENT_QUEUE, 0), TRANSPORT_RESET);
    let (_ours, theirs) = socket();
    guest.host.connect(GUEST_PORT, theirs).unwrap();
    // It would take the new stream for one of those that are gone, and hear of these from elsewhere.
    guest.data(old.source_port, b"to nobody");
    assert!(settled(&mut guest).is_empty());
    guest.driver.offer(EVENT_QUEUE, &[], &[4]);
    guest.device.queue_ready(EVENT_QUEUE).unwrap();

    let packets = settled(&mut guest);
    let ops: Vec<_> = packets.iter().map(|(header, _)| Op::from_number(header.op)).collect();
    assert_eq!(ops, [Some(Op::Reset), Some(Op::Request)]);
    assert_ne!(packets[1].0.source_port, old.source_port);
}

#[test]
fn a_device_that_has_told_its_guest_of_the_end_of_streams_can_be_built_anew() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let _streaming = streaming(&mut guest);
    for _ in 0..2 {
        guest.driver.offer(EVENT_QUEUE, &[], &[4]);
    }

    build_anew(&mut guest);
    assert_eq!(guest.driver.used_of(EVENT_QUEUE).len(), 1);
    build_anew(&mut guest);

    // The second buffer was kept for nothing, so that it was there.
    assert_eq!(guest.driver.used_of(EVENT_QUEUE).len(), 2);
    assert_eq!(guest.driver.written(EVENT_QUEUE, 1), TRANSPORT_RESET);
}

#[test]
fn a_guest_without_streams_hears_nothing() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    guest.driver.offer(EVENT_QUEUE, &[], &[4]);

    let (mut device, _host) = Vsock::new(CID).unwrap();
    guest.driver.hand_over(0, &mut guest.device, &mut device);
    device.queue_ready(EVENT_QUEUE).unwrap();

    assert_eq!(guest.driver.used_of(EVENT_QUEUE), []);
}

#[test]
fn no_more_event_buffers_are_held_than_the_queue_has() {
    let memory = memory();
    let mut guest = Guest::boot(&memory);
    let _streaming = streaming(&mut guest);
    let (mut device, _host) = Vsock::new(CID).unwrap();
    guest.driver.hand_over(0, &mut guest.device, &mut device);

    for _ in 0..2 {
        (0..QUEUE_SIZE).for_each(|_| _ = guest.driver.offer(EVENT_QUEUE, &[], &[4]));
        device.queue_ready(EVENT_QUEUE).unwrap();
    }

    assert_eq!(guest.driver.used_of(EVENT_QUEUE).len(), 1);
    assert_eq!(device.held_events, usize::from(QUEUE_SIZE));
}
