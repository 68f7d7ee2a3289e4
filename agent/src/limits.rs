//! How many files may be open: as many as can be for the agent, which has some for each process,
//! and the usual number for programs, many of which close every descriptor up to it at their start. And
//! how many threads there may be: as many as the container's own limits allow.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// Hard limit in a guest, as distributions set it.
const HARD: u64 = 524_288;

/// Soft limit of programs that name none, as distributions set it.
const SOFT: u64 = 1024;

/// Where the kernel keeps how many threads there may be in all. It thinks of the memory it was started
/// with, and a guest may get more.
const THREADS: &str = "/proc/sys/kernel/threads-max";

/// As many as there are process numbers on large machines (PID_MAX_LIMIT).
const MOST_THREADS: u32 = 4 << 20;

/// Sets the hard limit of the agent and all it starts.
pub fn set_hard() -> nix::Result<()> {
    if let Err(error) = fs::write(THREADS, MOST_THREADS.to_string()) {
        log::warn!("{THREADS} stays as it is: {error}");
    }
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY)?;
    setrlimit(Resource::RLIMIT_NOFILE, SOFT, HARD)
}

/// Raises the agent's own soft limit: beyond it poll(2) fails as well, which ends the guest.
pub fn raise() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

/// Takes the agent's soft limit back in a process it made.
pub fn lower() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, SOFT.min(hard), hard)
}
