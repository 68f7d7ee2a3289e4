//! Connections to the guest from within its own network namespace on the host.
//!
//! Podman of a user who is not root publishes ports by a program, rootlessport, that connects to the
//! container's address from inside the network namespace. There the address is the namespace's own, and
//! nobody listens. So it stops being local: a route leads through the tap to the guest. The guest sends
//! its answers to an address that only these connections have, and they are not passed on to the
//! interface as everything else is, but to the namespace's network stack.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use agent_protocol::{Address, Interface, Neighbour, Network as GuestNetwork, Route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::tc::{
    TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::netlink::Netlink;
use super::network::{Link, Network};
use crate::rootless;

/// Where these connections come from: the address for packets of those who have none (RFC 7600).
const SOURCE: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);

/// The tap's hardware address, which the guest sends its answers to.
const TAP_MAC: [u8; 6] = [2, 0, 0, 1, 0, 0];

/// The loopback interface is the first of every namespace.
const LOOPBACK: u32 = 1;

/// The kernel's table of local addresses (RT_TABLE_LOCAL of linux/rtnetlink.h).
const LOCAL_TABLE: u8 = 255;

/// Where the destination is in an IPv4 header, in bytes.
const DESTINATION_OFFSET: i32 = 16;

/// Priority and protocol (`ETH_P_IP`) of the filter that finds the answers, before the one of the rest.
const FILTER_INFO: u32 = (1 << 16) | 0x0800_u16.to_be() as u32;

/// A container's address that connections from its namespace shall reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hairpin {
    /// Number of the interface that has the address, and its name.
    interface: (u32, String),
    /// The tap beside it.
    pub(super) tap: String,
    /// The guest's hardware address there.
    mac: [u8; 6],
    /// The address.
    address: Ipv4Addr,
}

impl Hairpin {
    /// The first address of `network`, if it is that of a user's engine.
    pub(super) fn of(network: &Network) -> Option<Self> {
        rootless::is_in_user_namespace().then(|| Self::first(network)).flatten()
    }

    fn first(network: &Network) -> Option<Self> {
        let interfaces = network.links.iter().zip(&network.guest.interfaces);
        let first = |(link, interface): (&Link, &Interface)| {
            let ipv4 = |address: &Address| match address.ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            };
            let address = interface.addresses.iter().find_map(ipv4)?;
            let interface = (link.index, link.name.clone());
            Some(Self { interface, tap: link.tap.clone(), mac: link.mac, address })
        };
        interfaces.into_iter().find_map(first)
    }

    /// Tells the guest the way of the answers.
    pub(super) fn tell(&self, guest: &mut GuestNetwork) {
        let interface = self.interface.1.clone();
        let ip = IpAddr::V4(SOURCE);
        guest.neighbours.push(Neighbour { ip, mac: TAP_MAC, interface: interface.clone() });
        guest.routes.insert(
            0,
            Route {
                destination: Some(Address { ip, prefix: 32 }),
                gateway: None,
                source: None,
                interface,
                on_link: true,
                metric: 0,
            },
        );
    }

    /// Opens the way through the tap of this number, which is up.
    pub(super) fn open(&self, netlink: &Netlink, tap: u32) -> io::Result<()> {
        // The answers come from an address that an interface of the namespace has.
        fs::write(format!("/proc/sys/net/ipv4/conf/{}/accept_local", self.tap), "1")?;
        let make = NLM_F_CREATE | NLM_F_REPLACE;
        netlink.change(Message::SetLink(hardware_address(tap)), 0)?;
        netlink.change(Message::NewTrafficFilter(answers(tap)), NLM_F_CREATE)?;
        netlink.change(Message::SetLink(up(LOOPBACK)), 0)?;
        netlink.change(Message::NewAddress(source_address()), make)?;
        netlink.change(Message::NewNeighbour(self.neighbour(tap)), make)?;
        netlink.change(Message::NewRoute(self.route(tap)), make)?;
        match netlink.change(Message::DelRoute(self.local_route()), 0) {
            // The way was open before, for another sandbox.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Gives the address back to the namespace. The rest ends with the tap.
    pub(super) fn close(&self, netlink: &Netlink) -> io::Result<()> {
        let mut local = self.local_route();
        local.header.protocol = RouteProtocol::Kernel;
        local.attributes.push(RouteAttribute::PrefSource(self.address.into()));
        netlink.change(Message::DelAddress(source_address()), 0)?;
        netlink.change(Message::NewRoute(local), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn neighbour(&self, tap: u32) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = tap;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(self.address.into()),
            NeighbourAttribute::LinkLayerAddress(self.mac.to_vec()),
        ];
        message
    }

    fn route(&self, tap: u32) -> RouteMessage {
        let mut message = self.route_to_it();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::Link;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(tap));
        message.attributes.push(RouteAttribute::PrefSource(SOURCE.into()));
        message
    }

    fn local_route(&self) -> RouteMessage {
        let mut message = self.route_to_it();
        message.header.table = LOCAL_TABLE;
        message.header.scope = RouteScope::Host;
        message.header.kind = RouteType::Local;
        message.attributes.push(RouteAttribute::Oif(self.interface.0));
        message
    }

    fn route_to_it(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = 32;
        message.attributes.push(RouteAttribute::Destination(self.address.into()));
        message
    }
}

