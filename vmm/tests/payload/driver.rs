//! What a guest of a few instructions does to a virtio device: the code, assembled by hand.

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};

/// Registers of the first device; one page for each.
const WINDOWS: u32 = 0xc000_0000;

/// Where the rings and buffers of the first device are; 64 KiB for each.
const RINGS: u32 = 0x20_0000;
const AVAILABLE: u32 = 0x1000;
const USED: u32 = 0x2000;
const BUFFERS: u32 = 0x3000;

/// An address that is no memory.
const NOWHERE: u32 = 0xf000_0000;

/// Descriptors of a queue.
const SIZE: u32 = 8;

/// The third GiB of addresses, where the registers are, in the page tables the guest starts with: its
/// directory is a page that nobody else uses, with one large page.
pub fn map_registers() -> Vec<u8> {
    [store(0xa018, 0xc003), store(0xa01c, 0), store(0xc000, WINDOWS | 0x83), store(0xc004, 0)]
        .concat()
}

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
        let kick = self.set(VIRTIO_MMIO_QUEUE_NOTIFY, self.queue);
        let back = 0u8.wrapping_sub(u8::try_from(kick.len() + 2).unwrap());
        let repeat = [vec![0xb9], 1000u32.to_le_bytes().to_vec(), kick, vec![0xe2, back]].concat();
        let descriptor = self.descriptor(0, 16, 1, 0);
        [self.start(self.rings()), descriptor, self.offer(0, 1), repeat].concat()
    }

    /// Selects a queue that there is not, computes for a while, and prints `1` if the device says so;
    /// then the same for the queue that there is, and so on for ever.
    pub fn select_in_turn(self) -> Vec<u8> {
        const NO_QUEUE: u32 = 64;
        // `setz al` and `setnz al`
        let missing = [self.select_and_wait(NO_QUEUE), vec![0x0f, 0x94, 0xc0], print_digit()];
        let there = [self.select_and_wait(self.queue), vec![0x0f, 0x95, 0xc0], print_digit()];
        let mut code = [missing.concat(), there.concat()].concat();
        let back = 0u32.wrapping_sub(u32::try_from(code.len() + 5).unwrap());
        code.push(0xe9);
        code.extend(back.to_le_bytes());
        code
    }

    /// Selects `queue`, counts down, and then compares its largest size with 0: `mov ecx, count`,
    /// `loop` to itself, `mov eax, [rbx + register]`, `test eax, eax`
    fn select_and_wait(self, queue: u32) -> Vec<u8> {
        let wait = [vec![0xb9], 0x4000u32.to_le_bytes().to_vec(), vec![0xe2, 0xfe]].concat();
        let read = [vec![0x8b, 0x83], VIRTIO_MMIO_QUEUE_NUM_MAX.to_le_bytes().to_vec()].concat();
        [self.set(VIRTIO_MMIO_QUEUE_SEL, queue), wait, read, vec![0x85, 0xc0]].concat()
    }

    /// Starts over, offers a good chain, and waits until it is given back.
    pub fn behave(self) -> Vec<u8> {
        let chain = [self.descriptor(0, 16, 1, 1), self.descriptor(1, 16, 2, 0)].concat();
        // `cmp word [used index], 1`, `jne` back to it
        let mut wait = vec![0x66, 0x83, 0x3c, 0x25];
        wait.extend((self.rings() + USED + 2).to_le_bytes());
        wait.extend([1, 0x75, 0xf5]);
        [self.start(self.rings()), chain, self.offer(0, 1), wait].concat()
    }

    fn rings(self) -> u32 {
        RINGS + self.index * 0x1_0000
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

    /// Until the status has DEVICE_NEEDS_RESET: `mov eax, [rbx + status]`, `test al, 64`, `jz` back.
    fn wait_until_broken(self) -> Vec<u8> {
        let status = VIRTIO_MMIO_STATUS.to_le_bytes();
        [self.select(), vec![0x8b, 0x83], status.to_vec(), vec![0xa8, 64, 0x74, 0xf6]].concat()
    }

    /// `mov ebx, registers`, `mov dword [rbx + register], value`
    fn set(self, register: u32, value: u32) -> Vec<u8> {
        let operands = [register.to_le_bytes(), value.to_le_bytes()].concat();
        [self.select(), vec![0xc7, 0x83], operands].concat()
    }

    fn select(self) -> Vec<u8> {
        let registers = WINDOWS + self.index * 0x1000;
        [vec![0xbb], registers.to_le_bytes().to_vec()].concat()
    }
}

/// Prints what `al` holds, 0 or 1: `mov dx, 0x3f8`, `add al, '0'`, `out dx, al`
fn print_digit() -> Vec<u8> {
    vec![0x66, 0xba, 0xf8, 0x03, 0x04, b'0', 0xee]
}

/// `mov dword [address], value`
fn store(address: u32, value: u32) -> Vec<u8> {
    let operands = [address.to_le_bytes(), value.to_le_bytes()].concat();
    [vec![0xc7, 0x04, 0x25], operands].concat()
}
