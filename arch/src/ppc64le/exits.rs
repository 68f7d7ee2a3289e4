//! KVM's exits in terms every architecture shares; hypercalls and RTAS. Follows with
//! the KVM-bound part of ppc64le.
#![cfg(target_arch = "powerpc64")]
