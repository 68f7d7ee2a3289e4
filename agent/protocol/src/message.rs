//! Every message, as plain data. The host translates the OCI configuration into these types and
//! checks it there, so that the agent needs neither a JSON parser nor a seccomp compiler.

use std::ffi::OsString;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::network::{Network, NetworkChange};
use crate::stats::{ProcessInfo, Stats};

/// What the host asks; the agent answers each with one [`Message::Response`], in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Brings up the guest for its sandbox: host name of the guest, interfaces, routes, shares.
    /// Sent once, first.
    ConfigureSandbox(Sandbox),
    /// Creates a container up to, and not including, the execution of its program. Answered with
    /// [`Response::Created`], or with [`Response::Failed`] and nothing left behind.
    CreateContainer(Box<Container>),
    /// Runs the program of a created container.
    StartContainer {
        /// Container id.
        container: String,
    },
    /// Starts one more process in a running container. Answered with [`Response::Created`] once
    /// its program runs.
    Exec {
        /// Container id.
        container: String,
        /// Name of the process in later messages; unique in its container and not empty.
        name: String,
        /// The process.
        process: Box<Process>,
    },
    /// Sends a signal.
    Signal {
        /// Container id.
        container: String,
        /// [`INIT_PROCESS`](crate::INIT_PROCESS) or a name given in [`Request::Exec`].
        process: String,
        /// Signal number of the guest's architecture.
        signal: i32,
        /// To every process of the container instead of the one named.
        all: bool,
    },
    /// Sets the size of a process's terminal.
    Resize {
        /// Container id.
        container: String,
        /// Process name.
        process: String,
        /// New size.
        size: WindowSize,
    },
    /// Freezes every process of a container.
    Pause {
        /// Container id.
        container: String,
    },
    /// Thaws a frozen container.
    Resume {
        /// Container id.
        container: String,
    },
    /// Writes cgroup v2 files of a running container, as [`Cgroup::files`].
    Update {
        /// Container id.
        container: String,
        /// File name and value, in the order of writing.
        files: Vec<(String, String)>,
    },
    /// Brings processors of the guest online, the ones with the lowest numbers first, or takes them
    /// offline, those with the highest first, until this many are online. The host has made sure that
    /// they are there.
    SetProcessors {
        /// How many, at least 1.
        online: u8,
    },
    /// Changes the network of the guest, as the host's side of it has changed.
    ChangeNetwork(Box<NetworkChange>),
    /// Answers [`Event::NameQuery`].
    NameAnswer {
        /// Its number there.
        number: u32,
        /// A DNS message (RFC 1035, section 4), or nothing if nobody answered the query.
        answer: Option<Vec<u8>>,
    },
    /// Says that the host has added to the guest's memory what [`Event::MemoryShort`] asked for, as far
    /// as the guest takes it.
    MemoryAdded {
        /// Whether there may be more.
        more: bool,
    },
    /// Has the guest's kernel tell those who watch files (inotify(7)) what others have changed in the share.
    Repeat(Vec<Change>),
    /// Lists the processes of a container. Answered with [`Response::Processes`].
    Processes {
        /// Container id.
        container: String,
    },
    /// Reads a container's counters. Answered with [`Response::Stats`].
    Stats {
        /// Container id.
        container: String,
    },
    /// Forgets a stopped container and removes what it left in the guest.
    RemoveContainer {
        /// Container id.
        container: String,
    },
    /// Syncs file systems and powers the guest off.
    Shutdown,
}

/// A change in the share that is not the guest's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Where, below [`SHARE_PATH`](crate::SHARE_PATH).
    pub folder: OsString,
    /// What, in there.
    pub name: OsString,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// What happened to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeKind {
    /// It was made; `st_mode` (inode(7)).
    Made(u32),
    /// Its contents changed.
    Written,
    /// Its attributes changed.
    Attributes,
    /// It was removed.
    Removed {
        /// Whether it was a directory.
        is_directory: bool,
    },
    /// It, which is no directory, is now in this folder below the share and has this name.
    Moved(OsString, OsString),
}

/// What the agent sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The answer to the oldest unanswered request.
    Response(Response),
    /// Something that happened by itself; may arrive between a request and its response.
    Event(Event),
}

