//! Network device (virtio 1.2, section 5.1): Ethernet frames between the guest and a tap.

mod control;
mod gone;
mod links;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use self::control::{Command, Control};
use self::gone::Gone;
use self::links::Links;
use self::receive::{Receive, Room};
pub use self::tap::{Link, Missing, Tap, TapError};
use self::transmit::Transmit;
use self::vhost::Signal;
pub use self::vhost::{Vhost, VhostError};
use super::complaints::Complaints;
use super::queue::{QueueError, VirtQueue};
use super::rate_limit::RateLimiter;
use super::state::{DeviceState, Position, RestoreError};
use super::{ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config};
use crate::interrupt::Interrupt;

/// Bytes of the header in front of each frame (virtio 1.2, section 5.1.6: `virtio_net_hdr`).
pub const HEADER_BYTES: usize = 12;

/// Ethernet addresses, a VLAN tag and the type.
const ETHERNET_BYTES: usize = 18;

/// Largest frame with its header: what segmentation offload hands over in one piece.
const MAX_FRAME_BYTES: usize = HEADER_BYTES + ETHERNET_BYTES + u16::MAX as usize;

/// Shortest frame with its header.
const MIN_FRAME_BYTES: usize = HEADER_BYTES + 14;

/// Most queue pairs of one device; more kick eventfds than that cost more than they bring.
pub const MAX_PAIRS: u16 = 16;

/// Large enough to hold several of the largest frames in a driver's usual page fractions.
const QUEUE_SIZE: u16 = 256;

/// The queues of the largest device: of each pair first the receive queue, then the transmit queue,
/// and behind them all the control queue (virtio 1.2, section 5.1.2).
const QUEUE_SIZES: [u16; 2 * MAX_PAIRS as usize + 1] = [QUEUE_SIZE; 2 * MAX_PAIRS as usize + 1];

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

/// A network device on a [`Tap`], of which each queue pair has a queue of its own.
pub struct Net<L> {
    links: Links<L>,
    config: [u8; CONFIG_BYTES],
    /// For each direction what all pairs together may move.
    receive_limiter: RateLimiter,
    transmit_limiter: RateLimiter,
    /// The pair that comes first when a limiter admits something again.
    first_turn: usize,
    complaints: Complaints,
    active: Option<Active>,
}

struct Active {
    pairs: Pairs,
    control: Option<Control>,
    /// Number of the control queue.
    control_index: usize,
    interrupt: Arc<dyn Interrupt>,
}

/// The queue pairs a driver knows of, by who moves the frames.
enum Pairs {
    /// We do.
    Own(Vec<Pair>),
    /// The host's kernel does, in these queues.
    Kernel(Vec<VirtQueue>),
}

struct Pair {
    receive: Receive,
    transmit: Transmit,
}

