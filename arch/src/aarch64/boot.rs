//! The kernel's Image, and the initrd, into memory. Follows with the KVM-bound part of aarch64.
#![cfg(target_arch = "aarch64")]
