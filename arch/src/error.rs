//! What can go wrong between the VMM and an architecture, one variant per step.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryError};

use crate::aarch64::layout::GicVersion;
use crate::kvm;

/// A step of making a machine failed.
#[derive(Debug, thiserror::Error)]
pub enum ArchError {
    /// KVM refused something every host must offer.
    #[error("KVM: {step}")]
    Kvm {
        /// What was asked of it.
        step: &'static str,
        /// Its answer.
        #[source]
        source: kvm::Error,
    },
    /// A register of a saved vCPU has a value that this host does not take.
    #[error("this host takes no {value:#x} in the model-specific register {index:#x}")]
    Msr {
        /// Number of the register.
        index: u32,
        /// The value it had.
        value: u64,
    },
    /// A register of a saved vCPU has a value that this host does not take.
    #[error("this host does not take what was in register {id:#x} of a saved vCPU")]
    Register {
        /// What KVM calls it.
        id: u64,
    },
    /// The machine was saved with another interrupt controller than this host has.
    #[error("saved with interrupt controller {saved:?}, but this host has {host:?}")]
    InterruptController {
        /// What the saved machine had.
        saved: GicVersion,
        /// What this one has.
        host: GicVersion,
    },
    /// A boot file could not be read.
    #[error("read the {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel file is of no format this architecture boots.
    #[error("not a kernel for this machine: {found}; accepted are {accepted}")]
    NotAKernel {
        /// What the file seems to be.
        found: &'static str,
        /// The formats that would do.
        accepted: &'static str,
    },
    /// The kernel has the right format but could not be loaded.
    #[error(
        "load the kernel into {ram_mib} MiB of guest memory (damaged file, or too little memory)"
    )]
    LoadKernel {
        /// Guest RAM that the kernel may use.
        ram_mib: u64,
        /// Why not.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The kernel needs more memory than the guest has.
    #[error(
        "the kernel needs {needed_mib} MiB of guest memory, but has {ram_mib} MiB; give the machine more memory"
    )]
    KernelTooBig {
        /// What the kernel occupies while it starts.
        needed_mib: u64,
        /// Guest RAM that the kernel may use.
        ram_mib: u64,
    },
    /// Kernel and initrd do not fit together.
    #[error("no room for an initrd of {size} bytes above the kernel; give the machine more memory")]
    InitrdTooBig {
        /// Size of the initrd, in bytes.
        size: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("kernel command line of {length} bytes: this kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Its length, in bytes.
        length: usize,
        /// The longest the kernel takes, in bytes.
        limit: usize,
    },
    /// The command line holds a byte that ends it early.
    #[error("kernel command line with a NUL byte")]
    CmdlineNul,
    /// More is to be described than the tables' place holds.
    #[error("{table} of {size} bytes does not fit in its {room} bytes")]
    TableTooBig {
        /// Which description of the machine.
        table: &'static str,
        /// Its size, in bytes.
        size: usize,
        /// The size of its place, in bytes.
        room: u64,
    },
    /// A device lies where the guest's tables cannot name it.
    #[error("device window at {base:#x} cannot be described")]
    Device {
        /// Guest-physical base address of the device.
        base: u64,
    },
    /// A device tree could not be made.
    #[error("make the device tree")]
    DeviceTree(#[from] vm_fdt::Error),
    /// Guest RAM does not hold an address that the layout uses.
    #[error("write {what} at guest address {:#x}", address.0)]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// Where.
        address: GuestAddress,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
}

impl ArchError {
    /// Names the step in which KVM failed.
    pub(crate) fn kvm(step: &'static str) -> impl FnOnce(kvm::Error) -> Self {
        move |source| Self::Kvm { step, source }
    }

    /// Names what could not be written to guest memory.
    pub(crate) fn memory(
        what: &'static str,
        address: GuestAddress,
    ) -> impl FnOnce(GuestMemoryError) -> Self {
        move |source| Self::Memory { what, address, source }
    }
}
