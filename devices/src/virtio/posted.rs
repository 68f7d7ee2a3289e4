//! Which registers of the virtio-mmio transport may be written late, and what need not be written at all.

use std::ops::Range;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH,
};

/// Registers, as offsets in bytes, that a driver writes without any effect on what it reads, or before
/// its next write to another register: whoever carries out their writes late, but in order and before such
/// a write, does what the driver expects. The first range is DriverFeatures and DriverFeaturesSel, the
/// second goes from QueueDescLow to QueueDeviceHigh (virtio 1.2, section 4.2.2). QueueNum, alone between two
/// that are none of these, is written once for each queue.
pub const POSTED_REGISTERS: [Range<u32>; 2] = [
    VIRTIO_MMIO_DRIVER_FEATURES..VIRTIO_MMIO_DRIVER_FEATURES_SEL + 4,
    VIRTIO_MMIO_QUEUE_DESC_LOW..VIRTIO_MMIO_QUEUE_USED_HIGH + 4,
];

/// A register and a value that has no effect there: that of InterruptACK for used buffers, whose cause
/// stays in any case.
pub const IDLE_WRITE: (u32, u32) = (VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
