//! What host and guest say to each other: the only crate both sides share.
//!
//! One vsock stream carries [`Request`]s from the host to the agent and [`Message`]s (responses and
//! events) back, as length-prefixed postcard [frames](frame). The agent opens that stream, to
//! [`CONTROL_PORT`] of the host, when it is ready to serve. Each stdio stream of a process is a
//! vsock stream of its own, opened by the host to [`STDIO_PORT`] of the guest; it starts with one
//! [`StreamHello`] frame and is raw bytes from then on.
//!
//! A guest may be a copy of one that was ready, made before the host asked that for anything. Its stream
//! ends with an error then, and the agent opens it again.

pub mod frame;
pub mod message;
pub mod network;
pub mod stats;

pub use message::*;
pub use network::*;
pub use stats::*;

/// Version of this protocol; the agent sends it in [`Event::Ready`] and the host refuses others.
pub const VERSION: u32 = 5;

/// Host port (vsock CID 2) the agent connects to when it is ready.
pub const CONTROL_PORT: u32 = 1024;

/// Guest port that accepts stdio streams.
pub const STDIO_PORT: u32 = 1025;

/// Where the agent mounts the share with this virtio-fs tag...
pub const SHARE_TAG: &str = "coracle";

/// ...and that is here; every guest path of a rootfs or bind mount source lies below it.
pub const SHARE_PATH: &str = "/run/coracle/share";

/// First of the groups in whose names the agent repeats a [`Change`]. The host, which serves the files, then
/// does nothing, and answers as if it had: to the first that a file was written or has other attributes, to
/// the second that one was made, to the third that a file is gone or has another name, and to the fourth
/// that a directory is gone.
pub const REPEATING_GROUP: u32 = 0xffff_f000;

/// Name of a container's first process in messages; `exec`ed ones have names of their own.
pub const INIT_PROCESS: &str = "";

/// Where engines have their name server for containers on networks of the user's, at [`DOMAIN_PORT`]. It
/// is in the host's side of the container's network; the guest's loopback is another one.
pub const RESOLVER: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 0, 0, 11);

/// The port of name servers (RFC 1035, section 4.2).
pub const DOMAIN_PORT: u16 = 53;
