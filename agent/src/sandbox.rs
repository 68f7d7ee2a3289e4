//! What the host says about the guest as a whole, at the start and later: its network and its memory.

use std::os::fd::AsFd;

use agent_protocol::frame::FrameError;
use agent_protocol::{Failed, Network, NetworkChange, Sandbox};

use crate::container::cgroup;
use crate::failure::Context;
use crate::growth::Growth;
use crate::resolver::Resolver;
use crate::server::Server;
use crate::{growth, init, network, resumed};

impl Server {
    /// Makes the guest ready for its containers.
    pub(crate) fn configure(&mut self, sandbox: &Sandbox) -> Result<(), Failed> {
        if let Some(resumed) = &sandbox.resumed {
            resumed::catch_up(resumed)?;
        }
        init::configure(sandbox)?;
        let all = cgroup::of_all(&self.cgroups);
        if sandbox.grows && growth::is_possible(&all) {
            self.growth = Some(Growth::start(all).context("watch the containers' memory")?);
        }
        self.resolve(&sandbox.network)
    }

    /// Lets go of devices, takes others, and sets up what is new.
    pub(crate) fn change_network(&mut self, change: &NetworkChange) -> Result<(), Failed> {
        // One device that cannot be had must not cost the others.
        let released = change.release.iter().map(|name| self.devices.release(name));
        let mut failure = released.collect::<Vec<_>>().into_iter().find_map(Result::err);
        for device in &change.take {
            failure = failure.or(self.devices.take(device).err());
        }
        network::configure(&change.network)?;
        self.resolve(&change.network)?;
        failure.map_or(Ok(()), Err)
    }

    /// Has the engine's name server in the guest, once there is one on the host.
    fn resolve(&mut self, network: &Network) -> Result<(), Failed> {
        if network.resolver && self.resolver.is_none() {
            let cgroup = cgroup::open_folder(&cgroup::of_all(&self.cgroups));
            let cgroup = cgroup.context("open the containers' cgroup")?;
            self.resolver = Some(Resolver::open(cgroup.as_fd())?);
        }
        Ok(())
    }

    /// Sets the mark anew from which on the host is asked for memory.
    pub(crate) fn memory_added(&mut self, more: bool) -> Result<(), Failed> {
        let growth = self.growth.as_mut();
        growth.map_or(Ok(()), |growth| growth.set(more)).context("watch the containers' memory")
    }

    /// Passes on what was asked of the engine's name server.
    pub(crate) fn tell_queries(&mut self) -> Result<(), FrameError> {
        let queries = self.resolver.as_mut().map(Resolver::queries).unwrap_or_default();
        queries.into_iter().try_for_each(|query| self.tell(query))
    }
}
