//! What a Linux guest says of its machine, for the tests of the VMM.

use crate::machine::Protocol;

/// Its sources of time and of interrupts at a time, and the host's clock.
pub const CLOCKS: &[&str] = &["arch_sys_counter", "arch_sys_timer", "KVM virtual PTP"];

/// Features of its processor, as it calls them.
pub const FEATURES: &[&str] = &["fp", "asimd"];

/// Features that no guest is to have: KVM gives none away that it is not asked for.
pub const HIDDEN_FEATURES: &[&str] = &[];

/// How its kernel can be entered.
pub const PROTOCOLS: &[Protocol] = &[Protocol::Linux];

/// What its virtio device number 3 may be called.
pub const DEVICE_3: &[&str] = &["10003000.virtio_mmio"];
