//! KVM's exits in terms every architecture shares; PSCI system events. Follows with the
//! KVM-bound part of aarch64.
#![cfg(target_arch = "aarch64")]
