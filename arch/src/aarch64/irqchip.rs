//! The GICv3 inside KVM. Follows with the KVM-bound part of aarch64.
#![cfg(target_arch = "aarch64")]
