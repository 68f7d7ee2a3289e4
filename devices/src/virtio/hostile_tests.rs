//! Drivers that write anything anywhere, against every device: none of them may panic or hang.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};
use std::{fs, io};

use event_manager::EventSet;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::block::{Access, Block, Disk, Ring};
use super::console::Console;
use super::fs::{Fs, Server};
use super::mmio::{MMIO_WINDOW, MmioTransport, RegisterPage};
use super::net::{Link, Net};
use super::rate_limit::RateLimiter;
use super::rng::Rng;
use super::testing::{MEMORY_BYTES, assert_shown, memory};
use super::vsock::{HostStream, Vsock};
use super::{DeviceTraits, VirtioDevice};
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// Starts of a driver, and what each of them does until it starts over.
const LIVES: usize = 60;
const STEPS: usize = 200;

/// Each queue has this much memory for its rings, and the buffers come behind them all.
const RINGS: u32 = 0x8000;
const AVAILABLE: u32 = 0x4000;
const USED: u32 = 0x6000;
const ALL_RINGS: usize = 0x4_0000;
const BUFFERS: u64 = ALL_RINGS as u64;

/// Numbers that look random and are the same each time (Marsaglia's xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn word(&mut self, end: u64) -> u32 {
        u32::try_from(self.below(end)).unwrap()
    }

    fn half(&mut self, end: u64) -> u16 {
        u16::try_from(self.below(end)).unwrap()
    }

    /// Something a length or an offset may be: mostly small, at times absurd.
    fn size(&mut self) -> u32 {
        match self.below(20) {
            0 => u32::MAX - self.word(64),
            1 => 0,
            2..5 => self.word(1 << 21),
            _ => self.word(6000),
        }
    }
}

/// A guest of which only the memory is real.
struct Hostile {
    random: Random,
    memory: GuestMemoryMmap,
    device: Arc<Mutex<dyn VirtioDevice>>,
    transport: MmioTransport,
    page: RegisterPage,
    traits: DeviceTraits,
    /// Makes the start of a buffer look like a request.
    request: fn(&mut Random) -> Vec<u8>,
}

impl Hostile {
    fn attack(device: impl VirtioDevice + 'static, request: fn(&mut Random) -> Vec<u8>) {
        let (memory, traits) = (memory(), device.traits());
        let device: Arc<Mutex<dyn VirtioDevice>> = Arc::new(Mutex::new(device));
        let line = Arc::new(IrqLine::new().unwrap());
        let page = RegisterPage::alone().unwrap();
        let transport = MmioTransport::new(memory.clone(), device.clone(), line, page.clone());
        let transport = transport.unwrap();
        transport.show();
        let random = Random(0x9e37_79b9_7f4a_7c15);
        let mut hostile = Hostile { random, memory, device, transport, page, traits, request };
        for _ in 0..LIVES {
            hostile.start();
            (0..STEPS).for_each(|_| hostile.step());
        }
    }

    fn set(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Starts the device properly, or nearly so.
    fn start(&mut self) {
        self.memory.write_slice(&[0; ALL_RINGS], GuestAddress(0)).unwrap();
        for status in [0, 1, 3] {
            self.set(VIRTIO_MMIO_STATUS, status);
        }
        let features = self.traits.features & self.random.next();
        let features = (features | 1 << VIRTIO_F_VERSION_1).to_le_bytes();
        for (select, word) in (0..).zip(features.chunks(4)) {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.transport.write(VIRTIO_MMIO_DRIVER_FEATURES.into(), word);
        }
        self.set(VIRTIO_MMIO_STATUS, 11);
        for (index, &max) in (0u32..).zip(self.traits.queue_sizes) {
            let rings = index * RINGS;
            let size = u32::from(max) >> self.random.below(4);
            self.set(VIRTIO_MMIO_QUEUE_SEL, index);
            self.set(VIRTIO_MMIO_QUEUE_NUM, size);
            self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, rings.max(0x10));
            self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings + AVAILABLE);
            self.set(VIRTIO_MMIO_QUEUE_USED_LOW, rings + USED);
            self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.set(VIRTIO_MMIO_STATUS, 15);
    }

    fn step(&mut self) {
        let queue = self.random.below(self.traits.queue_sizes.len() as u64);
        let queue = usize::try_from(queue).unwrap();
        (0..8).for_each(|_| self.scribble(queue));
        self.offer(queue);
        if self.random.below(50) == 0 {
            let (offset, value) = (self.random.below(MMIO_WINDOW), self.random.next());
            self.transport.write(offset, &value.to_le_bytes()[..4]);
            self.transport.read(offset, &mut [0; 8]);
        }
        let mut device = self.device.lock().unwrap();
        let outcome = match self.random.below(4) {
            0 if !device.backends().is_empty() => device.backend_ready(0, EventSet::all()),
            _ => device.queue_ready(queue),
        };
        // As the event loop does.
        if outcome.is_err() {
            device.reset();
        }
        assert_shown(&*device, &self.page);
    }

    /// Writes one descriptor, and something where it points.
    fn scribble(&mut self, queue: usize) {
        let size = u64::from(self.traits.queue_sizes[queue]);
        let entry = rings(queue).max(0x10) + self.random.below(size) * 16;
        let address = match self.random.below(20) {
            0 => self.random.next(),
            1 => self.random.below(MEMORY_BYTES as u64),
            _ => BUFFERS + self.random.below(64) * 0x1000,
        };
        let flags = match self.random.below(12) {
            0 => 4,
            1 => self.random.half(1 << 16),
            _ => self.random.half(4),
        };
        let next = self.random.half(size + 1);
        let descriptor = Descriptor::new(address, self.random.size(), flags, next);
        self.memory.write_obj(descriptor, GuestAddress(entry)).unwrap();
        let request = (self.request)(&mut self.random);
        let _ = self.memory.write_slice(&request, GuestAddress(address));
    }

