//! Why a virtual machine could not be built or started: one variant per step of the builder.

use std::io;
use std::path::PathBuf;

use arch::ArchError;
use devices::virtio::state::RestoreError;

use crate::config::ConfigError;
use crate::jail::JailError;
use crate::memory::MemoryError;
use crate::placement::PlacementError;
use crate::state::Unsaved;

/// Why a virtual machine could not be built or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the configuration cannot be.
    #[error("invalid machine configuration")]
    Config(#[from] ConfigError),
    /// Nobody has written down what this architecture's threads need.
    #[error(
        "this build has no system call filters for its architecture: to run without them, set \
         `seccomp` to false (coracle-vmm --no-seccomp)"
    )]
    NoFilter,
    /// /dev/kvm cannot be used.
    #[error("open /dev/kvm: {remedy}")]
    OpenKvm {
        /// What the user can do.
        remedy: &'static str,
        /// What open(2) said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The processor's virtualization belongs to somebody else.
    #[error(
        "KVM: another hypervisor of this host, such as VirtualBox, holds the processor: stop it"
    )]
    KvmBusy {
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused a step.
    #[error("KVM: {step}")]
    Kvm {
        /// What was asked of it.
        step: &'static str,
        /// What it said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A file the configuration names cannot be used.
    #[error("open {what} {path:?}")]
    Open {
        /// What the file is for.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why it cannot be opened.
        #[source]
        source: io::Error,
    },
    /// A unix socket cannot be made.
    #[error("{field}: listen on {path:?}")]
    Listen {
        /// The field of the configuration that names it.
        field: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why it cannot be made.
        #[source]
        source: io::Error,
    },
    /// A kernel or initrd is something else than a file.
    #[error("{what} {path:?} is {found}, not a file")]
    NotAFile {
        /// What the file is for.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// A file that the guest starts with has nothing in it.
    #[error("{what} {path:?} is empty")]
    EmptyFile {
        /// What the file is for.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
    },
    /// Guest RAM could not be made.
    #[error("set up guest memory")]
    Memory(#[from] MemoryError),
    /// The memory of a machine cannot be kept.
    #[error("copy guest RAM to a file: is there room on its file system?")]
    CopyMemory(#[source] io::Error),
    /// A machine that is not paused cannot be saved.
    #[error("save the machine: {0}")]
    Save(Unsaved),
    /// What the guest wrote to some of its memory is in no file.
    #[error("save the machine: {what} is kept in no file ({field})")]
    NoMemoryFile {
        /// Which memory.
        what: &'static str,
        /// The field of the configuration that says where it is kept.
        field: &'static str,
    },
    /// The state is not that of a machine with this configuration.
    #[error("the machine was saved with {field} {saved}, not {found}")]
    OtherMachine {
        /// What differs: a field of the configuration, or a kind of devices.
        field: &'static str,
        /// What the saved machine had.
        saved: u32,
        /// What the configuration says.
        found: u32,
    },
    /// The state is not that of a machine with this configuration.
    #[error("the machine was saved with {saved:?} where the configuration has {found:?}")]
    OtherDevice {
        /// Name of the saved device.
        saved: String,
        /// Name of the device that the configuration has in its place.
        found: String,
    },
    /// A device cannot go on where the saved one was.
    #[error("restore {name}")]
    Restore {
        /// The device, by kind and id.
        name: String,
        /// Why not.
        #[source]
        source: RestoreError,
    },
    /// The architecture's part of a step failed.
    #[error("{step}")]
    Arch {
        /// The step.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: ArchError,
    },
    /// The kernel or initrd cannot be booted.
    #[error("load {what} {path:?}")]
    Load {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why it cannot be booted.
        #[source]
        source: ArchError,
    },
    /// The machine's threads cannot be kept apart from the host's file systems.
    #[error("keep the machine's threads to the shared directories")]
    Jail(#[from] JailError),
    /// A device could not be made.
    #[error("create device {name}")]
    Device {
        /// The device, by kind and id.
        name: String,
        /// Why it could not be made.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device could not be put into the machine.
    #[error("place device {name}")]
    Place {
        /// The device, by kind and id.
        name: String,
        /// The step that failed.
        #[source]
        source: PlacementError,
    },
    /// The host cannot run another thread or eventfd.
    #[error("start {what}")]
    Start {
        /// What could not be started.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An error and its causes as one line, outermost first. A cause whose text its parent already
/// ends with is not repeated.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
