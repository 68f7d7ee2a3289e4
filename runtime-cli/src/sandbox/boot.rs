//! Waiting for the guest while a container is created: everything that can end the wait.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent_protocol::{Event, Failed, Request, Response, VERSION};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm::{Exit, VmHandle, now_ns};

use super::agent::{self, Agent, Asker, Said};
use super::signals::Signals;
use crate::phases::Phases;

/// Why the guest did not get as far as a created container.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing came.
    #[error(
        "{phase}: no answer within {timeout_s} s: check that kernel and root (rootfs or initrd) belong \
         together, or raise boot_timeout_s in the settings; the guest's last console lines: {console}"
    )]
    TimedOut {
        /// What was waited for.
        phase: &'static str,
        /// The setting.
        timeout_s: u32,
        /// The end of the guest's console.
        console: String,
    },
    /// The guest ended.
    #[error(
        "{phase}: the guest ended ({exit:?}): check kernel and root with `coracle-vmm`; its last \
         console lines: {console}"
    )]
    GuestEnded {
        /// How it ended.
        exit: Exit,
        /// What was waited for.
        phase: &'static str,
        /// The end of the guest's console.
        console: String,
    },
    /// The agent does not speak as it should.
    #[error("{phase}: the guest's last console lines: {console}")]
    Agent {
        /// What was waited for.
        phase: &'static str,
        /// The end of the guest's console.
        console: String,
        /// What is wrong.
        #[source]
        source: agent::Error,
    },
    /// The agent is of another version.
    #[error(
        "the agent in the guest speaks protocol version {found}, this is {VERSION}: build the \
         guest image anew with `coracle-image`"
    )]
    Version {
        /// The agent's.
        found: u32,
    },
    /// The agent answered something else.
    #[error("{phase}: the agent in the guest gave an unexpected answer")]
    Unexpected {
        /// What was waited for.
        phase: &'static str,
    },
    /// The agent could not do it; in runc's words.
    #[error("unable to start container process: {0}")]
    Refused(#[from] Failed),
    /// `create` was interrupted.
    #[error("interrupted while {phase}")]
    Interrupted {
        /// What was waited for.
        phase: &'static str,
    },
    /// The host cannot wait.
    #[error("wait for the guest")]
    Poll(#[source] Errno),
}

/// A guest that is coming up.
pub(super) struct Boot<'a> {
    pub(super) vm: &'a VmHandle,
    pub(super) agent: &'a mut Agent<Asker>,
    /// Readable only if the caller of `create` is gone.
    pub(super) caller: &'a UnixStream,
    pub(super) signals: &'a mut Signals,
    pub(super) timeout_s: u32,
}

impl Boot<'_> {
    /// Waits for the agent's first message, and ends the phases up to it; what the agent says about its
    /// guest.
    pub(super) fn ready(&mut self, phases: &mut Phases) -> Result<String, Error> {
        let phase = "wait for the guest to boot";
        let (guest, agent_us) = self.greeting(phase)?;
        let ready_ns = now_ns();
        phases.end_at("boot the kernel", ready_ns.saturating_sub(agent_us.saturating_mul(1000)));
        phases.end_at("start the agent", ready_ns);
        Ok(guest)
    }

    /// Like [`Boot::ready`], for a guest that goes on from a template, in which the agent was ready.
    pub(super) fn woken(&mut self, phases: &mut Phases) -> Result<String, Error> {
        let (guest, _) = self.greeting("wait for the guest to go on from its template")?;
        phases.end("wake the guest");
        Ok(guest)
    }

    /// What the agent says about its guest, and how long it took until it said that, in microseconds.
    fn greeting(&mut self, phase: &'static str) -> Result<(String, u64), Error> {
        match self.next(phase)? {
            Said::Event(Event::Ready { version: VERSION, kernel, started_us, uptime_us }) => {
                let guest = format!("kernel {}, {uptime_us} us", kernel.escape_default());
                Ok((guest, uptime_us.saturating_sub(started_us)))
            }
            Said::Event(Event::Ready { version, .. }) => Err(Error::Version { found: version }),
            _ => Err(Error::Unexpected { phase }),
        }
    }

    /// Asks the agent for something and waits until it is done.
    pub(super) fn ask(&mut self, phase: &'static str, request: &Request) -> Result<(), Error> {
        let asked = self.agent.ask(request, Asker::Nobody);
        asked.map_err(|source| self.agent_error(phase, source))?;
        loop {
            match self.next(phase)? {
                Said::Answer(_, Response::Done | Response::Created { .. }) => return Ok(()),
                Said::Answer(_, Response::Failed(failed)) => return Err(failed.into()),
                Said::Answer(..) => return Err(Error::Unexpected { phase }),
                Said::Event(_) => {}
            }
        }
    }

    fn next(&mut self, phase: &'static str) -> Result<Said<Asker>, Error> {
        let deadline = Instant::now() + Duration::from_secs(self.timeout_s.into());
        loop {
            let said = self.agent.next();
            if let Some(said) = said.map_err(|source| self.agent_error(phase, source))? {
                return Ok(said);
            }
            self.wait(phase, deadline)?;
            let moved = self.agent.flush().and_then(|()| self.agent.receive());
            moved.map_err(|source| self.agent_error(phase, source))?;
        }
    }

    /// Waits until there is something to read from, or room to write to, the agent.
    fn wait(&mut self, phase: &'static str, deadline: Instant) -> Result<(), Error> {
        let mut agent_flags = PollFlags::POLLIN;
        agent_flags.set(PollFlags::POLLOUT, self.agent.wants_to_send());
        loop {
            let mut fds = [
                PollFd::new(self.agent.as_fd(), agent_flags),
                PollFd::new(self.vm.ended(), PollFlags::POLLIN),
                PollFd::new(self.caller.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => {
                    let timeout_s = self.timeout_s;
                    return Err(Error::TimedOut { phase, timeout_s, console: self.console() });
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(Error::Poll(error)),
            }
            let [agent, ended, caller, signals] =
                fds.each_ref().map(|fd| fd.any().unwrap_or_default());
            if ended {
                return Err(Error::GuestEnded {
                    exit: self.vm.outcome(),
                    phase,
                    console: self.console(),
                });
            }
            if caller || (signals && self.signals.interrupted()) {
                return Err(Error::Interrupted { phase });
            }
            if agent {
                return Ok(());
            }
        }
    }

    fn agent_error(&self, phase: &'static str, source: agent::Error) -> Error {
        Error::Agent { phase, console: self.console(), source }
    }

    /// The end of the guest's console in one line.
    fn console(&self) -> String {
        one_line(&self.vm.console_tail())
    }
}

/// The last lines of `text` that fit an error message, in one line.
pub(super) fn one_line(text: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.len() {
        0 => "(none)".into(),
        count => lines[count.saturating_sub(LINES)..].join(" | "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_console_fits_one_line() {
        assert_eq!(one_line("a\n\n  b \n"), "a | b");
        assert_eq!(one_line(" \n"), "(none)");
        assert_eq!(one_line(&"x\n".repeat(100)).matches('x').count(), 12);
    }
}
