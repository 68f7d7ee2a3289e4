//! The guest driver's side of a device's queues, for device tests that need no VM.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::activity::{Activity, ActivityCounts};
use super::config_space::ConfigSpace;
use super::mmio::RegisterPage;
use super::queue::VirtQueue;
use super::state::Position;
use super::{Activation, VirtioDevice};
use crate::interrupt::Interrupt;

/// Size of guest memory, in bytes.
pub const MEMORY_BYTES: usize = 4 << 20;

/// Descriptors of each queue.
pub const QUEUE_SIZE: u16 = 64;

/// The rings of each queue take this much memory, from address 0 on.
pub const RINGS: u64 = 0x1000;
/// Offset of the available ring of a queue; the descriptor table is at 0.
pub const AVAILABLE: u64 = 0x400;
/// Offset of the used ring of a queue.
pub const USED: u64 = 0x800;
/// Buffers start here, above the rings.
const BUFFERS: u64 = 0x1_0000;

/// Flags of a descriptor: the chain goes on, and the buffer is the device's to write.
pub const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// 4 MiB of guest memory at address 0.
pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

/// Plays the driver: offers buffers, then looks at what the device gave back.
///
/// Descriptors and buffers are never reused while less than [`QUEUE_SIZE`] descriptors and 4 MiB
/// are in flight, which is more than any test needs.
pub struct Driver<'m> {
    memory: &'m GuestMemoryMmap,
    next: RefCell<Next>,
    kicks: Arc<[EventFd]>,
    interrupts: Arc<Counter>,
    activity: Arc<Activity>,
    event_index: bool,
}

/// What the next offered chain will use.
struct Next {
    descriptor: Vec<u16>,
    buffer: u64,
}

/// The configuration space of `device` as drivers read it from now on; what was there before is not shown.
pub fn config_page(device: &mut dyn VirtioDevice) -> RegisterPage {
    let page = RegisterPage::alone().unwrap();
    device.show_config_in(ConfigSpace::of(page.clone()));
    page
}

/// Fails unless drivers read in `page` what `device` says of its configuration space.
pub fn assert_shown(device: &dyn VirtioDevice, page: &RegisterPage) {
    let (mut said, mut shown) = ([0xff; 64], [0xff; 64]);
    device.read_config(0, &mut said);
    page.read(VIRTIO_MMIO_CONFIG.into(), &mut shown);
    assert_eq!(shown, said);
}

#[derive(Default)]
struct Counter {
    used_buffers: AtomicUsize,
    config_changes: AtomicUsize,
    needs_reset: AtomicBool,
    /// What the driver does when it is interrupted.
    handler: OnceLock<Handler>,
}

type Handler = Box<dyn Fn() + Send + Sync>;

impl Interrupt for Counter {
    fn used_buffer(&self) {
        self.used_buffers.fetch_add(1, Ordering::Relaxed);
        if let Some(handler) = self.handler.get() {
            handler();
        }
    }

    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::Relaxed);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Relaxed);
    }
}

impl<'m> Driver<'m> {
    /// A driver of a device with one queue.
    pub fn new(memory: &'m GuestMemoryMmap) -> Self {
        Driver::with_queues(memory, 1)
    }

    /// A driver of a device with `count` queues, at most 16, each of [`QUEUE_SIZE`] descriptors.
    pub fn with_queues(memory: &'m GuestMemoryMmap, count: usize) -> Self {
        assert!(count as u64 * RINGS <= BUFFERS, "the rings lie below the buffers");
        Driver {
            memory,
            next: RefCell::new(Next { descriptor: vec![0; count], buffer: BUFFERS }),
            kicks: (0..count).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            interrupts: Arc::default(),
            activity: Arc::default(),
            event_index: false,
        }
    }

    /// A driver of a device with one queue that negotiated VIRTIO_F_EVENT_IDX.
    pub fn with_event_index(memory: &'m GuestMemoryMmap) -> Self {
        Driver::new(memory).and_event_index()
    }

    /// The same driver, if it negotiated VIRTIO_F_EVENT_IDX.
    pub fn and_event_index(self) -> Self {
        Driver { event_index: true, ..self }
    }

    /// What the transport would hand to the device, without any feature.
    pub fn activation(&self) -> Activation {
        self.activation_with(0)
    }

