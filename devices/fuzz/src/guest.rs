//! A guest of which only the memory is real, and the device it is given.

use std::sync::{Arc, Mutex};

use devices::bus::BusDevice;
use devices::interrupt::IrqLine;
use devices::virtio::mmio::{MmioTransport, RegisterPage};
use devices::virtio::subscriber::Subscriber;
use devices::virtio::{DeviceTraits, VirtioDevice};
use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bounds;
use crate::script::{INDIRECT, QUIET, Step, steps};

/// Regions of RAM with holes between them: start and size, in bytes. The last one is for memory that
/// is plugged in and out.
pub(crate) const REGIONS: [(u64, usize); 3] =
    [(0, 1 << 20), (2 << 20, 1 << 20), (4 << 20, 4 << 20)];

/// The rings of queue 0; those of the next queue come behind them, and so on.
const RINGS: u64 = 0x4000;
/// What each queue has for its descriptors and its rings, and where in there the rings are.
const RING_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x2800;

/// Buffers of good chains lie from here to the end of the first region.
const BUFFERS: u64 = 0x6_0000;

/// Most queues of any device here.
const MOST_QUEUES: u64 = 20;

/// Descriptor flags (virtio 1.2, section 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u16 = 4;

/// Status of a device that a driver has started and that did not break (virtio 1.2, section 2.1).
const RUNNING: u32 = 15;

/// Rounds of the event loop after each step: a device may ask to be called again for ever.
const ROUNDS: usize = 4;

/// What the other end of a device does for [`Step::Host`].
pub type HostEnd = Box<dyn FnMut(u8, &[u8])>;

/// What makes a guest's request refer to something that only its device can name.
pub type Patch = Box<dyn Fn(&mut [u8])>;

/// A guest with one device.
pub struct Guest {
    memory: GuestMemoryMmap,
    transport: MmioTransport,
    device: Arc<Mutex<dyn VirtioDevice>>,
    traits: DeviceTraits,
    events: EventManager<Subscriber>,
    host: HostEnd,
    patch: Patch,
    /// Where the next good chain has its first descriptor, for each queue.
    next_descriptor: Vec<u16>,
    next_buffer: u64,
    /// Sizes of the queues, as the last good start set them.
    sizes: Vec<u16>,
}

impl Guest {
    /// Boots with `device`, whose other end is `host`.
    pub fn new(device: impl VirtioDevice + 'static, host: HostEnd) -> Self {
        Guest::with_memory(memory(), Arc::new(Mutex::new(device)), host)
    }

    /// The same for a device that works on `memory`, which is [`memory`].
    pub fn with_memory(
        memory: GuestMemoryMmap,
        device: Arc<Mutex<dyn VirtioDevice>>,
        host: HostEnd,
    ) -> Self {
        bounds::begin();
        let traits = device.lock().expect("a fresh device does not panic").traits();
        assert!(traits.queue_sizes.len() as u64 <= MOST_QUEUES, "there is room for the rings");
        let line = Arc::new(IrqLine::new().expect("an eventfd"));
        let page = RegisterPage::alone().expect("a page of memory");
        let transport = MmioTransport::new(memory.clone(), device.clone(), line, page)
            .expect("an eventfd a queue");
        transport.show();
        let (kicks, activity) = (transport.kicks().clone(), transport.activity().clone());
        let subscriber = Subscriber::new("fuzzed".to_owned(), kicks, device.clone(), activity);
        let mut events = EventManager::new().expect("an epoll");
        events.add_subscriber(subscriber);
        Guest {
            memory,
            transport,
            device,
            traits,
            events,
            host,
            patch: Box::new(|_| ()),
            next_descriptor: vec![0; traits.queue_sizes.len()],
            next_buffer: BUFFERS,
            sizes: traits.queue_sizes.to_vec(),
        }
    }

    /// From now on lets `patch` change what good chains have for the device to read.
    pub fn patch(&mut self, patch: Patch) {
        self.patch = patch;
    }

    /// Starts the device over, as a good driver that wants everything.
    pub fn restart(&mut self) {
        self.start(u64::MAX, 0);
    }

    /// Plays the script in `input`, and then starts the device over, which must work.
    pub fn play(&mut self, input: &[u8]) {
        for step in steps(input) {
            self.step(step);
        }
        self.restart();
        assert_eq!(self.status(), RUNNING, "a reset did not bring the device back");
    }

