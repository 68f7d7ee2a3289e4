//! Emulated devices. They know guest memory and event file descriptors, not KVM and not the
//! architecture: an access travels from a vCPU exit over a [`bus::Bus`] to a device's registers,
//! and data moves by kick eventfds in and an [`interrupt::Interrupt`] out.

pub mod bus;
pub mod clock;
pub mod interrupt;
pub mod listener;
pub mod mapping;
pub mod serial;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod virtio;
