//! The register block, in front of every kind of device.

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};

use crate::guest::Guest;
use crate::script::{START, Step, chain, variant};
use crate::{Seed, block, console, net, rng, vsock};

/// Kinds of devices.
const KINDS: u8 = 5;

/// A guest with the device that the first byte of an input chooses.
fn guest(kind: u8) -> Guest {
    let variant = kind / KINDS;
    match kind % KINDS {
        0 => rng::guest(),
        1 => console::guest(),
        2 => block::guest(variant).0,
        3 => net::guest(variant).0,
        _ => vsock::guest(),
    }
}

/// Plays `data`, whose first byte chooses the device.
pub fn run(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    guest(kind).play(data);
}

/// Starts that are right and wrong, for each kind.
pub fn seeds() -> Vec<Seed> {
    let set = |register: u32, value| {
        let offset = u16::try_from(register).expect("registers are in one page");
        Step::Write { offset, value }
    };
    let place = |size| {
        [
            set(VIRTIO_MMIO_QUEUE_SEL, 0),
            set(VIRTIO_MMIO_QUEUE_NUM, size),
            set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x4000),
            set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x6000),
            set(VIRTIO_MMIO_QUEUE_USED_LOW, 0x6800),
            set(VIRTIO_MMIO_QUEUE_READY, 1),
        ]
    };
    let agree = [
        set(VIRTIO_MMIO_STATUS, 0),
        set(VIRTIO_MMIO_STATUS, 1),
        set(VIRTIO_MMIO_STATUS, 3),
        set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        set(VIRTIO_MMIO_DRIVER_FEATURES, 1),
        set(VIRTIO_MMIO_STATUS, 11),
    ];
    let go = [set(VIRTIO_MMIO_STATUS, 15), set(VIRTIO_MMIO_QUEUE_NOTIFY, 0)];
    let right =
        [&agree[..], &place(8), &go, &[chain(0, b"", 16), set(VIRTIO_MMIO_INTERRUPT_ACK, 3)]];
    let high = [set(VIRTIO_MMIO_QUEUE_READY, 0), set(VIRTIO_MMIO_QUEUE_DESC_HIGH, u32::MAX)];
    let outside = [&agree[..], &place(8), &high, &[set(VIRTIO_MMIO_QUEUE_READY, 1)], &go];
    let crooked = [&agree[..], &place(7), &go];
    let unfinished = [&agree[..3], &go, &[set(VIRTIO_MMIO_STATUS, 1), START], &place(4), &go];
    let widths = [
        START,
        Step::Read { offset: 0xffff, length: 255 },
        Step::Read { offset: 0x70, length: 8 },
        Step::WriteBytes { offset: 0x100, bytes: &[0xff; 64] },
        Step::WriteBytes { offset: 0x70, bytes: &[0; 2] },
        Step::WriteBytes { offset: 0x71, bytes: &[] },
        set(VIRTIO_MMIO_QUEUE_SEL, u32::MAX),
        set(VIRTIO_MMIO_QUEUE_READY, 1),
        set(VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX),
    ];
    vec![
        ("right", variant(0, &right.concat())),
        ("outside_memory", variant(1, &outside.concat())),
        ("crooked_size", variant(2, &crooked.concat())),
        ("unfinished", variant(3, &unfinished.concat())),
        ("widths", variant(4, &widths)),
    ]
}
