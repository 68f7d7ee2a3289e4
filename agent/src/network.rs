//! Interfaces, addresses, routes and neighbours of the guest, over rtnetlink (rtnetlink(7)).

use std::fs;
use std::io;
use std::net::IpAddr;

use agent_protocol::{Address, Failed, Interface, Neighbour, Network, Route};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::failure::{Context, failed};

/// Index of the loopback interface: the first one of every network namespace.
const LOOPBACK: u32 = 1;

/// A link as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
    virtio: bool,
}

/// A connection to the kernel's routing tables.
struct Netlink {
    socket: Socket,
}

/// Brings loopback up.
pub fn bring_up_loopback() -> io::Result<()> {
    Netlink::open()?.set_link(LOOPBACK, Vec::new(), true)
}

/// Sets up what `network` lists and is not there yet.
pub fn configure(network: &Network) -> Result<(), Failed> {
    if network.interfaces.is_empty() && network.routes.is_empty() && network.neighbours.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open().context("open a netlink socket")?;
    let links = netlink.links().context("list interfaces")?;
    let assigned = assign(&network.interfaces, &links);
    for link in in_the_way(&network.interfaces, &assigned, &links) {
        let name = LinkAttribute::IfName(format!("spare{}", link.index));
        netlink
            .set_link(link.index, vec![name], false)
            .context(format_args!("free the name {}", link.name))?;
    }
    let mut indexes = Vec::new();
    for (interface, link) in network.interfaces.iter().zip(assigned) {
        let link = link.ok_or_else(|| {
            failed(format!("interface {}: the guest has no device for it", interface.name))
        })?;
        netlink.set_up(interface, link).context(format_args!("set up {}", interface.name))?;
        indexes.push((interface.name.as_str(), link.index));
    }
    indexes.push(("lo", LOOPBACK));
    let index = |name: &str| {
        let found = indexes.iter().find(|(known, _)| *known == name);
        found.map(|(_, index)| *index).ok_or_else(|| failed(format!("no interface {name:?}")))
    };
    for route in &network.routes {
        let message = route_message(route, index(&route.interface)?)?;
        netlink
            .change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
            .context(format_args!("add route {route:?}"))?;
    }
    for neighbour in &network.neighbours {
        let message = neighbour_message(neighbour, index(&neighbour.interface)?);
        netlink
            .change(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
            .context(format_args!("add neighbour {}", neighbour.ip))?;
    }
    Ok(())
}

/// Each interface's link: by address, else the next virtio link that no other interface has by its
/// address.
fn assign<'a>(interfaces: &[Interface], links: &'a [Link]) -> Vec<Option<&'a Link>> {
    let by_mac = |mac: [u8; 6]| links.iter().find(|link| link.mac == mac);
    let listed = |link: &&Link| interfaces.iter().any(|interface| link.mac == interface.mac);
    let mut spare = links.iter().filter(|link| link.virtio && !listed(link));
    interfaces.iter().map(|interface| by_mac(interface.mac).or_else(|| spare.next())).collect()
}

