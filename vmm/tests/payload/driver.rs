//! What a guest of a few instructions does to a virtio device.

use arch::payload::{DATA, DEVICES, NOWHERE, for_ever, print_whether, store, times, wait_for_bits};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};

/// In the 64 KiB of memory of each device, which start with the descriptors.
const AVAILABLE: u32 = 0x1000;
const USED: u32 = 0x2000;
const BUFFERS: u32 = 0x3000;

/// Descriptors of a queue.
const SIZE: u32 = 8;

/// A driver of device number `index` that uses only queue `queue`.
#[derive(Clone, Copy)]
pub struct Driver {
    pub index: u32,
    pub queue: u32,
}

impl Driver {
    /// Breaks the queue by an index that jumps.
    pub fn jump(self) -> Vec<u8> {
        [self.start(self.rings()), self.offer(0, 0x8000), self.wait_until_broken()].concat()
    }

    /// Breaks the queue by a descriptor there is not.
    pub fn offer_no_descriptor(self) -> Vec<u8> {
        [self.start(self.rings()), self.offer(0xffff, 1), self.wait_until_broken()].concat()
    }

    /// Starts with a descriptor table that is no memory.
    pub fn start_nowhere(self) -> Vec<u8> {
        [self.start(NOWHERE), self.wait_until_broken()].concat()
    }

    /// Kicks a thousand times for a chain that is a loop.
    pub fn kick_and_kick(self) -> Vec<u8> {
        let repeat = times(1000, &self.set(VIRTIO_MMIO_QUEUE_NOTIFY, self.queue));
        let descriptor = self.descriptor(0, 16, 1, 0);
        [self.start(self.rings()), descriptor, self.offer(0, 1), repeat].concat()
    }

    /// Selects a queue that there is not, computes for a while, and prints `1` if the device says so;
    /// then the same for the queue that there is, and so on for ever.
    pub fn select_in_turn(self) -> Vec<u8> {
        const NO_QUEUE: u32 = 64;
        let largest = self.register(VIRTIO_MMIO_QUEUE_NUM_MAX);
        for_ever(
            &[
                self.select_and_wait(NO_QUEUE),
                print_whether(largest, true),
                self.select_and_wait(self.queue),
                print_whether(largest, false),
            ]
            .concat(),
        )
    }

    /// Prints `1` if the status is 0, sets it, and prints `1` if it is not 0 then.
    pub fn acknowledge(self) -> Vec<u8> {
        let status = self.register(VIRTIO_MMIO_STATUS);
        [print_whether(status, true), self.set(VIRTIO_MMIO_STATUS, 1), print_whether(status, false)]
            .concat()
    }

    fn select_and_wait(self, queue: u32) -> Vec<u8> {
        [self.set(VIRTIO_MMIO_QUEUE_SEL, queue), times(0x4000, &[])].concat()
    }

    /// Starts over, offers a good chain, and waits until it is given back.
    pub fn behave(self) -> Vec<u8> {
        let chain = [self.descriptor(0, 16, 1, 1), self.descriptor(1, 16, 2, 0)].concat();
        // Behind the flags: the index, which was 0.
        let wait = wait_for_bits(self.rings() + USED, 1 << 16);
        [self.start(self.rings()), chain, self.offer(0, 1), wait].concat()
    }

    fn rings(self) -> u32 {
        DATA + self.index * 0x1_0000
    }

    /// Starts the device over, with its descriptor table at `descriptors` and empty rings.
    fn start(self, descriptors: u32) -> Vec<u8> {
        let rings = self.rings();
        [
            self.set(VIRTIO_MMIO_STATUS, 0),
            store(rings + AVAILABLE, 0),
            store(rings + USED, 0),
            self.set(VIRTIO_MMIO_STATUS, 1),
            self.set(VIRTIO_MMIO_STATUS, 3),
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, 1),
            self.set(VIRTIO_MMIO_STATUS, 11),
            self.set(VIRTIO_MMIO_QUEUE_SEL, self.queue),
            self.set(VIRTIO_MMIO_QUEUE_NUM, SIZE),
            self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings + AVAILABLE),
            self.set(VIRTIO_MMIO_QUEUE_USED_LOW, rings + USED),
            self.set(VIRTIO_MMIO_QUEUE_READY, 1),
            self.set(VIRTIO_MMIO_STATUS, 15),
        ]
        .concat()
    }

    fn descriptor(self, index: u32, length: u32, flags: u32, next: u32) -> Vec<u8> {
        let (entry, buffer) = (self.rings() + index * 16, self.rings() + BUFFERS + index * 0x100);
        [
            store(entry, buffer),
            store(entry + 4, 0),
            store(entry + 8, length),
            store(entry + 12, flags | next << 16),
        ]
        .concat()
    }

    /// Sets the first entry and the index of the available ring, and kicks.
    fn offer(self, head: u32, index: u32) -> Vec<u8> {
        let ring = self.rings() + AVAILABLE;
        let kick = self.set(VIRTIO_MMIO_QUEUE_NOTIFY, self.queue);
        [store(ring + 4, head), store(ring, index << 16), kick].concat()
    }

    fn wait_until_broken(self) -> Vec<u8> {
        wait_for_bits(self.register(VIRTIO_MMIO_STATUS), VIRTIO_CONFIG_S_NEEDS_RESET)
    }

    fn set(self, register: u32, value: u32) -> Vec<u8> {
        store(self.register(register), value)
    }

    fn register(self, register: u32) -> u32 {
        DEVICES + self.index * 0x1000 + register
    }
}