impl<L: Link> Net<L> {
    /// Creates an idle device with the Ethernet address `mac` and a queue pair for each of `links`,
    /// of which there are 1 to [`MAX_PAIRS`], all attached.
    pub fn new(links: Vec<L>, mac: [u8; 6]) -> Self {
        let pairs = u16::try_from(links.len()).unwrap_or(u16::MAX);
        assert!((1..=MAX_PAIRS).contains(&pairs), "a device has 1 to MAX_PAIRS links");
        let mut config = [0; CONFIG_BYTES];
        config[0..6].copy_from_slice(&mac);
        config[6..8].copy_from_slice(&VIRTIO_NET_S_LINK_UP.to_le_bytes()[..2]);
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..12].copy_from_slice(&links[0].mtu().unwrap_or(0).to_le_bytes());
        Net {
            links: Links::new(links),
            config,
            receive_limiter: RateLimiter::unlimited(),
            transmit_limiter: RateLimiter::unlimited(),
            first_turn: 0,
            complaints: Complaints::of("net"),
            active: None,
        }
    }

    /// Limits what the guest receives and transmits, in bytes of frames and in frames. It is without
    /// effect on a device that the host's kernel serves.
    pub fn limited(mut self, receive: RateLimiter, transmit: RateLimiter) -> Self {
        self.receive_limiter = receive;
        self.transmit_limiter = transmit;
        self
    }

    /// Leaves moving the frames to the host's kernel. `vhost` was opened for the links of the device.
    pub fn served_by(mut self, vhost: Vhost) -> Self {
        self.links.serve_by(vhost);
        self
    }

    fn mtu(&self) -> Option<u16> {
        self.links.all()[0].mtu()
    }

    /// The room a frame may need under these features.
    fn room(&self, features: u64) -> Room {
        if features & 1 << VIRTIO_NET_F_MRG_RXBUF == 0 {
            return Room::Chain;
        }
        // Without a segmentation offload no frame is larger than the link's.
        let mtu = match self.mtu() {
            Some(mtu) if offloads(features) & !libc::TUN_F_CSUM == 0 => mtu,
            _ => u16::MAX,
        };
        Room::Bytes(HEADER_BYTES + ETHERNET_BYTES + usize::from(mtu))
    }

    /// Serves the control queue.
    fn control(&mut self) -> Result<(), QueueError> {
        let Net { links, complaints, active, .. } = self;
        let Some(Active { pairs, control: Some(control), .. }) = active else { return Ok(()) };
        control.run(complaints, |Command::UsePairs(count), complaints| {
            let count = usize::from(count);
            if !(1..=pairs.count()).contains(&count) {
                complaints.add(&format_args!("{count} queue pairs, of {}", pairs.count()));
                return false;
            }
            let before = links.attached();
            if let Err(error) = links.use_pairs(count) {
                complaints.add(&format_args!("use {count} queue pairs: {error}"));
                return false;
            }
            // The driver may have kicked them before they were in use.
            (before..count).for_each(|pair| pairs.kick(pair));
            true
        })
    }

    fn receive(&mut self, pair: usize) -> Result<(), QueueError> {
        let Net { links, receive_limiter, complaints, active, .. } = self;
        match own_pair(links, active, pair) {
            Some((pair, link)) => pair.receive.run(link.as_fd(), receive_limiter, complaints),
            None => Ok(()),
        }
    }

    fn transmit(&mut self, pair: usize) -> Result<(), QueueError> {
        let Net { links, transmit_limiter, complaints, active, .. } = self;
        match own_pair(links, active, pair) {
            Some((pair, link)) => pair.transmit.run(link.as_fd(), transmit_limiter, complaints),
            None => Ok(()),
        }
    }

    /// Goes on where a limiter made `run` stop, in each pair in turn: whoever comes first may leave
    /// nothing for the others.
    fn admitted(
        &mut self,
        run: fn(&mut Self, usize) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        let count = self.links.count();
        self.first_turn = (self.first_turn + 1) % count;
        (0..count).try_for_each(|nth| run(self, (self.first_turn + nth) % count))
    }

    /// Passes on what the kernel has to say.
    fn signalled(&mut self, signal: Signal) {
        let Some(active) = &self.active else { return };
        match signal {
            Signal::Used => active.interrupt.used_buffer(),
            Signal::Broken => {
                active.interrupt.needs_reset();
                self.complaints.add(&"stopped until it is reset: vhost-net cannot use a queue");
                self.reset();
            }
        }
    }
}

impl Pairs {
    /// The pairs and the control queue, if there is one, that `queues` are under `features`, and the
    /// number of the latter.
    fn split(
        mut queues: Vec<VirtQueue>,
        features: u64,
    ) -> (Vec<VirtQueue>, Option<Control>, usize) {
        let several = features & 1 << VIRTIO_NET_F_MQ != 0;
        // To a driver that knows of one pair only, the control queue follows that (section 5.1.2).
        let control_index = if several { queues.len() / 2 * 2 } else { 2 };
        let has_control = features & 1 << VIRTIO_NET_F_CTRL_VQ != 0;
        let mut rest = queues.split_off(control_index).into_iter();
        (queues, rest.next().filter(|_| has_control).map(Control::new), control_index)
    }