    /// Makes some chains available.
    fn offer(&mut self, queue: usize) {
        let size = u64::from(self.traits.queue_sizes[queue]);
        let ring = rings(queue) + u64::from(AVAILABLE);
        for _ in 0..4 {
            let entry = GuestAddress(ring + 4 + self.random.below(size) * 2);
            let head = self.random.half(size);
            self.memory.write_obj(head, entry).unwrap();
        }
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        // At times more than there are descriptors.
        let more = if self.random.below(500) == 0 { 5000 } else { self.random.half(4) };
        self.memory.write_obj(index.wrapping_add(more), GuestAddress(ring + 2)).unwrap();
    }
}

/// Where the rings of `queue` begin.
fn rings(queue: usize) -> u64 {
    queue as u64 * u64::from(RINGS)
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn noise(random: &mut Random) -> Vec<u8> {
    (0..4).flat_map(|_| random.next().to_le_bytes()).collect()
}

#[test]
fn the_entropy_device_survives() {
    Hostile::attack(Rng::new(fs::File::open("/dev/urandom").unwrap()), noise);
}

#[test]
fn the_console_survives() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    Hostile::attack(Console::new(Some(theirs.into()), Box::new(io::sink())), noise);
    drop(ours);
}

/// A block device with two queues, and requests for it.
fn attack_block(ring: Option<Ring>) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = Disk::open(image.path(), Access::default()).unwrap();
    let block = Block::new(disk, "disk", 2, RateLimiter::unlimited(), ring);
    Hostile::attack(block, |random| {
        let mut request = words(&[random.word(15), 0, random.word(2100), 0]);
        // A range, for those who want one.
        request.extend(words(&[random.word(2100), 0, random.size(), random.word(3)]));
        request
    });
}

/// One end of a cable that always has frames.
struct Cable(UnixDatagram);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&self, _: libc::c_uint) -> io::Result<()> {
        Ok(())
    }

    fn mtu(&self) -> Option<u16> {
        Some(1500)
    }

    fn set_attached(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

impl Cable {
    fn new() -> Self {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            while ours.send(&[7; 1500]).is_ok() || ours.recv(&mut [0; 70_000]).is_ok() {}
        });
        Cable(theirs)
    }
}

#[test]
fn the_block_device_survives() {
    attack_block(None);
}

#[test]
#[ignore = "needs io_uring"]
fn the_block_device_with_a_ring_survives() {
    attack_block(Some(Ring::open().unwrap()));
}

#[test]
fn the_network_device_survives() {
    Hostile::attack(Net::new(vec![Cable::new()], [2, 0, 0, 0, 0, 1]), noise);
}

#[test]
fn the_network_device_of_several_queue_pairs_survives() {
    let cables = vec![Cable::new(), Cable::new()];
    Hostile::attack(Net::new(cables, [2, 0, 0, 0, 0, 1]), |random| {
        let command = [4, 0, u8::try_from(random.below(4)).unwrap(), 0];
        if random.below(2) == 0 { command.to_vec() } else { noise(random) }
    });
}

#[test]
fn the_socket_device_survives() {
    let (device, host) = Vsock::new(3).unwrap();
    for port in 0..4 {
        let zero = || Some(fs::File::options().read(true).write(true).open("/dev/zero").unwrap());
        let input = zero().map(Into::into);
        let output = zero().map(Into::into);
        host.listen(port, HostStream { input, output, on_close: None }).unwrap();
        let stream = HostStream { input: zero().map(Into::into), ..HostStream::default() };
        host.connect(port, stream).unwrap();
    }
    Hostile::attack(device, |random| {
        let ports =
            [random.word(4), random.word(4) + if random.below(2) == 0 { 1 << 30 } else { 0 }];
        let (length, op) = (random.size(), random.word(9));
        let (window, forwarded) = (random.size(), random.size());
        let socket_type = 1 | op << 16;
        words(&[3, 0, 2, 0, ports[0], ports[1], length, socket_type, 3, window, forwarded])
    });
}

#[test]
fn the_file_system_device_survives() {
    for read_only in [false, true] {
        let root = tempfile::TempDir::new().unwrap();
        fs::write(root.path().join("a"), [7; 5000]).unwrap();
        fs::create_dir(root.path().join("b")).unwrap();
        let server = Server::open(root.path(), read_only).unwrap();
        Hostile::attack(Fs::new("root", server), |random| {
            const FALLOCATE: u32 = 43;
            let opcode = Some(random.word(53)).filter(|&opcode| opcode != FALLOCATE).unwrap_or(1);
            let length = if random.below(4) == 0 { random.size() } else { 40 + random.word(80) };
            let node = if random.below(3) == 0 { random.word(9) } else { 1 };
            let mut request = words(&[length, opcode, 7, 0, node, 0, 0, 0, 1, 0]);
            let body: Vec<u32> = (0..random.below(12)).map(|_| random.size()).collect();
            request.extend(words(&body));
            let names: [&[u8]; 4] = [b"a\0", b"b\0", b"..\0", b"c\0d\0"];
            request.extend(names[usize::from(random.half(4))]);
            request
        });
    }
}
