//! A vCPU at its first instruction. Follows with the KVM-bound part of ppc64le.
#![cfg(target_arch = "powerpc64")]
