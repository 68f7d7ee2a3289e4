//! The network of a guest, at the start and later.

use serde::{Deserialize, Serialize};

/// The network of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Interfaces to set up; loopback is always brought up and is not listed.
    pub interfaces: Vec<Interface>,
    /// Routes to add once all interfaces are up, in order.
    pub routes: Vec<Route>,
    /// Neighbour entries to add, that is, permanent ARP and NDP entries of the host's namespace.
    pub neighbours: Vec<Neighbour>,
    /// Whether the engine has a name server at [`RESOLVER`](crate::RESOLVER) in the host's side of
    /// the network: then the guest has one there, too, which asks it.
    pub resolver: bool,
}

/// What changes of the network of the guest, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkChange {
    /// Interfaces whose devices are let go of, by name.
    pub release: Vec<String>,
    /// Devices to take, for interfaces that are new.
    pub take: Vec<NetworkDevice>,
    /// What there is afterwards; of interfaces, routes and neighbours only what is missing is set up.
    pub network: Network,
}

/// A device that an interface of the guest can be made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkDevice {
    /// One that was attached to the machine, and what the guest may know its place by: one of these
    /// names is there.
    Attached(Vec<String>),
    /// One that was let go of, when its interface had this name.
    Released(String),
}

/// A network interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Hardware address by which the agent finds the virtio-net device.
    pub mac: [u8; 6],
    /// Name to give it, such as `eth0`.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Addresses with their prefix lengths.
    pub addresses: Vec<Address>,
}

/// An interface address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: std::net::IpAddr,
    /// Prefix length in bits.
    pub prefix: u8,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination; `None` is the default route of the address family of `gateway` or `source`.
    pub destination: Option<Address>,
    /// Next hop.
    pub gateway: Option<std::net::IpAddr>,
    /// Preferred source address.
    pub source: Option<std::net::IpAddr>,
    /// Name of the interface, as in [`Interface::name`].
    pub interface: String,
    /// Whether the destination is on the link (scope link).
    pub on_link: bool,
    /// Metric, or 0 for the kernel's default.
    pub metric: u32,
}

/// A permanent neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Address of the neighbour.
    pub ip: std::net::IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Name of the interface.
    pub interface: String,
}
