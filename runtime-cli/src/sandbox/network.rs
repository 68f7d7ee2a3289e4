//! The container's network namespace, handed over to the guest.
//!
//! The engine put interfaces with addresses and routes into the namespace. Each gets a tap beside
//! it, and whatever arrives at one of the two leaves by the other (tc-mirred(8)), before the
//! namespace's own network stack sees it. The guest takes over hardware address, addresses and
//! routes; those in the namespace stay for engines to look at, but nothing answers there.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use agent_protocol::{Address, Interface, Neighbour, Network as GuestNetwork, Route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage,
    TcMirror, TcMirrorActionType, TcOption,
};
use nix::sched::{CloneFlags, setns};
use vmm::NetConfig;

use super::hairpin::Hairpin;
use super::netlink::Netlink;

/// The only qdisc of which an interface can have one without losing another.
const INGRESS: &str = "ingress";

/// The filter takes every protocol (`ETH_P_ALL`) at the second priority: the upper half of
/// `tcm_info` is the priority, the lower half the protocol in network byte order.
const FILTER_INFO: u32 = (2 << 16) | ETH_P_ALL.to_be() as u32;

/// Every protocol (linux/if_ether.h); libc has it as an int.
const ETH_P_ALL: u16 = 3;

/// Why the network cannot be handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another machine has it.
    #[error(
        "the container's network namespace is another container's, whose network stack is in its \
         virtual machine: put both on one network, where they find each other by name (and make a pod \
         of Podman's with --share none)"
    )]
    Taken,
    /// The namespace cannot be examined.
    #[error("read the {what} of the container's network namespace")]
    Read {
        /// What was asked for.
        what: &'static str,
        /// Why it was not told.
        #[source]
        source: io::Error,
    },
    /// An interface and its tap cannot be joined.
    #[error(
        "join interface {interface} with {tap}: the host kernel needs sch_ingress, cls_matchall \
         and act_mirred"
    )]
    Join {
        /// The container's interface.
        interface: String,
        /// Its tap.
        tap: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What the guest takes over.
#[derive(Debug, Clone, Default)]
pub(super) struct Network {
    pub(super) links: Vec<Link>,
    /// As the agent is told.
    pub(super) guest: GuestNetwork,
}

/// An interface of the namespace and the tap beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    mtu: u32,
    up: bool,
    pub(super) tap: String,
}

impl Network {
    /// Reads what the engine set up in this thread's network namespace, if no machine is connected to it.
    pub(super) fn take() -> Result<Self, Error> {
        Self::read_with(|links, messages| {
            name_taps(links, &[], &[]);
            let is_ours = |message| {
                tap(message).is_some_and(|index| links.iter().all(|link| link.index != index))
            };
            if messages.iter().any(is_ours) { Err(Error::Taken) } else { Ok(()) }
        })
    }

    /// Reads what there is now: the links of `former` keep their taps, and new ones get a tap of
    /// `spare`, or else one that is not there. New ones that are not up are not ready.
    pub(super) fn read_after(former: &Self, spare: &[String]) -> Result<Self, Error> {
        Self::read_with(|links, _| {
            links.retain(|link| link.up || former.link(link.index).is_some());
            name_taps(links, &former.links, spare);
            Ok(())
        })
    }

    /// `name` gives the links their taps, and sees how the kernel describes all that there are.
    fn read_with(
        name: impl FnOnce(&mut Vec<Link>, &[Message]) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let read = |what| move |source| Error::Read { what, source };
        let netlink = Netlink::open().map_err(read("links"))?;
        let dump = |what, question| netlink.dump(question).map_err(read(what));
        let messages = dump("links", Message::GetLink(LinkMessage::default()))?;
        let addresses = dump("addresses", Message::GetAddress(AddressMessage::default()))?;
        let mut links = links(&messages, &addresses);
        name(&mut links, &messages)?;
        let routes = dump("routes", Message::GetRoute(RouteMessage::default()))?;
        let neighbours = dump("neighbours", Message::GetNeighbour(NeighbourMessage::default()))?;
        let guest = GuestNetwork {
            interfaces: links.iter().map(|link| interface(link, &addresses)).collect(),
            routes: sorted_routes(&routes, &links),
            neighbours: neighbours.iter().filter_map(|entry| neighbour(entry, &links)).collect(),
            resolver: false,
        };
        let mut network = Self { links, guest };
        if let Some(hairpin) = Hairpin::of(&network) {
            hairpin.tell(&mut network.guest);
        }
        Ok(network)
    }

    /// The link of this number.
    pub(super) fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Leaves out what belongs to the links that are not `kept`.
    pub(super) fn retain(&mut self, kept: impl Fn(&Link) -> bool) {
        self.links.retain(kept);
        let links = &self.links;
        let is_there = |name: &str| links.iter().any(|link| link.name == name);
        self.guest.interfaces.retain(|interface| is_there(&interface.name));
        self.guest.routes.retain(|route| is_there(&route.interface));
        self.guest.neighbours.retain(|neighbour| is_there(&neighbour.interface));
    }

