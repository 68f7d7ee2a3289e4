//! What the verbs ask of a sandbox process, one arm per request.

use std::os::fd::OwnedFd;

use agent_protocol::{INIT_PROCESS, Process, Request as Order};

use super::agent::Asker;
use super::control::{Answer, Request};
use super::serve::Serving;
use super::streams::{Outputs, Owner, Running};
use crate::state::Status;

impl Serving<'_> {
    pub(super) fn serve_peer(&mut self, number: u64) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        let mut open = peer.receive().unwrap_or(false);
        while let Some(peer) = self.peers.get_mut(&number) {
            match peer.request() {
                Ok(Some((request, fds))) => self.obey(number, request, fds),
                Ok(None) => break,
                Err(_) => {
                    open = false;
                    break;
                }
            }
        }
        if !open {
            self.leave(number);
        }
    }

    /// Forgets a client. A process that was started for it ends with it: its carrier was killed.
    pub(super) fn leave(&mut self, number: u64) {
        self.peers.remove(&number);
        let orphans: Vec<String> = self
            .execs
            .iter()
            .filter(|(_, process)| process.peer == Some(number) && process.exit.is_none())
            .map(|(name, _)| name.clone())
            .collect();
        for process in orphans {
            self.signal(Asker::Nobody, process, libc::SIGKILL, false);
        }
    }

    fn obey(&mut self, peer: u64, request: Request, fds: Vec<OwnedFd>) {
        let container = self.container.clone();
        let order = match request {
            Request::Start if self.parts.state.status == Status::Created => {
                return self.ask(&Order::StartContainer { container }, Asker::Start(peer));
            }
            Request::Start => return self.refuse(peer, "cannot start a container that has run"),
            Request::Signal { process, signal, all } => {
                if signal == libc::SIGKILL && process == INIT_PROCESS {
                    self.kill();
                }
                return self.signal(Asker::Peer(peer), process, signal, all);
            }
            Request::Exec { name, process } => return self.exec(peer, name, process, fds),
            Request::Pause => {
                return self.ask(&Order::Pause { container }, Asker::Freeze(peer, true));
            }
            Request::Resume => {
                return self.ask(&Order::Resume { container }, Asker::Freeze(peer, false));
            }
            Request::Resize { process, size } => Order::Resize { container, process, size },
            Request::Update { change, files } => return self.update(peer, change, files),
            Request::Room => return self.answer(peer, &Answer::Room(self.parts.room)),
            Request::Console => {
                return self.answer(peer, &Answer::Text(self.parts.vm.console_tail()));
            }
            Request::Metrics => {
                return self.answer(peer, &Answer::Text(self.parts.vm.metrics().to_prometheus()));
            }
            Request::Processes => Order::Processes { container },
            Request::Stats => Order::Stats { container },
        };
        self.ask(&order, Asker::Peer(peer));
    }

    fn exec(&mut self, peer: u64, name: String, mut process: Box<Process>, fds: Vec<OwnedFd>) {
        if name == INIT_PROCESS || self.execs.contains_key(&name) {
            return self.refuse(peer, "a process of that name exists");
        }
        let owner = Owner { container: &self.container, process: &name };
        let Some(host) = self.parts.vm.vsock() else { return };
        let connected = Outputs::connect_passed(host, owner, &mut process, fds);
        match connected {
            Ok(outputs) => {
                self.execs.insert(name.clone(), Running::new(outputs, Some(peer)));
                let container = self.container.clone();
                let order = Order::Exec { container, name: name.clone(), process };
                self.ask(&order, Asker::Exec(peer, name));
            }
            Err(error) => self.refuse(peer, &format!("connect stdio: {error}")),
        }
    }
}
