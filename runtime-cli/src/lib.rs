//! The OCI runtime on the host: verbs, bundles, container state, and the sandbox process that
//! holds a container's virtual machine.

pub mod bundle;
pub mod check;
pub mod features;
pub mod install;
pub mod limits;
pub mod logging;
pub mod phases;
pub mod rootless;
pub mod sandbox;
pub mod settings;
pub mod state;
pub mod translate;

/// Version of this runtime, as `--version` and `features` tell it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Newest version of the OCI runtime specification that is implemented.
pub const OCI_VERSION: &str = "1.2.1";
