//! One virtual machine: from a configuration to a running guest and to its end.
//!
//! ```no_run
//! let config = vmm::VmConfig::new("/boot/vmlinux".into());
//! let vm = vmm::Vmm::new(config)?.start()?;
//! println!("{:?}", vm.wait());
//! # Ok::<(), vmm::Error>(())
//! ```
//!
//! [`Vmm::new`] opens and builds everything, top to bottom in `builder.rs`; nothing can fail for want
//! of a file afterwards. [`Vmm::start`] starts the threads: one per vCPU, one event loop (`vmm`) for
//! devices that answer at once and, if there are any, one (`io`) for devices that block on files.
//! The running machine is reached through its [`VmHandle`] only.

mod attachment;
mod builder;
mod check;
pub mod config;
mod confinement;
mod console;
mod control;
mod dax;
mod entry;
mod error;
mod event_loop;
mod footprint;
mod handle;
mod jail;
mod json;
mod memory;
mod metrics;
mod opened;
mod output;
mod peripherals;
mod placement;
mod pmem;
mod posted;
mod processors;
pub mod prometheus;
mod seccomp;
mod state;
mod vcpu;

pub use attachment::{AttachError, Attachment, DetachError};
pub use builder::Vmm;
pub use check::check;
pub use config::{
    BalloonConfig, BootConfig, BootProtocol, CachePolicy, ConfigError, ConsoleConfig,
    ConsoleOutput, DiskConfig, DiskEngine, MemoryBacking, MemoryConfig, NetConfig, PmemConfig,
    RateLimitConfig, ShareConfig, UserConfig, VhostUse, VmConfig, VsockConfig,
};
pub use confinement::{
    become_less, forbid_core_dumps, keep_capabilities, leave_namespaces, user_of_its_own,
};
pub use control::Exit;
pub use entry::run_program;
pub use error::{Error, chain};
pub use footprint::{give_back_startup_memory, use_one_heap};
pub use handle::VmHandle;
pub use json::from_json;
pub use memory::{MemoryLayout, SavedMemory, Sharing};
pub use metrics::{DeviceCounts, ExitCounts, Metrics, now_ns};
pub use opened::Opened;
pub use output::{check_output, open_output};
pub use processors::GrantError;
pub use state::{MachineState, Unsaved};

/// The host's end of the guest's memory balloon.
pub mod balloon {
    pub use devices::virtio::balloon::{Host, Statistics};
}

/// What others change in directories that are shared with the guest.
pub mod changes {
    pub use devices::virtio::fs::{Change, ChangeKind, Changes, Telling};
}

/// The host's end of the memory that can be plugged into the guest.
pub mod mem {
    pub use devices::virtio::mem::{Host, RequestError};
}

/// The host's end of the guest's sockets.
pub mod vsock {
    pub use devices::virtio::vsock::{Host, HostStream};
}