/// The answer to one [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// Done, nothing to tell.
    Done,
    /// A process exists.
    Created {
        /// Its pid in the guest's root pid namespace.
        pid: i32,
    },
    /// The processes of a container, in ascending order of pid.
    Processes(Vec<ProcessInfo>),
    /// The counters of a container.
    Stats(Box<Stats>),
    /// Not done.
    Failed(Failed),
}

/// Why the agent could not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failed {
    /// The error chain as one line, in runc's wording where runc has one, such as
    /// `exec: "nosuch": executable file not found in $PATH`.
    pub message: String,
    /// `errno` of the cause, or 0.
    pub errno: i32,
}

/// What the agent reports by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// First message of the control stream.
    Ready {
        /// [`VERSION`](crate::VERSION) of the agent.
        version: u32,
        /// `uname -r` of the guest.
        kernel: String,
        /// Guest uptime when the agent began, in microseconds.
        started_us: u64,
        /// Guest uptime when the message was sent, in microseconds.
        uptime_us: u64,
    },
    /// A process ended. Its output that was readable at that time has been sent before.
    Exited {
        /// Container id.
        container: String,
        /// Process name.
        process: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// A process asked the engine's name server, [`RESOLVER`](crate::RESOLVER), for something.
    /// Answered, if at all, with [`Request::NameAnswer`].
    NameQuery {
        /// Which query; counted up.
        number: u32,
        /// Whether it came over TCP, so that the answer may be long.
        stream: bool,
        /// A DNS message (RFC 1035, section 4), without the length that precedes it in TCP.
        query: Vec<u8>,
    },
    /// The containers will soon need more memory than the guest has. Told once, until
    /// [`Request::MemoryAdded`]; and only if [`Sandbox::grows`].
    MemoryShort,
    /// The kernel killed a process of this container because its memory limit was reached.
    OutOfMemory {
        /// Container id.
        container: String,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u8),
    /// It was killed by this signal.
    Signal(i32),
}

impl ExitStatus {
    /// The code a shell reports: the exit code, or 128 plus the signal number.
    pub fn shell_code(self) -> u8 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => u8::try_from(i64::from(signal) + 128).unwrap_or(u8::MAX),
        }
    }
}

/// First frame of a stdio stream, from the host: whose stream it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHello {
    /// Container id.
    pub container: String,
    /// Process name.
    pub process: String,
    /// Which of its streams.
    pub stream: StdioStream,
}

/// A stdio stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StdioStream {
    /// Host to guest; the host's half-close is the process's end of file.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
    /// Both ways: the master side of the process's terminal.
    Terminal,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub columns: u16,
}

/// The guest as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Host name of the guest, if it shall have one.
    pub hostname: Option<String>,
    /// Whether to mount the virtio-fs share [`SHARE_TAG`](crate::SHARE_TAG).
    pub share: bool,
    /// Whether the host can add memory, and wants to be told when that is needed.
    pub grows: bool,
    /// Its network.
    pub network: Network,
    /// What a guest needs that went on from a template of one.
    pub resumed: Option<Resumed>,
}

/// What sets a guest apart from the others that went on from the same template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The time now, as a duration since the epoch: the guest's clocks stood still since the template
    /// was made.
    pub now: Duration,
    /// Random bytes of the host: all guests of a template would draw the same random numbers.
    pub seed: [u8; SEED_BYTES],
}

/// As much as the guest kernel's random number generator takes in (random(7)), in bytes.
pub const SEED_BYTES: usize = 32;