    /// The guest's network devices. Their addresses say which is which and nothing else, so that machines
    /// with as many are alike: each interface gets the next device, and has its own address then.
    pub(super) fn devices(&self) -> Vec<NetConfig> {
        let addressed = |(number, link): (u8, &Link)| NetConfig {
            mac: mac_text([2, 0, 0, 0, 0, number]),
            ..link.device()
        };
        (0..).zip(&self.links).map(addressed).collect()
    }

    /// Joins every interface with its tap, which exists by now.
    pub(super) fn join(&self) -> Result<(), Error> {
        self.links.iter().try_for_each(Link::join)?;
        let open = |hairpin: Hairpin| {
            let netlink = Netlink::open()?;
            hairpin.open(&netlink, index_of(&netlink, &hairpin.tap)?)
        };
        // Everything else works without.
        if let Some(Err(error)) = Hairpin::of(self).map(open) {
            log::warn!("let connections from the network namespace reach the guest: {error}");
        }
        Ok(())
    }

    /// Takes back what [`Self::join`] did to the namespace and to interfaces that outlive the sandbox; the
    /// taps, and what was attached to them, end with it.
    pub(super) fn part(&self) {
        let Ok(netlink) = Netlink::open() else { return };
        for link in &self.links {
            // The interface may have gone with its other end, as a veth does.
            let _ = netlink.change(Message::DelQueueDiscipline(ingress(link.index)), 0);
        }
        if let Some(hairpin) = Hairpin::of(self) {
            // It may never have been opened, and its interface may be gone.
            let _ = hairpin.close(&netlink);
        }
    }
}

/// Takes back what a sandbox that was killed has left in the network namespace at `path`, unless
/// another one is there: its interfaces would still send all they get to a tap that is gone.
pub(super) fn tidy(path: &Path) {
    let path = path.to_owned();
    let tidied = std::thread::spawn(move || {
        // Engines remove the namespace when they are done with it.
        let Ok(namespace) = File::open(path) else { return };
        if setns(&namespace, CloneFlags::CLONE_NEWNET).is_err() {
            return;
        }
        if let Ok(network) = Network::take() {
            network.part();
        }
    });
    // A thread that only asks the kernel does not panic.
    let _ = tidied.join();
}

/// The number of the link, if it is a tap.
fn tap(message: &Message) -> Option<u32> {
    let Message::NewLink(link) = message else { return None };
    let is_tap = link.attributes.iter().any(|attribute| {
        let LinkAttribute::LinkInfo(info) = attribute else { return false };
        info.iter().any(|part| matches!(part, LinkInfo::Kind(InfoKind::Tun)))
    });
    is_tap.then_some(link.header.index)
}

impl Link {
    /// The guest's device for it.
    pub(super) fn device(&self) -> NetConfig {
        NetConfig { create: true, ..NetConfig::new(self.tap.as_str(), mac_text(self.mac)) }
    }

    /// Joins it with its tap, which exists by now.
    pub(super) fn join(&self) -> Result<(), Error> {
        join(self).map_err(|source| Error::Join {
            interface: self.name.clone(),
            tap: self.tap.clone(),
            source,
        })
    }
}

/// Names the taps beside `links`.
fn name_taps(links: &mut [Link], former: &[Link], spare: &[String]) {
    let mut spare = spare.iter();
    let mut taken: Vec<String> = former.iter().map(|link| link.tap.clone()).collect();
    taken.extend(links.iter().map(|link| link.name.clone()));
    for link in links {
        if let Some(same) = former.iter().find(|same| same.index == link.index) {
            link.tap.clone_from(&same.tap);
            continue;
        }
        let fresh = || (0_u32..).map(|number| format!("tap{number}"));
        let mut free = spare.next().cloned().into_iter().chain(fresh());
        link.tap = free.find(|tap| !taken.contains(tap)).expect("there is always one more");
        taken.push(link.tap.clone());
    }
}

fn join(link: &Link) -> io::Result<()> {
    let netlink = Netlink::open()?;
    let tap = index_of(&netlink, &link.tap)?;
    let mut up = LinkMessage::default();
    up.header.index = tap;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    up.attributes.push(LinkAttribute::Mtu(link.mtu));
    netlink.change(Message::SetLink(up), 0)?;
    let mut up = LinkMessage::default();
    up.header.index = link.index;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    netlink.change(Message::SetLink(up), 0)?;
    redirect(&netlink, link.index, tap)?;
    redirect(&netlink, tap, link.index)
}

/// The number of the interface called `name`.
fn index_of(netlink: &Netlink, name: &str) -> io::Result<u32> {
    let named = |message: Message| {
        let Message::NewLink(link) = message else { return None };
        let matches = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(other) if other == name);
        link.attributes.iter().any(matches).then_some(link.header.index)
    };
    let links = netlink.dump(Message::GetLink(LinkMessage::default()))?;
    links.into_iter().find_map(named).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Sends everything that arrives at interface `from` out by interface `to`.
