//! A vCPU at its first instruction. Follows with the KVM-bound part of aarch64.
#![cfg(target_arch = "aarch64")]
