//! Networks that are connected and disconnected while a container runs: the engine moves interfaces into
//! and out of the network namespace, and the guest follows.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_protocol::{NetworkChange, NetworkDevice, Request as Order};
use vmm::{DetachError, VmHandle};

use super::agent::Asker;
use super::netlink::Netlink;
use super::network::{self, Link, Network};
use super::resolver;
use super::serve::Serving;
use crate::bundle::Bundle;
use crate::logging::chain;

/// How long nothing may change before the engine is taken to be done: it names an interface, then gives
/// it addresses, then routes.
const QUIET: Duration = Duration::from_millis(100);

/// The container's network namespace, as the guest has it.
#[derive(Debug)]
pub(super) struct Wiring {
    pub(super) network: Network,
    /// Tells when something changes in the namespace.
    pub(super) watch: Netlink,
    /// The container's `resolv.conf`, if it is a file of the engine's.
    resolv_conf: Option<PathBuf>,
}

impl Wiring {
    /// Reads this thread's network namespace, which the engine has set up for the container of `bundle`.
    pub(super) fn read(bundle: &Bundle) -> Result<Self, network::Error> {
        // Before reading, so as not to miss what changes afterwards.
        let watch = Netlink::watch();
        let watch = watch.map_err(|source| network::Error::Read { what: "changes", source })?;
        let network = Network::take()?;
        let mut wiring = Self { network, watch, resolv_conf: resolver::resolv_conf(bundle) };
        wiring.network.guest.resolver = wiring.asks_engine();
        Ok(wiring)
    }

    /// Whether the container goes by the engine's name server.
    fn asks_engine(&self) -> bool {
        self.resolv_conf.as_deref().is_some_and(resolver::is_named_in)
    }
}

/// What is going on with the network.
#[derive(Debug, Default)]
pub(super) struct Rewiring {
    /// When to look at the namespace again.
    pub(super) look_at: Option<Instant>,
    /// Taps whose devices were there from the start and are of no use now, with the name of the
    /// interface in the guest that was made of them.
    spare: Vec<(String, String)>,
    /// Taps whose devices the guest is letting go of.
    parting: Vec<Link>,
    /// Whether the agent has not answered yet.
    asked: bool,
    /// Interfaces that the machine has no place for.
    refused: Vec<u32>,
}

impl Serving<'_> {
    /// Something in the namespace has changed, or will in a moment.
    pub(super) fn network_moved(&mut self) {
        self.parts.wiring.watch.drain();
        self.rewiring.look_at = Some(Instant::now() + QUIET);
    }

    /// Looks at the namespace, and tells the guest if it is not as it was.
    pub(super) fn rewire(&mut self) {
        if self.rewiring.asked {
            // The answer comes back here.
            return;
        }
        self.rewiring.look_at = None;
        let spare: Vec<_> = self.rewiring.spare.iter().map(|(tap, _)| tap.clone()).collect();
        let mut network = match Network::read_after(&self.parts.wiring.network, &spare) {
            Ok(network) => network,
            Err(error) => return log::warn!("{}", chain(&error)),
        };
        network.retain(|link| !self.rewiring.refused.contains(&link.index));
        let former = &self.parts.wiring.network;
        let mut change = NetworkChange::default();
        for link in former.links.iter().filter(|link| network.link(link.index).is_none()) {
            change.release.push(link.name.clone());
            self.rewiring.parting.push(link.clone());
        }
        let fresh = network.links.iter().filter(|link| former.link(link.index).is_none());
        for link in fresh.cloned().collect::<Vec<_>>() {
            match self.device_for(&link) {
                Ok(device) => change.take.push(device),
                Err(error) => {
                    log::warn!("connect {}: {error}", link.name);
                    self.rewiring.refused.push(link.index);
                }
            }
        }
        network.retain(|link| !self.rewiring.refused.contains(&link.index));
        // Engines rewrite the file when the container gets its first network of the user's.
        let asks = self.parts.wiring.asks_engine();
        network.guest.resolver = asks || self.parts.wiring.network.guest.resolver;
        let is_same = self.parts.wiring.network.guest == network.guest;
        self.parts.wiring.network = network;
        if !is_same || change != NetworkChange::default() {
            change.network = self.parts.wiring.network.guest.clone();
            self.rewiring.asked = true;
            self.ask(&Order::ChangeNetwork(Box::new(change)), Asker::Network);
        }
    }

    /// Joins `link` with a device: one that is left, or a new one.
    fn device_for(&mut self, link: &Link) -> Result<NetworkDevice, String> {
        let spare = &mut self.rewiring.spare;
        let left = spare.iter().position(|(tap, _)| *tap == link.tap);
        let device = match left.map(|index| spare.remove(index)) {
            Some((_, name)) => NetworkDevice::Released(name),
            None => {
                let attached = self.parts.vm.attach_net(&link.device());
                NetworkDevice::Attached(attached.map_err(|error| chain(&error))?.names)
            }
        };
        link.join().map_err(|error| chain(&error))?;
        Ok(device)
    }

    /// The guest has done what it could.
    pub(super) fn rewired(&mut self) {
        self.rewiring.asked = false;
        for link in std::mem::take(&mut self.rewiring.parting) {
            if !detach(&self.parts.vm, &link.tap) {
                self.rewiring.spare.push((link.tap, link.name));
            }
        }
        if self.rewiring.look_at.is_some() {
            self.rewire();
        }
    }

    /// Asks the engine's name server for the guest.
    pub(super) fn resolve(&mut self, number: u32, stream: bool, query: &[u8]) {
        if let Err(error) = self.resolver.ask(number, stream, query) {
            log::debug!("ask the engine's name server: {error}");
            self.ask(&Order::NameAnswer { number, answer: None }, Asker::Nobody);
        }
    }

    /// Passes on what the name server has answered.
    pub(super) fn pass_answers(&mut self) {
        for (number, answer) in self.resolver.answers() {
            self.ask(&Order::NameAnswer { number, answer }, Asker::Nobody);
        }
    }
}

/// Takes the device on `tap` out of the machine; `false` for one that stays as long as that does.
fn detach(vm: &VmHandle, tap: &str) -> bool {
    !matches!(vm.detach_net(tap), Err(DetachError::Fixed(_)))
}
