//! `start`: the program of a created container is executed.

use super::control::Answer;
use super::serve::Serving;
use crate::state::Status;

impl Serving<'_> {
    /// The agent said whether the program was executed.
    pub(super) fn started(&mut self, peer: u64, answer: &Answer) {
        if let Answer::Failed(failed) = answer {
            let code = match failed.errno {
                libc::ENOENT => 127,
                libc::EACCES | libc::ENOEXEC => 126,
                _ => 1,
            };
            // There is no program to wait for: the container is over.
            self.save(Status::Stopped);
            self.answer(peer, answer);
            self.code = Some(code);
            return;
        }
        self.parts.phases.end("execute the program");
        self.program_started = true;
        if self.parts.init.exit.is_none() {
            self.save(Status::Running);
        }
        if let Err(error) = self.parts.phases.save(self.dir) {
            log::warn!("keep the phases of the start: {error}");
        }
        self.answer(peer, answer);
    }
}
