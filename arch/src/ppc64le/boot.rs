//! The kernel, an ELF file, and the initrd into memory. Follows with the KVM-bound part of ppc64le.
#![cfg(target_arch = "powerpc64")]
