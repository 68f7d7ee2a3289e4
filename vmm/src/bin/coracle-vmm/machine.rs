//! The machine as the control socket sees it, from built to stopped.

use std::fmt::{self, Display, Formatter};
use std::mem;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use log::error;
use serde::{Deserialize, Serialize};
use vmm::{Exit, Metrics, VmConfig, VmHandle, Vmm};

use crate::terminal::RawTerminal;

/// How long a pause may keep the signals and the other clients waiting.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is complete, and its guest has not run yet.
    Created,
    /// Its guest runs.
    Running,
    /// Its guest stands still.
    Paused,
    /// It is over.
    Stopped,
}

impl Display for State {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
        })
    }
}

/// One machine.
pub struct Machine {
    config: VmConfig,
    /// The guest gets what is typed here.
    is_interactive: bool,
    stage: Stage,
}

enum Stage {
    Built(Box<Vmm>),
    Started {
        vm: Box<VmHandle>,
        is_paused: bool,
        /// Given back when the machine goes.
        _terminal: Option<RawTerminal>,
    },
    /// Ended before it started, so.
    Gone(Exit),
}

/// A change of state that is not possible.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a machine that is {from} cannot become {to}")]
pub struct WrongState {
    from: State,
    to: State,
}

/// Why a machine did not become what it was asked to be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot, from where it is.
    #[error(transparent)]
    State(#[from] WrongState),
    /// It could not be started for this reason, and is gone.
    #[error("{0}")]
    Start(String),
    /// It runs on.
    #[error("the guest does not stop: a processor of it waits for whoever reads its console")]
    Busy,
}

impl Machine {
    /// Builds the machine.
    pub fn build(config: VmConfig, is_interactive: bool) -> Result<Self, vmm::Error> {
        let stage = Stage::Built(Box::new(Vmm::new(config.clone())?));
        Ok(Machine { config, is_interactive, stage })
    }

    /// The sockets that it made, which somebody else has to remove from now on; for a machine that was not
    /// started yet.
    pub fn take_sockets(&mut self) -> Vec<PathBuf> {
        match &mut self.stage {
            Stage::Built(vmm) => vmm.take_sockets(),
            Stage::Started { .. } | Stage::Gone(_) => Vec::new(),
        }
    }

    /// What it was built from, and what was attached to it since.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The same, for what comes and goes while it runs.
    pub fn config_mut(&mut self) -> &mut VmConfig {
        &mut self.config
    }

    /// The machine while it runs or is paused.
    pub fn handle(&self) -> Option<&VmHandle> {
        match &self.stage {
            Stage::Started { vm, .. } if !vm.has_ended() => Some(vm),
            _ => None,
        }
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        match &self.stage {
            Stage::Built(_) => State::Created,
            Stage::Started { vm, .. } if vm.has_ended() => State::Stopped,
            Stage::Started { is_paused: true, .. } => State::Paused,
            Stage::Started { is_paused: false, .. } => State::Running,
            Stage::Gone(_) => State::Stopped,
        }
    }

    /// Makes it run, pause or stop. What it is already, it stays.
    pub fn become_state(&mut self, to: State) -> Result<(), Error> {
        let from = self.state();
        match (from, to) {
            (State::Created, State::Running) => self.start()?,
            (State::Running, State::Paused) => self.pause()?,
            (State::Paused, State::Running) => self.resume(),
            (_, State::Stopped) => self.stop(),
            _ if from == to => {}
            _ => return Err(WrongState { from, to }.into()),
        }
        Ok(())
    }

    /// What it cost so far.
    pub fn metrics(&self) -> Metrics {
        match &self.stage {
            Stage::Built(vmm) => vmm.metrics(),
            Stage::Started { vm, .. } => vm.metrics(),
            Stage::Gone(_) => Metrics::default(),
        }
    }

    /// Readable once a machine that was started has ended.
    pub fn ended(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Started { vm, .. } => Some(vm.ended()),
            Stage::Built(_) | Stage::Gone(_) => None,
        }
    }

    /// The machine if it was started, else how it ended; the terminal is given back.
    pub fn into_handle(self) -> Result<VmHandle, Exit> {
        match self.stage {
            Stage::Started { vm, .. } => Ok(*vm),
            Stage::Built(_) => Err(Exit::Stopped),
            Stage::Gone(exit) => Err(exit),
        }
    }

    fn start(&mut self) -> Result<(), Error> {
        let Stage::Built(vmm) = mem::replace(&mut self.stage, Stage::Gone(Exit::Stopped)) else {
            return Ok(());
        };
        // A guest whose keys do not arrive is better than none.
        let open = || RawTerminal::open().map_err(|error| error!("use the terminal: {error}")).ok();
        let terminal = self.is_interactive.then(open).flatten();
        // From here on nothing is opened, and nothing else needs a privilege either.
        let vm = vmm.start_confined().map_err(|error| {
            let reason = format!("{:#}", anyhow::Error::from(error));
            self.stage = Stage::Gone(Exit::Failed(reason.clone()));
            Error::Start(reason)
        })?;
        vm.resume();
        self.stage = Stage::Started { vm: Box::new(vm), is_paused: false, _terminal: terminal };
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Error> {
        if let Stage::Started { vm, is_paused, .. } = &mut self.stage {
            *is_paused = vm.pause_within(PATIENCE);
            if !*is_paused {
                return Err(Error::Busy);
            }
        }
        Ok(())
    }

    fn resume(&mut self) {
        if let Stage::Started { vm, is_paused, .. } = &mut self.stage {
            vm.resume();
            *is_paused = false;
        }
    }

    fn stop(&mut self) {
        match &self.stage {
            Stage::Started { vm, .. } => vm.stop(),
            Stage::Built(_) => self.stage = Stage::Gone(Exit::Stopped),
            Stage::Gone(_) => {}
        }
    }
}
