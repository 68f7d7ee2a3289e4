//! `update`: the machine of a container gets larger or smaller, and then the container in it.

use agent_protocol::Request as Order;

use super::agent::Asker;
use super::machine::Change;
use super::serve::Serving;
use crate::logging::chain;

impl Serving<'_> {
    /// Changes the machine as far as the host does it, and has the agent do the rest.
    pub(super) fn update(&mut self, peer: u64, change: Change, files: Vec<(String, String)>) {
        if change.plugged_mib.is_some() {
            self.grow_no_more();
        }
        if let Err(message) = self.grow(change) {
            return self.refuse(peer, &message);
        }
        match change.vcpus {
            Some(online) => {
                self.ask(&Order::SetProcessors { online }, Asker::Update(peer, files));
            }
            None => self.write_files(peer, files),
        }
    }

    /// Writes the cgroup files of the container in the guest.
    pub(super) fn write_files(&mut self, peer: u64, files: Vec<(String, String)>) {
        let container = self.container.clone();
        self.ask(&Order::Update { container, files }, Asker::Peer(peer));
    }

    fn grow(&self, change: Change) -> Result<(), String> {
        let vm = &self.parts.vm;
        if let Some(count) = change.vcpus.filter(|count| *count > vm.vcpus()) {
            let grant = vm.grant_vcpus(count);
            grant.map_err(|error| format!("get more processors: {}", chain(&error)))?;
        }
        match (change.plugged_mib, vm.pluggable_memory()) {
            (Some(mib), Some(memory)) => memory.request_mib(mib).map_err(|error| error.to_string()),
            _ => Ok(()),
        }
    }
}