/// Links with a name that is another one's: those that are to swap theirs, each of which has to let go
/// of it before.
fn in_the_way<'a>(
    interfaces: &[Interface],
    assigned: &[Option<&Link>],
    links: &'a [Link],
) -> Vec<&'a Link> {
    let is_in_the_way = |link: &&Link| {
        interfaces.iter().zip(assigned).any(|(interface, other)| {
            interface.name == link.name && other.is_some_and(|other| other.index != link.index)
        })
    };
    links.iter().filter(is_in_the_way).collect()
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    fn set_up(&self, interface: &Interface, link: &Link) -> io::Result<()> {
        let index = link.index;
        let mut attributes = vec![LinkAttribute::Mtu(interface.mtu)];
        if link.mac != interface.mac {
            attributes.push(LinkAttribute::Address(interface.mac.to_vec()));
        }
        // One that is up cannot be renamed; it has its name already.
        if link.name != interface.name {
            attributes.push(LinkAttribute::IfName(interface.name.clone()));
        }
        self.set_link(index, attributes, false)?;
        for address in &interface.addresses {
            let message = address_message(address, index);
            let flags = NLM_F_CREATE | NLM_F_REPLACE;
            self.change(RouteNetlinkMessage::NewAddress(message), flags)?;
        }
        self.set_link(index, Vec::new(), true)
    }

    fn set_link(&self, index: u32, attributes: Vec<LinkAttribute>, up: bool) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        if up {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        message.attributes = attributes;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    fn links(&self) -> io::Result<Vec<Link>> {
        self.send(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let mut links = Vec::new();
        self.receive(|message| {
            if let RouteNetlinkMessage::NewLink(message) = message {
                links.push(link(&message));
            }
        })?;
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, flags | NLM_F_ACK)?;
        self.receive(|_| {})
    }

    fn send(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    /// Reads messages up to the acknowledgement or the end of the dump.
    fn receive(&self, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return error.code.map_or(Ok(()), |_| Err(error.to_io()));
                    }
                    NetlinkPayload::InnerMessage(message) => each(message),
                    _ => {}
                }
                // Messages start at multiples of four bytes (netlink(7)).
                let length = (message.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

fn link(message: &LinkMessage) -> Link {
    let mut link =
        Link { index: message.header.index, name: String::new(), mac: vec![], virtio: false };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            _ => {}
        }
    }
    let driver = fs::read_link(format!("/sys/class/net/{}/device/driver", link.name));
    link.virtio = driver.is_ok_and(|path| path.ends_with("virtio_net"));
    link
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address_message(address: &Address, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.attributes =
        vec![AddressAttribute::Local(address.ip), AddressAttribute::Address(address.ip)];
    match address.ip {
        IpAddr::V4(ip) if address.prefix < 31 => {
            let broadcast =
                u32::from(ip) | u32::MAX.checked_shr(address.prefix.into()).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast(broadcast.into()));
        }
        IpAddr::V4(_) => {}
        IpAddr::V6(ip) => {
            // The engine made sure that the address is unique; waiting for that again would leave
            // the container without network for its first second.
            message.header.flags = AddressHeaderFlags::Nodad;
            if ip.is_unicast_link_local() {
                message.header.scope = AddressScope::Link;
            }
        }
    }
    message
}

fn route_message(route: &Route, index: u32) -> Result<RouteMessage, Failed> {
    let destination = route.destination.as_ref();
    let known = destination.map(|address| address.ip).or(route.gateway).or(route.source);
    let family = family(known.ok_or_else(|| failed("a route needs an address"))?);
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = RouteType::Unicast;
    let link_scope = route.gateway.is_none() && family == AddressFamily::Inet;
    message.header.scope = if link_scope { RouteScope::Link } else { RouteScope::Universe };
    message.attributes.push(RouteAttribute::Oif(index));
    if let Some(address) = destination {
        message.header.destination_prefix_length = address.prefix;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(address.ip)));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        if route.on_link {
            message.header.flags |= RouteFlags::Onlink;
        }
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    if route.metric != 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    Ok(message)
}

fn neighbour_message(neighbour: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    let ip = match neighbour.ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(ip),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, last: u8) -> Interface {
        Interface { mac: [2, 0, 0, 0, 0, last], name: name.into(), mtu: 1500, addresses: vec![] }
    }

    fn link_with(index: u32, last: u8, virtio: bool) -> Link {
        Link { index, name: format!("eth{index}"), mac: vec![2, 0, 0, 0, 0, last], virtio }
    }

    #[test]
    fn links_are_found_by_address_first() {
        let links = [link_with(2, 9, true), link_with(3, 1, true)];

        let assigned = assign(&[interface("a", 1), interface("b", 7)], &links);

        assert_eq!(assigned, [Some(&links[1]), Some(&links[0])]);
    }

    #[test]
    fn only_virtio_links_stand_in_for_a_missing_address() {
        let links = [link_with(2, 9, false)];

        assert_eq!(assign(&[interface("a", 1)], &links), [None]);
    }

    #[test]
    fn who_has_a_name_that_another_one_is_to_have_lets_go_of_it() {
        let links = [link_with(0, 1, true), link_with(1, 2, true), link_with(2, 3, true)];
        let swapped = [interface("eth1", 1), interface("eth0", 2), interface("eth2", 3)];

        let found = in_the_way(&swapped, &assign(&swapped, &links), &links);

        assert_eq!(found, [&links[0], &links[1]]);
    }

    #[test]
    fn a_route_without_addresses_is_refused() {
        let route = Route {
            destination: None,
            gateway: None,
            source: None,
            interface: "eth0".into(),
            on_link: false,
            metric: 0,
        };

        assert!(route_message(&route, 2).is_err());
    }

    #[test]
    fn a_broadcast_address_fills_the_host_part() {
        let address = Address { ip: [10, 1, 2, 3].into(), prefix: 16 };

        let message = address_message(&address, 2);

        let broadcast = AddressAttribute::Broadcast([10, 1, 255, 255].into());
        assert!(message.attributes.contains(&broadcast));
    }
}