fn redirect(netlink: &Netlink, from: u32, to: u32) -> io::Result<()> {
    // A former sandbox of the same namespace may have been killed and left its own; a matchall
    // filter cannot be replaced.
    let _ = netlink.change(Message::DelQueueDiscipline(ingress(from)), 0);
    let create = NLM_F_CREATE | NLM_F_EXCL;
    netlink.change(Message::NewQueueDiscipline(ingress(from)), create)?;
    netlink.change(Message::NewTrafficFilter(redirection(from, to)), create)
}

/// The number of an interface as traffic control writes it.
fn signed(index: u32) -> i32 {
    i32::try_from(index).expect("the kernel numbers interfaces with positive ints")
}

/// The ingress qdisc of an interface.
fn ingress(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(signed(index));
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.attributes.push(TcAttribute::Kind(INGRESS.into()));
    message
}

/// The filter that matches everything and redirects it to the egress of `to`.
fn redirection(from: u32, to: u32) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    let mut message = TcMessage::with_index(signed(from));
    message.header.parent = TcHandle { major: u16::MAX, minor: 0 };
    message.header.info = FILTER_INFO;
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.into()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![
            action,
        ]))]),
    ];
    message
}

/// The interfaces a guest can take over: those that carry Ethernet frames. A tap with an address is an
/// engine's: behind it is a program that stands for the network (slirp4netns, pasta). Ours have none.
fn links(messages: &[Message], addresses: &[Message]) -> Vec<Link> {
    let mut links: Vec<Link> = messages
        .iter()
        .filter_map(|message| link(message).map(|link| (message, link)))
        .filter(|(message, link)| {
            tap(message).is_none() || addresses.iter().any(|it| address(it, link).is_some())
        })
        .map(|(_, link)| link)
        .collect();
    links.sort_by_key(|link| link.index);
    links
}

fn link(message: &Message) -> Option<Link> {
    let Message::NewLink(message) = message else { return None };
    let header = &message.header;
    if header.link_layer_type != LinkLayerType::Ether || header.flags.contains(LinkFlags::Loopback)
    {
        return None;
    }
    let mut link = Link {
        index: header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        up: header.flags.contains(LinkFlags::Up),
        tap: String::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok()?,
            LinkAttribute::LinkInfo(info) if !is_wire(info) => return None,
            _ => {}
        }
    }
    Some(link)
}

/// Whether frames that arrive at such an interface come from outside the namespace.
fn is_wire(info: &[LinkInfo]) -> bool {
    !info.iter().any(|part| {
        let LinkInfo::Kind(kind) = part else { return false };
        matches!(kind, InfoKind::Dummy | InfoKind::Bridge | InfoKind::Ifb)
    })
}

fn interface(link: &Link, addresses: &[Message]) -> Interface {
    Interface {
        mac: link.mac,
        name: link.name.clone(),
        mtu: link.mtu,
        addresses: addresses.iter().filter_map(|message| address(message, link)).collect(),
    }
}

fn address(message: &Message, link: &Link) -> Option<Address> {
    let Message::NewAddress(message) = message else { return None };
    if message.header.index != link.index {
        return None;
    }
    // The address proper is IFA_LOCAL where there is one; IFA_ADDRESS is the peer's then.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let remote = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or(remote)?;
    // The guest makes the link-local address from the hardware address, as the host did.
    let made_anew = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    (!made_anew).then_some(Address { ip, prefix: message.header.prefix_len })
}

/// Routes the guest has to be told, those on a link first: a gateway has to be reachable when its
/// route is added.
fn sorted_routes(messages: &[Message], links: &[Link]) -> Vec<Route> {
    let mut routes: Vec<Route> =
        messages.iter().filter_map(|message| route(message, links)).collect();
    routes.sort_by_key(|route| (route.gateway.is_some(), route.destination.is_none()));
    routes
}

fn route(message: &Message, links: &[Link]) -> Option<Route> {
    let Message::NewRoute(message) = message else { return None };
    let header = &message.header;
    let told = header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        // Routes of the kernel's own come with the addresses.
        && header.protocol != RouteProtocol::Kernel;
    if !told {
        return None;
    }
    let mut route = Route {
        destination: None,
        gateway: None,
        source: None,
        interface: String::new(),
        on_link: header.scope == RouteScope::Link,
        metric: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => {
                let prefix = header.destination_prefix_length;
                route.destination = Some(Address { ip: route_ip(ip)?, prefix });
            }
            RouteAttribute::Gateway(ip) => route.gateway = Some(route_ip(ip)?),
            RouteAttribute::PrefSource(ip) => route.source = Some(route_ip(ip)?),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => {
                route.interface = links.iter().find(|link| link.index == *index)?.name.clone();
            }
            _ => {}
        }
    }
    (!route.interface.is_empty()).then_some(route)
}

fn route_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbour(message: &Message, links: &[Link]) -> Option<Neighbour> {
    let Message::NewNeighbour(message) = message else { return None };
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let interface = links.iter().find(|link| link.index == message.header.ifindex)?.name.clone();
    let mut ip = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some((*v6).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { ip: ip?, mac: mac?, interface })
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
