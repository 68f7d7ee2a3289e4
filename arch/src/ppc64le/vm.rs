//! What KVM must be told before the first vCPU: page table and capabilities. Follows with the KVM-bound part of ppc64le.
#![cfg(target_arch = "powerpc64")]
