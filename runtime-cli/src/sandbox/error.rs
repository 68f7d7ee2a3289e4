//! What can go wrong between a verb and the sandbox process, as the user reads it.

use std::io;
use std::path::PathBuf;

use crate::state;

/// Why a sandbox could not be made, reached or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process could not be started at all.
    #[error("start the {verb} process: are memory and process numbers used up?")]
    Spawn {
        /// Which process.
        verb: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process ended before it said whether it came up.
    #[error(
        "the {verb} process ended ({how}) before it was ready: if it was killed, look for the \
         reason in the kernel log"
    )]
    Died {
        /// Which process.
        verb: &'static str,
        /// Exit code or signal.
        how: String,
    },
    /// The process reported why it failed; the text is its whole error chain.
    #[error("{0}")]
    Reported(String),
    /// The pid file cannot be written.
    #[error("write pid file {path}: make room for it, or name another with --pid-file")]
    PidFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No sandbox process answers.
    #[error("container {id} is not running: its sandbox process does not answer")]
    NotRunning {
        /// Container id.
        id: String,
        /// What connecting to its control socket gave.
        #[source]
        source: io::Error,
    },
    /// The connection to the sandbox process broke.
    #[error("talk to the sandbox process: it may just have ended; see `coracle state`")]
    Talk(#[source] agent_protocol::frame::FrameError),
    /// The sandbox process closed the connection.
    #[error("the sandbox process ended before it answered")]
    Ended,
    /// The sandbox process did not answer in time.
    #[error(
        "the sandbox process did not answer within {0} s: if its guest hangs, remove it with \
         `coracle delete --force`"
    )]
    TimedOut(u64),
    /// The sandbox process sent something this version does not expect.
    #[error("the sandbox process gave an unexpected answer: was coracle replaced meanwhile?")]
    Unexpected,
    /// The agent or the sandbox process refused.
    #[error(transparent)]
    Refused(#[from] agent_protocol::Failed),
    /// The process's stdio cannot be taken over.
    #[error(transparent)]
    Stdio(#[from] super::stdio::Error),
    /// The state of the container cannot be read or written.
    #[error(transparent)]
    State(#[from] state::Error),
    /// The sandbox process survived SIGKILL.
    #[error(
        "sandbox process {0} does not die: it waits in the kernel, look at its /proc/{0}/stack"
    )]
    Unkillable(i32),
    /// A process or a descriptor cannot be waited for.
    #[error("wait for the sandbox")]
    Wait(#[source] io::Error),
    /// The hooks that `create` kept cannot be read.
    #[error("read the hooks in the state folder")]
    Hooks(#[source] io::Error),
    /// The host cgroup cannot be limited or removed.
    #[error(transparent)]
    Cgroup(#[from] super::cgroup::Error),
}
