//! Who closes a machine: the kernel, in its own time.
//!
//! The last descriptor of a machine to be closed has KVM take it apart, and with it the process that
//! closes it waits for several of the kernel's grace periods, tens of milliseconds in all. Whoever
//! waits for the end of the process, as `coracle run` does, would wait for them too. So a ring of
//! io_uring holds another one: what is registered with a ring is closed by a worker of the kernel,
//! once the ring itself is closed (io_uring_register(2), IORING_REGISTER_FILES).

use std::io;
use std::os::fd::AsRawFd;

use arch::VmFd;
use io_uring::IoUring;
use log::debug;

/// Holds a machine until it is dropped, and some moments longer.
pub struct LastHolder(
    #[expect(dead_code, reason = "what it holds is what counts")] Option<IoUring>,
);

impl LastHolder {
    /// Of `vm`; without effect where the host has no io_uring, or forbids it.
    pub fn of(vm: &VmFd) -> Self {
        let ring = hold(vm).inspect_err(|error| debug!("io_uring to hold the machine: {error}"));
        LastHolder(ring.ok())
    }
}

fn hold(vm: &VmFd) -> io::Result<IoUring> {
    let ring = IoUring::new(1)?;
    ring.submitter().register_files(&[vm.as_raw_fd()])?;
    Ok(ring)
}