    /// What the transport would hand to the device if these feature bits were negotiated.
    pub fn activation_with(&self, features: u64) -> Activation {
        self.activation_at(features, &vec![Position::default(); self.kicks.len()])
    }

    /// What the transport would hand to a device that goes on at these positions.
    pub fn activation_at(&self, features: u64, positions: &[Position]) -> Activation {
        assert_eq!(positions.len(), self.kicks.len());
        let queues =
            (0u16..).zip(positions).map(|(index, &position)| self.queue(index, position)).collect();
        Activation { queues, features, interrupt: self.interrupts.clone() }
    }

    /// Makes `new` go on in the place of `old`, as the transport would, with all that it knows of it
    /// as bytes.
    pub fn hand_over(&self, features: u64, old: &mut dyn VirtioDevice, new: &mut dyn VirtioDevice) {
        let positions = old.quiesce().unwrap();
        let bytes = postcard::to_stdvec(&(positions, old.save())).unwrap();
        let (positions, state): (Vec<_>, _) = postcard::from_bytes(&bytes).unwrap();
        new.activate(self.activation_at(features, &positions)).unwrap();
        new.restore(&state).unwrap();
    }

    fn queue(&self, index: u16, position: Position) -> VirtQueue {
        let rings = u64::from(index) * RINGS;
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(rings)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(rings + AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(rings + USED)).unwrap();
        queue.set_event_idx(self.event_index);
        queue.set_ready(true);
        queue.set_next_avail(position.next_available);
        queue.set_next_used(position.next_used);
        let interrupt = self.interrupts.clone();
        let (kicks, activity) = (self.kicks.clone(), self.activity.clone());
        VirtQueue::new(index, queue, self.memory.clone(), interrupt, kicks, activity)
    }

    /// Makes one chain available in queue 0 whose buffers, all writable by the device, have these
    /// lengths, in bytes.
    pub fn offer_writable(&self, lengths: &[u32]) {
        self.offer(0, &[], lengths);
    }

    /// Makes one chain available in `queue`: buffers with these contents, then buffers of these
    /// lengths for the device to fill. Returns the number of its first descriptor.
    pub fn offer(&self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let mut descriptors = Vec::new();
        for bytes in readable {
            let address = self.allocate(bytes.len() as u64);
            self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
            let length = bytes.len().try_into().unwrap();
            descriptors.push(Descriptor::new(address, length, 0, 0));
        }
        for &length in writable {
            let address = self.allocate(length.into());
            descriptors.push(Descriptor::new(address, length, WRITE, 0));
        }
        self.offer_descriptors(queue, &descriptors)
    }

    /// Makes one chain of these descriptors available in `queue`, linked in their order; address,
    /// length and flags are taken as they are. Returns the number of its first descriptor.
    pub fn offer_descriptors(&self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let head = self.next.borrow().descriptor[queue];
        let mut index = head;
        for (position, descriptor) in descriptors.iter().enumerate() {
            let next = (index + 1) % QUEUE_SIZE;
            let more = if position + 1 < descriptors.len() { NEXT } else { 0 };
            self.write_descriptor(
                queue,
                index,
                Descriptor::new(
                    descriptor.addr().0,
                    descriptor.len(),
                    descriptor.flags() | more,
                    next,
                ),
            );
            index = next;
        }
        self.next.borrow_mut().descriptor[queue] = index;
        self.offer_head(queue, head);
        head
    }

