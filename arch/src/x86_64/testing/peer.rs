//! The peer of this architecture that is a machine like ours, for benchmarks.

use crate::Qemu;

/// QEMU's machine that is closest to ours.
pub const QEMU: Qemu = Qemu {
    name: "qemu-microvm",
    program: "qemu-system-x86_64",
    // With the clock that KVM guests get by default nowhere else: Debian's kernel waits 1.2 s for it.
    machine: "microvm,accel=kvm,rtc=on",
    bare_processor: "base",
    serial_port: "ttyS0",
};