    /// Those that we serve ourselves, with `room` for each received frame.
    fn own(queues: Vec<VirtQueue>, room: Room) -> Self {
        let mut queues = queues.into_iter();
        let pair = || {
            let (receive, transmit) = (queues.next()?, queues.next()?);
            Some(Pair { receive: Receive::new(receive, room), transmit: Transmit::new(transmit) })
        };
        Pairs::Own(std::iter::from_fn(pair).collect())
    }

    fn count(&self) -> usize {
        match self {
            Pairs::Own(pairs) => pairs.len(),
            Pairs::Kernel(queues) => queues.len() / 2,
        }
    }

    /// Where the device stands in each queue of the pairs. The kernel, if it moves the frames, must
    /// have been stopped.
    fn positions(&self, vhost: Option<&Vhost>) -> Result<Vec<Position>, QueueError> {
        match self {
            Pairs::Own(pairs) => Ok(pairs
                .iter()
                .flat_map(|pair| [pair.receive.position(), pair.transmit.position()])
                .collect()),
            Pairs::Kernel(queues) => (0..)
                .zip(queues)
                .map(|(index, queue)| {
                    queue.position_of_other(vhost.map_or(0, |vhost| vhost.next_available(index)))
                })
                .collect(),
        }
    }

    /// Has both queues of `pair` looked at once more.
    fn kick(&self, pair: usize) {
        match self {
            Pairs::Own(pairs) => {
                pairs[pair].receive.kick();
                pairs[pair].transmit.kick();
            }
            Pairs::Kernel(queues) => queues[2 * pair..][..2].iter().for_each(VirtQueue::kick),
        }
    }
}

/// Pair number `index` and its link, if the driver uses it and we serve it.
fn own_pair<'a, L: Link>(
    links: &'a Links<L>,
    active: &'a mut Option<Active>,
    index: usize,
) -> Option<(&'a mut Pair, &'a L)> {
    let Pairs::Own(pairs) = &mut active.as_mut()?.pairs else { return None };
    let link = links.all()[..links.attached()].get(index)?;
    Some((pairs.get_mut(index)?, link))
}

/// Where a device of these `traits` stands in each queue, that stands so in those of its `pairs`.
fn all_positions(
    mut pairs: Vec<Position>,
    control: Option<&Control>,
    control_index: usize,
    traits: DeviceTraits,
) -> Vec<Position> {
    // A driver that uses one pair of several may have its control queue before the others.
    if let Some(control) = control {
        pairs.insert(control_index, control.position());
    }
    pairs.resize(traits.queue_sizes.len(), Position::default());
    pairs
}

/// What the link may leave to a driver that negotiated `features`.
fn offloads(features: u64) -> libc::c_uint {
    let chosen = RECEIVE_OFFLOADS.iter().filter(|(feature, _)| features & 1 << feature != 0);
    chosen.fold(0, |bits, (_, bit)| bits | bit)
}