    /// Stores one entry of the descriptor table, whatever it says.
    pub fn write_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let address = queue as u64 * RINGS + u64::from(index) * 16;
        self.memory.write_obj(descriptor, GuestAddress(address)).unwrap();
    }

    /// Makes the chain that starts at descriptor `head` available in `queue`, whatever it says.
    pub fn offer_head(&self, queue: usize, head: u16) {
        let ring = queue as u64 * RINGS + AVAILABLE;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let entry = ring + 4 + u64::from(index % QUEUE_SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.claim_available(queue, index.wrapping_add(1));
    }

    /// Sets the index of the available ring of `queue`, whatever it says.
    pub fn claim_available(&self, queue: usize, index: u16) {
        let ring = queue as u64 * RINGS + AVAILABLE;
        self.memory.write_obj(index, GuestAddress(ring + 2)).unwrap();
    }

    /// Sets the flags of the available ring of `queue`.
    pub fn set_available_flags(&self, queue: usize, flags: u32) {
        let flags = u16::try_from(flags).unwrap();
        let ring = queue as u64 * RINGS + AVAILABLE;
        self.memory.write_obj(flags, GuestAddress(ring)).unwrap();
    }

    /// Asks for an interrupt when entry number `entry` of the used ring of `queue` is filled.
    pub fn interrupt_at(&self, queue: usize, entry: u16) {
        let event = queue as u64 * RINGS + AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
        self.memory.write_obj(entry, GuestAddress(event)).unwrap();
    }

    /// The entry of the available ring of `queue` that the device wants to be kicked for.
    pub fn kick_entry(&self, queue: usize) -> u16 {
        let event = queue as u64 * RINGS + USED + 4 + 8 * u64::from(QUEUE_SIZE);
        self.memory.read_obj(GuestAddress(event)).unwrap()
    }

    /// `(head, bytes written)` of every chain the device gave back through queue 0; only the last
    /// [`QUEUE_SIZE`] of them are still right.
    pub fn used(&self) -> Vec<(u32, u32)> {
        self.used_of(0)
    }

    /// `(head, bytes written)` of every chain the device gave back through `queue`.
    pub fn used_of(&self, queue: usize) -> Vec<(u32, u32)> {
        let ring = queue as u64 * RINGS + USED;
        let count: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        (0..count).map(|nth| self.used_entry(queue, nth.into())).collect()
    }

    fn used_entry(&self, queue: usize, nth: usize) -> (u32, u32) {
        let index = (nth % usize::from(QUEUE_SIZE)) as u64;
        let entry = queue as u64 * RINGS + USED + 4 + index * 8;
        self.memory.read_obj::<[u32; 2]>(GuestAddress(entry)).unwrap().into()
    }

    /// What the device wrote into the `nth` chain it gave back through `queue`, from 0 on.
    pub fn written(&self, queue: usize, nth: usize) -> Vec<u8> {
        let (mut index, written) = self.used_entry(queue, nth);
        let mut data = Vec::new();
        loop {
            let entry = queue as u64 * RINGS + u64::from(index) * 16;
            let descriptor: Descriptor = self.memory.read_obj(GuestAddress(entry)).unwrap();
            if descriptor.is_write_only() {
                let mut buffer = vec![0; descriptor.len() as usize];
                self.memory.read_slice(&mut buffer, descriptor.addr()).unwrap();
                data.extend(buffer);
            }
            if !descriptor.has_next() {
                break;
            }
            index = descriptor.next().into();
        }
        data.truncate(written as usize);
        data
    }

    /// `length` bytes of the offered buffers, in the order they were offered, from `offset` on.
    pub fn buffer(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(BUFFERS + offset)).unwrap();
        data
    }

    /// Blocks until the device has interrupted at least once.
    pub fn wait_for_interrupt(&self) {
        while self.interrupts() == 0 {
            std::thread::yield_now();
        }
    }

    /// How often the device interrupted because of a used buffer.
    pub fn interrupts(&self) -> usize {
        self.interrupts.used_buffers.load(Ordering::Relaxed)
    }

    /// What the queues counted.
    pub fn activity(&self) -> ActivityCounts {
        self.activity.counts()
    }

    /// How often the device said that its configuration space changed.
    pub fn config_changes(&self) -> usize {
        self.interrupts.config_changes.load(Ordering::Relaxed)
    }

    /// Has `handler` called from now on whenever the device interrupts because of a used buffer; as from
    /// another vCPU, while the device is at work.
    pub fn on_interrupt(&self, handler: impl Fn() + Send + Sync + 'static) {
        assert!(self.interrupts.handler.set(Box::new(handler)).is_ok(), "there is only one");
    }

    /// Whether the device said that it is broken until it is reset.
    pub fn told_to_reset(&self) -> bool {
        self.interrupts.needs_reset.load(Ordering::Relaxed)
    }

    /// Kicks `queue`, for whoever waits for that.
    pub fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// Whether the device asked to be called for `queue` again since this was last looked at.
    pub fn kicked(&self, queue: usize) -> bool {
        self.kicks[queue].read().is_ok()
    }

    fn allocate(&self, length: u64) -> u64 {
        let mut next = self.next.borrow_mut();
        if next.buffer + length > MEMORY_BYTES as u64 {
            next.buffer = BUFFERS;
        }
        let address = next.buffer;
        next.buffer += length;
        address
    }
}
