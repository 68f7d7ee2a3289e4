//! The verbs, one file each, and what several of them need.

pub mod arguments;
pub mod check;
pub mod console;
pub mod create;
pub mod delete;
pub mod events;
pub mod exec;
pub mod features;
pub mod install;
pub mod kill;
pub mod list;
pub mod metrics;
pub mod pause;
pub mod ps;
pub mod resume;
pub mod run;
pub mod spec;
pub mod start;
pub mod state;
pub mod table;
pub mod update;

use std::io::Write;
use std::os::fd::RawFd;

use anyhow::Context;
use coracle::logging::LogOptions;
use coracle::state::{
    self as container_state, ContainerDir, ContainerId, State, StateRoot, Status,
};

/// Options before the verb.
pub struct Globals {
    /// `--root`.
    pub root: StateRoot,
    /// `--log`, `--log-format` and `--debug`.
    pub log: LogOptions,
    /// `--systemd-cgroup`.
    pub systemd_cgroup: bool,
}

impl Globals {
    /// The folder and state of an existing container.
    pub fn container(&self, id: &str) -> Result<(ContainerDir, State), container_state::Error> {
        let dir = self.root.open(&ContainerId::parse(id)?)?;
        let state = dir.load()?;
        Ok((dir, state))
    }
}

/// Arguments of a verb that only needs to know which container.
#[derive(clap::Args)]
pub struct IdArgs {
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    pub id: String,
}

/// Arguments of the hidden verbs, which only this program itself runs.
#[derive(clap::Args)]
pub struct HiddenArgs {
    /// Inherited descriptor over which the orders come.
    pub fd: RawFd,
    /// Container id, for people who read `ps`.
    pub name: Option<String>,
}

/// Nothing to do.
#[derive(Debug, thiserror::Error)]
#[error("no verb given: see `coracle --help`")]
pub struct NoVerb;

/// The command line is wrong; what about it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Why a verb failed, and what this process's exit code has to be.
pub struct Failure {
    /// The cause, with its sources.
    pub error: anyhow::Error,
    /// Exit code.
    pub code: u8,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), code: crate::FAILURE }
    }
}

/// Prints a verb's result; an error, and no panic, if there is no room or no reader for it.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("write to stdout")
}

/// What a verb asks of the status of its container, in runc's words.
pub fn require_running(state: &State) -> anyhow::Result<()> {
    match state.status {
        Status::Created | Status::Running => Ok(()),
        _ => anyhow::bail!("container not running"),
    }
}
