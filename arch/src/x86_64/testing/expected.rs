//! What a Linux guest says of its machine, for the tests of the VMM.

use crate::machine::Protocol;

/// Its sources of time and of interrupts at a time, and the host's clock.
pub const CLOCKS: &[&str] = &["kvm-clock", "lapic-deadline", "KVM virtual PTP"];

/// Features of its processor, as it calls them.
pub const FEATURES: &[&str] = &["hypervisor", "x2apic"];

/// Features that no guest is to have.
pub const HIDDEN_FEATURES: &[&str] = &[
    "vmx",
    "smx",
    "svm",
    "monitor",
    "mwaitx",
    "waitpkg",
    "sgx",
    "sgx_lc",
    "intel_pt",
    "arch_perfmon",
    "perfctr_core",
    "perfctr_nb",
    "ibs",
    "arch_lbr",
];

/// How its kernel can be entered.
pub const PROTOCOLS: &[Protocol] = &[Protocol::Linux, Protocol::Pvh];

/// What its virtio device number 3 may be called.
pub const DEVICE_3: &[&str] = &["virtio-mmio.3", "LNRO0005:03"];
