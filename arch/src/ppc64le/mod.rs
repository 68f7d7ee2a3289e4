//! ppc64le (a pseries guest of KVM HV): the machine's map and its device tree, which are pure.
//! What talks to KVM follows with `impl Arch`, and the PCI host bridge its devices need with it.

pub mod layout;
pub mod tables;

mod boot;
mod exits;
mod irqchip;
mod vcpu;
mod vm;