    /// Offers a good chain, to a device that nothing was hidden from since its last start. Returns what
    /// the device wrote into it, if it gave it back.
    pub fn ask(&mut self, queue: u8, readable: &[u8], writable: u32) -> Option<Vec<u8>> {
        let used = rings(queue.into()) + USED;
        let before: u16 = self.memory.read_obj(GuestAddress(used + 2)).ok()?;
        let room = self.chain(queue, 0, 0, readable, [writable, 0]);
        self.turn();
        let after: u16 = self.memory.read_obj(GuestAddress(used + 2)).ok()?;
        let entry = used + 4 + u64::from(before % self.sizes[usize::from(queue)]) * 8;
        let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).ok()?;
        let mut data = vec![0; usize::try_from(length.min(writable)).ok()?];
        if let Some(room) = room {
            self.memory.read_slice(&mut data, GuestAddress(room)).ok()?;
        }
        (after == before.wrapping_add(1)).then_some(data)
    }

    fn status(&mut self) -> u32 {
        let mut status = [0; 4];
        self.transport.read(VIRTIO_MMIO_STATUS.into(), &mut status);
        u32::from_le_bytes(status)
    }

    fn set(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn step(&mut self, step: Step<'_>) {
        match step {
            Step::Start { features, halved } => self.start(features, halved),
            Step::Chain { queue, how, cut, readable, writable } => {
                self.chain(queue, how, cut, readable, writable);
            }
            Step::Descriptor { queue, index, address, length, flags, next } => {
                let index = u64::from(index) % (AVAILABLE / 16);
                let entry = rings(self.queue(queue)) + index * 16;
                self.store(entry, Descriptor::new(address, length, flags, next));
            }
            Step::Available { queue, entry, head } => {
                let queue = self.queue(queue);
                let entry = entry % self.sizes[queue];
                self.store(rings(queue) + AVAILABLE + 4 + u64::from(entry) * 2, head);
            }
            Step::Jump { queue, by } => self.jump(queue, by),
            Step::Memory { address, bytes } => {
                // What is not there cannot be written.
                let _ = self.memory.write_slice(bytes, GuestAddress(address.into()));
            }
            Step::Write { offset, value } => self.set(offset.into(), value),
            Step::WriteBytes { offset, bytes } => self.transport.write(offset.into(), bytes),
            Step::Read { offset, length } => {
                self.transport.read(offset.into(), &mut vec![0; length.into()]);
            }
            Step::Kick { queue } => self.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue.into()),
            Step::Host { what, bytes } => (self.host)(what, bytes),
        }
        self.turn();
        self.compare();
    }

    /// The guest must read what the device says of its configuration space: it does so without asking.
    fn compare(&mut self) {
        let (mut said, mut shown) = ([0; 64], [0; 64]);
        self.device.lock().expect("no device panics").read_config(0, &mut said);
        self.transport.read(VIRTIO_MMIO_CONFIG.into(), &mut shown);
        assert_eq!(shown, said, "the configuration space is another one");
    }

    /// Lets the event loop run, as long as there is something to do, but not for ever.
    fn turn(&mut self) {
        for _ in 0..ROUNDS {
            if self.events.run_with_timeout(0).expect("an epoll can be waited for") == 0 {
                return;
            }
        }
    }

    fn start(&mut self, features: u64, halved: u8) {
        let rings =
            vec![0; (self.sizes.len() as u64 * RING_BYTES).try_into().expect("it is small")];
        self.memory.write_slice(&rings, GuestAddress(RINGS)).expect("the rings are in memory");
        self.next_descriptor.fill(0);
        for status in [0, 1, 3] {
            self.set(VIRTIO_MMIO_STATUS, status);
        }
        let ring = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let features = features & (self.traits.features | ring) | 1 << VIRTIO_F_VERSION_1;
        for (select, word) in (0..).zip(features.to_le_bytes().chunks(4)) {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.transport.write(VIRTIO_MMIO_DRIVER_FEATURES.into(), word);
        }
        self.set(VIRTIO_MMIO_STATUS, 11);
        for (index, &max) in (0u32..).zip(self.traits.queue_sizes) {
            let size = max.checked_shr(halved.into()).unwrap_or(0).max(1);
            self.sizes[index as usize] = size;
            let place = self::rings(index as usize);
            let low = |address: u64| u32::try_from(address).expect("rings are in low memory");
            self.set(VIRTIO_MMIO_QUEUE_SEL, index);
            self.set(VIRTIO_MMIO_QUEUE_NUM, size.into());
            self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, low(place));
            self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, low(place + AVAILABLE));
            self.set(VIRTIO_MMIO_QUEUE_USED_LOW, low(place + USED));
            self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.set(VIRTIO_MMIO_STATUS, RUNNING);
        self.turn();
    }

    /// Makes a chain available. Returns the address of its first writable buffer.
    fn chain(
        &mut self,
        queue: u8,
        how: u8,
        cut: u16,
        readable: &[u8],
        writable: [u32; 2],
    ) -> Option<u64> {
        let mut descriptors = Vec::new();
        let mut readable = readable.to_vec();
        (self.patch)(&mut readable);
        let (front, back) = readable.split_at(readable.len().min(cut.into()));
        for bytes in [front, back].into_iter().filter(|bytes| !bytes.is_empty()) {
            let length = u32::try_from(bytes.len()).ok()?;
            let address = self.allocate(length);
            self.memory.write_slice(bytes, GuestAddress(address)).ok()?;
            descriptors.push(Descriptor::new(address, length, 0, 0));
        }
        let mut room = None;
        for length in writable.into_iter().filter(|&length| length > 0) {
            let address = self.allocate(length);
            room = room.or(Some(address));
            descriptors.push(Descriptor::new(address, length, WRITE, 0));
        }
        if how & INDIRECT != 0 {
            let table = self.allocate(16 * 4);
            let count = u16::try_from(descriptors.len()).ok()?;
            self.link(table, 0, u16::MAX, &descriptors);
            descriptors = vec![Descriptor::new(table, u32::from(count) * 16, TABLE, 0)];
        }
        let index = self.queue(queue);
        let (head, size) = (self.next_descriptor[index], self.sizes[index]);
        self.next_descriptor[index] = self.link(rings(index), head, size, &descriptors);
        let ring = rings(index) + AVAILABLE;
        let end: u16 = self.memory.read_obj(GuestAddress(ring + 2)).ok()?;
        self.store(ring + 4 + u64::from(end % size) * 2, head);
        self.store(ring + 2, end.wrapping_add(1));
        if how & QUIET == 0 {
            self.set(VIRTIO_MMIO_QUEUE_NOTIFY, index.try_into().ok()?);
        }
        room
    }

    /// Writes linked `descriptors` into the table at `table` of `size` entries, from entry `head` on.
    /// Returns the entry behind them.
    fn link(&self, table: u64, head: u16, size: u16, descriptors: &[Descriptor]) -> u16 {
        let mut index = head;
        for (position, descriptor) in descriptors.iter().enumerate() {
            let next = (index + 1) % size;
            let more = if position + 1 < descriptors.len() { NEXT } else { 0 };
            let (address, flags) = (descriptor.addr().0, descriptor.flags() | more);
            let linked = Descriptor::new(address, descriptor.len(), flags, next);
            self.store(table + u64::from(index) * 16, linked);
            index = next;
        }
        index
    }

    fn jump(&mut self, queue: u8, by: u16) {
        let queue = self.queue(queue);
        let index = rings(queue) + AVAILABLE + 2;
        let end: u16 = self.memory.read_obj(GuestAddress(index)).expect("rings are in memory");
        self.store(index, end.wrapping_add(by));
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue.try_into().expect("there are few queues"));
    }

    /// The number of a queue that exists.
    fn queue(&self, queue: u8) -> usize {
        usize::from(queue) % self.sizes.len()
    }

    /// Room of `length` bytes, or less if that is much; used again after a while.
    fn allocate(&mut self, length: u32) -> u64 {
        let length = u64::from(length).min(0x1_1000).next_multiple_of(16);
        if self.next_buffer + length > REGIONS[0].1 as u64 {
            self.next_buffer = BUFFERS;
        }
        let address = self.next_buffer;
        self.next_buffer += length;
        address
    }

    fn store<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).expect("it is in memory");
    }
}

/// The memory of a guest, all zeros.
pub fn memory() -> GuestMemoryMmap {
    let regions = REGIONS.map(|(start, bytes)| (GuestAddress(start), bytes));
    GuestMemoryMmap::from_ranges(&regions).expect("a few pages of memory")
}

/// Where the descriptors of a queue are.
fn rings(queue: usize) -> u64 {
    RINGS + queue as u64 * RING_BYTES
}
