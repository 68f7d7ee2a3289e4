//! The peer of this architecture that is a machine like ours, for benchmarks.

use crate::Qemu;

/// QEMU's machine that is closest to ours.
pub const QEMU: Qemu = Qemu {
    name: "qemu-virt",
    program: "qemu-system-aarch64",
    machine: "virt,accel=kvm,gic-version=host",
    bare_processor: "host",
    serial_port: "ttyAMA0",
};
