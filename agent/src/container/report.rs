//! What the agent and a process that is being made tell each other, until the process executes its
//! program and the channel closes by itself.

use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use agent_protocol::{Failed, frame};
use serde::{Deserialize, Serialize};

/// What the new process tells.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// It opened its terminal; the master side is this descriptor of its own. It waits for
    /// [`GO_ON`] before it closes that.
    Terminal(RawFd),
    /// All is done but the program; it waits for [`GO_ON`] before it runs that.
    Created,
    /// It gave up.
    Failed(Failed),
}

/// What the agent answers.
pub const GO_ON: [u8; 1] = [1];

/// The new process's end.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Talks over `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Tells the agent.
    pub fn tell(&mut self, report: &Report) -> io::Result<()> {
        frame::write(&mut self.stream, report).map_err(io::Error::other)
    }

    /// Tells the agent and waits until it says to go on.
    pub fn ask(&mut self, report: &Report) -> io::Result<()> {
        self.tell(report)?;
        self.stream.read_exact(&mut [0; GO_ON.len()])
    }
}

/// The agent's answer on its end.
pub fn go_on(mut stream: &UnixStream) -> io::Result<()> {
    stream.write_all(&GO_ON)
}