impl<L: Link> VirtioDevice for Net<L> {
    fn traits(&self) -> DeviceTraits {
        let receive = RECEIVE_OFFLOADS.iter().fold(0, |bits, (feature, _)| bits | 1 << feature);
        let mtu = u64::from(self.mtu().is_some()) << VIRTIO_NET_F_MTU;
        let several = self.links.count() > 1;
        let control =
            u64::from(several) << VIRTIO_NET_F_MQ | u64::from(several) << VIRTIO_NET_F_CTRL_VQ;
        DeviceTraits {
            device_type: VIRTIO_ID_NET,
            features: 1 << VIRTIO_NET_F_MAC
                | 1 << VIRTIO_NET_F_STATUS
                | 1 << VIRTIO_NET_F_MRG_RXBUF
                | TRANSMIT_FEATURES
                | receive
                | mtu
                | control,
            queue_sizes: &QUEUE_SIZES[..2 * self.links.count() + usize::from(several)],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let expected = self.traits().queue_sizes.len();
        let actual = activation.queues.len();
        if actual != expected {
            return Err(ActivateError::QueueCount { expected, actual });
        }
        let offloads = offloads(features);
        self.links.all()[0].set_offloads(offloads).map_err(ActivateError::Backend)?;
        let (queues, control, control_index) = Pairs::split(activation.queues, features);
        self.links.start(&queues, features).map_err(ActivateError::Backend)?;
        let pairs = match self.links.vhost() {
            Some(_) => Pairs::Kernel(queues),
            None => Pairs::own(queues, self.room(features)),
        };
        self.active =
            Some(Active { pairs, control, control_index, interrupt: activation.interrupt });
        Ok(())
    }

    fn reset(&mut self) {
        self.links.stop();
        self.active = None;
    }

    fn serves(&self, index: usize) -> bool {
        let several = self.links.count() > 1;
        // Which of the two is the control queue is for the driver to say.
        let may_be_control = several && (index == 2 || index == 2 * self.links.count());
        self.links.vhost().is_none() || may_be_control
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = &self.active else { return Ok(()) };
        if index == active.control_index {
            return self.control();
        }
        if index % 2 == 0 { self.receive(index / 2) } else { self.transmit(index / 2) }
    }

    fn backends(&self) -> Vec<Backend> {
        if let Some(vhost) = self.links.vhost() {
            return vhost.backends();
        }
        let events = EventSet::IN | EventSet::OUT;
        let backend = |link: &L| Backend { fd: link.as_fd().as_raw_fd(), events };
        let limiters = [self.receive_limiter.backend(), self.transmit_limiter.backend()];
        self.links.all().iter().map(backend).chain(limiters.into_iter().flatten()).collect()
    }

    fn backend_ready(&mut self, index: usize, events: EventSet) -> Result<(), QueueError> {
        if let Some(vhost) = self.links.vhost() {
            let signal = vhost.signal(index);
            self.signalled(signal);
            return Ok(());
        }
        if let Some(limiter) = index.checked_sub(self.links.count()) {
            let is_receive = limiter == 0 && self.receive_limiter.backend().is_some();
            return self.admitted(if is_receive { Self::receive } else { Self::transmit });
        }
        let pair = own_pair(&self.links, &mut self.active, index);
        let blocked = pair.is_some_and(|(pair, _)| pair.transmit.blocked());
        if blocked && events.contains(EventSet::OUT) {
            self.transmit(index)?;
        }
        self.receive(index)
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        let Some(active) = &self.active else { return Ok(Vec::new()) };
        self.links.pause();
        let pairs = active.pairs.positions(self.links.vhost())?;
        Ok(all_positions(pairs, active.control.as_ref(), active.control_index, self.traits()))
    }

    /// Drivers wait for the answer to each command. Those of one pair have none to give, and lose the device
    /// at once.
    fn stand_in(&self) -> Option<Arc<Mutex<dyn VirtioDevice>>> {
        let has_commands = self.links.count() > 1;
        has_commands.then(|| Arc::new(Mutex::new(Gone::new(self.traits()))) as Arc<_>)
    }

    fn resume(&mut self) {
        if let Err(error) = self.links.resume() {
            self.complaints.add(&format_args!("go on after a pause: {error}"));
        }
    }

    fn save(&self) -> DeviceState {
        let pairs = self.active.as_ref().map_or(1, |_| self.links.attached());
        DeviceState::Net { pairs: u16::try_from(pairs).expect("at most MAX_PAIRS") }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let &DeviceState::Net { pairs: count } = state else { return Err(RestoreError::Kind) };
        let Some(Active { pairs, .. }) = &self.active else { return Ok(()) };
        if !(1..=pairs.count()).contains(&count.into()) {
            let found = pairs.count() as u64;
            return Err(RestoreError::Other { what: "queue pairs", saved: count.into(), found });
        }
        self.links.use_pairs(count.into()).map_err(RestoreError::Backend)
    }
}