/// A container, as the agent creates it (OCI runtime specification, config.md and config-linux.md,
/// with every default filled in and every name translated to the kernel's number by the host).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Container id; unique in the guest.
    pub id: String,
    /// Guest path of the root file system.
    pub rootfs: String,
    /// Remount the root file system read-only at the end.
    pub rootfs_readonly: bool,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`, each possibly with `MS_REC`; 0 for
    /// the default, which is `MS_SLAVE | MS_REC` as in runc.
    pub rootfs_propagation: u64,
    /// Host name inside the container's UTS namespace.
    pub hostname: Option<String>,
    /// NIS domain name there.
    pub domainname: Option<String>,
    /// `CLONE_NEW*` flags of the namespaces to create. The network namespace is the guest's own
    /// and never among them.
    pub namespaces: u64,
    /// Mounts, in order; destinations are absolute paths inside the container.
    pub mounts: Vec<Mount>,
    /// Device nodes to create beside the ones every container has (config-linux.md, Default
    /// Devices), which the agent adds by itself.
    pub devices: Vec<Device>,
    /// Paths to hide.
    pub masked_paths: Vec<String>,
    /// Paths to make read-only.
    pub readonly_paths: Vec<String>,
    /// Kernel parameters: name with dots, value.
    pub sysctl: Vec<(String, String)>,
    /// Resource control.
    pub cgroup: Cgroup,
    /// Programs to run inside the container right before its own (OCI hook `startContainer`).
    pub start_hooks: Vec<Hook>,
    /// OCI state as JSON with `status` `created`, given to `start_hooks` on stdin.
    pub state: String,
    /// The first process.
    pub process: Process,
}

/// A mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute path inside the container; created if missing.
    pub destination: String,
    /// For a bind mount a guest path below [`SHARE_PATH`](crate::SHARE_PATH); else what mount(2)
    /// takes as source.
    pub source: String,
    /// File system type; `bind` for a bind mount and `cgroup` for the container's view of its
    /// cgroup (the agent mounts cgroup2).
    pub fstype: String,
    /// `MS_*` flags, with `MS_BIND` (and `MS_REC`) for bind mounts.
    pub flags: u64,
    /// Flags to clear, for options such as `rw` or `exec` on a bind mount that inherits others.
    pub clear_flags: u64,
    /// Propagation changes to apply after mounting, each one `MS_*` flag with or without `MS_REC`.
    pub propagation: Vec<u64>,
    /// File system specific options, comma separated.
    pub data: String,
    /// Whether to copy the content of the destination into a fresh tmpfs (option `tmpcopyup`).
    pub copy_up: bool,
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Absolute path inside the container.
    pub path: String,
    /// `S_IFCHR`, `S_IFBLK` or `S_IFIFO`.
    pub kind: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The serial number of the guest's disk that it stands for, whose numbers it gets then.
    pub disk: Option<String>,
}

/// A container's cgroup in the guest (cgroup v2).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// File name in the cgroup's folder and the value to write, in order, such as
    /// `("memory.max", "67108864")`.
    pub files: Vec<(String, String)>,
}

/// A program run at a point of a container's life (config.md, POSIX-platform Hooks).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Absolute path.
    pub path: String,
    /// `argv`, with `argv[0]`; empty means the path alone.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Seconds until it is killed and counts as failed.
    pub timeout_s: Option<u32>,
}

/// A process (config.md, Process).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// `argv`; the program is looked up in the `PATH` of `env` inside the container.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory inside the container; created for the first process if missing.
    pub cwd: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// `umask`, default 0o022.
    pub umask: Option<u32>,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// Resource limits: `RLIMIT_*` number, soft, hard; `u64::MAX` is unlimited.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// `/proc/self/oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// Classic BPF program, as an array of `struct sock_filter` in native byte order, compiled by
    /// the host from `linux.seccomp`; and the flags for seccomp(2).
    pub seccomp: Option<Seccomp>,
    /// A pseudo-terminal of this size as stdio and controlling terminal. The host then opens one
    /// [`StdioStream::Terminal`] stream.
    pub terminal: Option<WindowSize>,
    /// Without a terminal: which of stdin, stdout and stderr the host opens a stream for; the
    /// others are `/dev/null`.
    pub stdio: Stdio,
}

/// Which stdio streams exist.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// [`StdioStream::Stdin`].
    pub stdin: bool,
    /// [`StdioStream::Stdout`].
    pub stdout: bool,
    /// [`StdioStream::Stderr`].
    pub stderr: bool,
}

/// A compiled seccomp filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// 8 bytes per instruction.
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

/// Capability sets as bit masks: bit n is capability number n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// What may ever be gained.
    pub bounding: u64,
    /// In force.
    pub effective: u64,
    /// Kept over execve together with file capabilities.
    pub inheritable: u64,
    /// May be put in force.
    pub permitted: u64,
    /// Kept over execve.
    pub ambient: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_none_has_a_code_all_the_same() {
        assert_eq!(ExitStatus::Signal(9).shell_code(), 137);
        assert_eq!(ExitStatus::Signal(i32::MAX).shell_code(), u8::MAX);
        assert_eq!(ExitStatus::Signal(i32::MIN).shell_code(), u8::MAX);
    }
}
