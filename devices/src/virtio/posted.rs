//! Which registers of the virtio-mmio transport may be written late.

use std::ops::Range;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_SHM_SEL,
};

/// Registers, as offsets in bytes, that a driver writes without any effect before its next access to
/// another register, or before it reads: whoever carries out their writes late, but in order and before
/// such an access, does what the driver expects. The first range goes from DeviceFeaturesSel to
/// QueueReady, the second is InterruptACK, which no access waits for but that to InterruptStatus, and the
/// last goes from QueueDescLow to SHMSel (virtio 1.2, section 4.2.2).
pub const POSTED_REGISTERS: [Range<u32>; 3] = [
    VIRTIO_MMIO_DEVICE_FEATURES_SEL..VIRTIO_MMIO_QUEUE_READY + 4,
    VIRTIO_MMIO_INTERRUPT_ACK..VIRTIO_MMIO_INTERRUPT_ACK + 4,
    VIRTIO_MMIO_QUEUE_DESC_LOW..VIRTIO_MMIO_SHM_SEL + 4,
];
