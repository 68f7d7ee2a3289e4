//! Network device (virtio 1.2, section 5.1): Ethernet frames between the guest and a tap.

mod receive;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use self::receive::{Receive, Room};
pub use self::tap::{Link, Tap, TapError};
use super::buffers::Buffers;
use super::complaints::Complaints;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::{ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config};

/// Bytes of the header in front of each frame (virtio 1.2, section 5.1.6: `virtio_net_hdr`).
pub const HEADER_BYTES: usize = 12;

/// Ethernet addresses, a VLAN tag and the type.
const ETHERNET_BYTES: usize = 18;

/// Largest frame with its header: what segmentation offload hands over in one piece.
const MAX_FRAME_BYTES: usize = HEADER_BYTES + ETHERNET_BYTES + u16::MAX as usize;

/// Shortest frame with its header.
const MIN_FRAME_BYTES: usize = HEADER_BYTES + 14;

/// Queue numbers (virtio 1.2, section 5.1.2).
const RECEIVE: usize = 0;
/// Large enough to hold several of the largest frames in a driver's usual page fractions.
const QUEUE_SIZE: u16 = 256;

/// What is left to the device to do with a frame of the guest; the tap passes it on.
const TRANSMIT_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO;

/// What may be left to the guest to do with a frame, and the bit that tells the tap.
const RECEIVE_OFFLOADS: [(u32, libc::c_uint); 5] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];

/// Bytes of the configuration space up to and with `mtu` (virtio 1.2, section 5.1.4).
const CONFIG_BYTES: usize = 12;

/// A network device on a [`Tap`].
pub struct Net<L> {
    link: L,
    config: [u8; CONFIG_BYTES],
    complaints: Complaints,
    active: Option<Active>,
}

struct Active {
    receive: Receive,
    transmit: VirtQueue,
    buffers: Buffers,
    /// Whether a frame of the guest waits for the link to take it.
    blocked: bool,
}

impl<L: Link> Net<L> {
    /// Creates an idle device with the Ethernet address `mac`.
    pub fn new(link: L, mac: [u8; 6]) -> Self {
        let mut config = [0; CONFIG_BYTES];
        config[0..6].copy_from_slice(&mac);
        config[6..8].copy_from_slice(&VIRTIO_NET_S_LINK_UP.to_le_bytes()[..2]);
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&link.mtu().unwrap_or(0).to_le_bytes());
        Net { link, config, complaints: Complaints::of("net"), active: None }
    }

    /// The room a frame may need under these features.
    fn room(&self, features: u64) -> Room {
        if features & 1 << VIRTIO_NET_F_MRG_RXBUF == 0 {
            return Room::Chain;
        }
        // Without a segmentation offload no frame is larger than the link's.
        let mtu = match self.link.mtu() {
            Some(mtu) if offloads(features) & !libc::TUN_F_CSUM == 0 => mtu,
            _ => u16::MAX,
        };
        Room::Bytes(HEADER_BYTES + ETHERNET_BYTES + usize::from(mtu))
    }

    fn receive(&mut self) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        active.receive.run(self.link.as_fd(), &mut self.complaints)
    }

    /// Moves the guest's frames to the link, until one of them has no more of it.
    fn transmit(&mut self) -> Result<(), QueueError> {
        let Net { link, complaints, active, .. } = self;
        let Some(Active { transmit, buffers, blocked, .. }) = active else { return Ok(()) };
        *blocked = false;
        transmit.drain(|chain, _| {
            buffers.clear();
            if let Err(error) = buffers.add(chain.readable()) {
                complaints.add(&error);
                return Verdict::Used(0);
            }
            if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&buffers.bytes()) {
                complaints.add(&format_args!("a frame of {} bytes dropped", buffers.bytes()));
                return Verdict::Used(0);
            }
            match buffers.write_to(link.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *blocked = true;
                    return Verdict::Keep;
                }
                Err(error) => complaints.add(&format_args!("frame dropped: {error}")),
                Ok(_) => {}
            }
            Verdict::Used(0)
        })
    }
}

/// What the link may leave to a driver that negotiated `features`.
fn offloads(features: u64) -> libc::c_uint {
    let chosen = RECEIVE_OFFLOADS.iter().filter(|(feature, _)| features & 1 << feature != 0);
    chosen.fold(0, |bits, (_, bit)| bits | bit)
}

impl<L: Link> VirtioDevice for Net<L> {
    fn traits(&self) -> DeviceTraits {
        let receive = RECEIVE_OFFLOADS.iter().fold(0, |bits, (feature, _)| bits | 1 << feature);
        let mtu = u64::from(self.link.mtu().is_some()) << VIRTIO_NET_F_MTU;
        DeviceTraits {
            device_type: VIRTIO_ID_NET,
            features: 1 << VIRTIO_NET_F_MAC
                | 1 << VIRTIO_NET_F_STATUS
                | 1 << VIRTIO_NET_F_MRG_RXBUF
                | TRANSMIT_FEATURES
                | receive
                | mtu,
            queue_sizes: &[QUEUE_SIZE, QUEUE_SIZE],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let [receive, transmit] = activation.into_queues()?;
        self.link.set_offloads(offloads(features)).map_err(ActivateError::Backend)?;
        self.active = Some(Active {
            receive: Receive::new(receive, self.room(features)),
            buffers: Buffers::new(transmit.memory().clone()),
            transmit,
            blocked: false,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        if index == RECEIVE { self.receive() } else { self.transmit() }
    }

    fn backends(&self) -> Vec<Backend> {
        let events = EventSet::IN | EventSet::OUT;
        vec![Backend { fd: self.link.as_fd().as_raw_fd(), events }]
    }

    fn backend_ready(&mut self, _index: usize, events: EventSet) -> Result<(), QueueError> {
        let blocked = self.active.as_ref().is_some_and(|active| active.blocked);
        if blocked && events.contains(EventSet::OUT) {
            self.transmit()?;
        }
        self.receive()
    }
}
