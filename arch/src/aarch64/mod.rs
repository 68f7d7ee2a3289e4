//! aarch64: the machine's map and its device tree, which are pure. What talks to KVM follows with
//! `impl Arch`.

pub mod layout;
pub mod tables;

mod boot;
mod exits;
mod irqchip;
mod vcpu;
mod vm;
