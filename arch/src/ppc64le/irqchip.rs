//! The XICS or XIVE inside KVM. Follows with the KVM-bound part of ppc64le.
#![cfg(target_arch = "powerpc64")]