fn up(link: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = link;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message
}

fn hardware_address(tap: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = tap;
    message.attributes.push(LinkAttribute::Address(TAP_MAC.to_vec()));
    message
}

fn source_address() -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = LOOPBACK;
    message.attributes =
        vec![AddressAttribute::Local(SOURCE.into()), AddressAttribute::Address(SOURCE.into())];
    message
}

/// The filter that lets the guest's answers pass: a match that does nothing ends the search.
fn answers(tap: u32) -> TcMessage {
    let mut key = TcU32Key::default();
    key.mask = u32::MAX;
    key.val = SOURCE.into();
    key.off = DESTINATION_OFFSET;
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![key];
    let index = i32::try_from(tap).expect("the kernel numbers interfaces with positive ints");
    let mut message = TcMessage::with_index(index);
    message.header.parent = TcHandle { major: u16::MAX, minor: 0 };
    message.header.info = FILTER_INFO;
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::ClassId(TcHandle { major: 1, minor: 1 })),
            TcOption::U32(TcFilterU32Option::Selector(selector)),
        ]),
    ];
    message
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn shell(script: &str) -> String {
        let output = Command::new("sh").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn number(link: &str) -> u32 {
        shell(&format!("ip -o link show {link} | cut -d : -f 1")).trim().parse().unwrap()
    }

    #[test]
    #[ignore = "needs root"]
    fn an_address_of_the_namespace_leads_through_the_tap() {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            shell(
                "ip link add eth0 type veth peer name outside; ip addr add 10.0.2.100/24 dev eth0
                 ip link set eth0 up; ip tuntap add tap7 mode tap; ip link set tap7 up
                 tc qdisc add dev tap7 ingress",
            );
            let index = number("eth0");
            let tap = number("tap7");
            let hairpin = Hairpin {
                interface: (index, "eth0".into()),
                tap: "tap7".into(),
                mac: [2, 0, 0, 0, 0, 9],
                address: Ipv4Addr::new(10, 0, 2, 100),
            };

            hairpin.open(&Netlink::open().unwrap(), tap).unwrap();

            let route = shell("ip route get 10.0.2.100");
            assert!(route.contains("dev tap7 src 192.0.0.8"), "{route}");
            let neighbour = shell("ip neigh show dev tap7");
            assert!(neighbour.contains("10.0.2.100 lladdr 02:00:00:00:00:09"), "{neighbour}");
            let filter = shell("tc filter show dev tap7 ingress");
            assert!(filter.contains("match c0000008/ffffffff at 16"), "{filter}");
            let of_loopback = shell("ip -4 -o addr show lo");
            assert!(of_loopback.contains("192.0.0.8/32"), "{of_loopback}");

            shell("ip link del tap7");
            hairpin.close(&Netlink::open().unwrap()).unwrap();

            let route = shell("ip route get 10.0.2.100");
            assert!(route.starts_with("local 10.0.2.100"), "{route}");
            assert!(!shell("ip -4 -o addr show lo").contains("192.0.0.8"));
        });
        thread.join().unwrap();
    }
}
