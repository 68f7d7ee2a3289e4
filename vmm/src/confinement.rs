//! Threads that give up, before they do anything else, what their work does not need.
//!
//! What a thread gives up it cannot get back, nor can what it starts. The thread that started the
//! machine keeps everything: it has more to do than to run a guest.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use crate::config::VmConfig;
use crate::seccomp::{self, Kind};

/// What the threads of one machine are left with.
#[derive(Debug, Clone, Copy)]
pub struct Confinement {
    /// Only the system calls that they need.
    pub seccomp: bool,
}

impl Confinement {
    /// What a machine of `config` can do with.
    pub fn of(config: &VmConfig) -> Self {
        Confinement { seccomp: config.seccomp }
    }

    /// Starts a thread of `kind` that runs `body` once it is confined; fails if it cannot be.
    pub fn spawn(
        &self,
        builder: Builder,
        kind: Kind,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let confinement = *self;
        let (report, outcome) = sync_channel(1);
        let thread = builder.spawn(move || {
            let confined = confinement.enter(kind);
            let is_confined = confined.is_ok();
            // Whoever starts the thread waits for it, and the room for it is there.
            let _ = report.send(confined);
            drop(report);
            if is_confined {
                body();
            }
        })?;
        outcome.recv().unwrap_or_else(|_| Err(io::Error::other("the thread died")))?;
        Ok(thread)
    }

    /// Confines the calling thread.
    fn enter(self, kind: Kind) -> io::Result<()> {
        if self.seccomp {
            seccomp::install(kind).map_err(io::Error::other)?;
        }
        Ok(())
    }
}
