//! What KVM must be told before the first vCPU. Follows with the KVM-bound part of aarch64.
#![cfg(target_arch = "aarch64")]
