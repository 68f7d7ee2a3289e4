//! Socket device (virtio 1.2, section 5.10): streams between host descriptors and the guest.
//!
//! The device is the whole multiplexer: no socket of the host's kernel is involved, and no process
//! but this one. A stream joins a pair of ports to descriptors handed in through [`Host`], or to a
//! client of the device's unix socket, and its data is read from them straight into the guest's
//! buffers.

mod connection;
mod credit;
mod door;
mod host;
mod muxer;
mod output;
mod packet;
#[cfg(test)]
mod tests;

use std::io;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::muxer::Muxer;
use self::packet::Buffers;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::state::{DeviceState, Position, RestoreError};
use super::{ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config};
use crate::listener::Listener;

pub use self::host::{Host, HostStream};

/// Position of the queues (virtio 1.2, section 5.10.2).
const EVENT_QUEUE: usize = 2;

/// Rounds of packets in and refusals out before the other devices of the event loop have their turn: a
/// guest can refill both queues while they are served.
const ROUNDS: usize = 4;

/// The event that tells the driver that all its connections are gone (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

// A Linux guest fills the whole receive queue with buffers of 4 KiB, out of its own memory.
const TRAITS: DeviceTraits =
    DeviceTraits { device_type: VIRTIO_ID_VSOCK, features: 0, queue_sizes: &[128, 128, 16] };

struct Queues {
    receive: VirtQueue,
    transmit: VirtQueue,
    event: VirtQueue,
}

/// A socket device for one guest.
pub struct Vsock {
    cid: u32,
    muxer: Muxer,
    queues: Option<Queues>,
    /// The driver has yet to hear that a reset ended its connections.
    owes_reset_event: bool,
    /// No packet moves until the driver has heard that and given the event's buffer back, which a driver
    /// that goes on does once it has ended them: it would end those that came meanwhile as well.
    waits_for_driver: bool,
    /// Buffers of the event queue that were taken so that the driver's next one is noticed.
    held_events: usize,
}

impl Vsock {
    /// Creates an idle device for the guest with context identifier `cid` (3 or more), and the handle
    /// through which streams are opened.
    pub fn new(cid: u32) -> io::Result<(Vsock, Host)> {
        Vsock::build(cid, None)
    }

    /// Like [`Vsock::new`], for a guest that other processes reach through `socket`: a client says
    /// `CONNECT <port>\n` and reads `OK <host port>\n` once the guest has accepted. A connection of
    /// the guest to port P of the host goes to the unix socket `<path>_<P>`, unless somebody
    /// listens on P through the handle.
    pub fn with_socket(cid: u32, socket: Listener) -> io::Result<(Vsock, Host)> {
        Vsock::build(cid, Some(socket))
    }

    fn build(cid: u32, socket: Option<Listener>) -> io::Result<(Vsock, Host)> {
        let (muxer, host) = Muxer::new(cid, socket)?;
        let vsock = Vsock {
            cid,
            muxer,
            queues: None,
            owes_reset_event: false,
            waits_for_driver: false,
            held_events: 0,
        };
        Ok((vsock, host))
    }

    /// Moves packets both ways until one side cannot go on.
    fn exchange(&mut self) -> Result<(), QueueError> {
        let Some(queues) = self.queues.as_mut().filter(|_| !self.waits_for_driver) else {
            return Ok(());
        };
        let muxer = &mut self.muxer;
        for _ in 0..ROUNDS {
            queues.transmit.drain(|chain, memory| {
                if !muxer.can_receive() {
                    return Verdict::Keep;
                }
                muxer.receive(Buffers::readable(chain, memory));
                Verdict::Used(0)
            })?;
            let was_held_up = !muxer.can_receive();
            queues.receive.drain(|chain, memory| fill(muxer, Buffers::writable(chain, memory)))?;
            // Refusals that found room let the guest's next packets in.
            if !was_held_up || !muxer.can_receive() {
                return Ok(());
            }
        }
        queues.transmit.kick();
        Ok(())
    }

    fn report_reset(&mut self) -> Result<(), QueueError> {
        let Some(queues) = &mut self.queues else { return Ok(()) };
        let owed = &mut self.owes_reset_event;
        if !self.waits_for_driver {
            return queues.event.drain(|chain, memory| match std::mem::take(owed) {
                true => Verdict::Used(write_reset(Buffers::writable(chain, memory))),
                false => Verdict::Keep,
            });
        }
        let (mut told, mut heard) = (None, false);
        let held = &mut self.held_events;
        let most_held = queues.event.rings().map_or(0, |rings| rings.size.into());
        queues.event.drain(|chain, memory| {
            // A driver that offers a buffer twice could do so for ever.
            if *held >= most_held {
                return Verdict::Keep;
            }
            if std::mem::take(owed) {
                let head = chain.head_index();
                told = Some((head, write_reset(Buffers::writable(chain, memory))));
            } else {
                heard |= told.is_none();
                *held += 1;
            }
            Verdict::Hold
        })?;
        if let Some(told) = told {
            queues.event.complete(&[told])?;
            queues.event.notify()?;
        }
        self.waits_for_driver = !heard;
        Ok(())
    }
}

/// Writes the event into a buffer of the driver; how many bytes.
fn write_reset(mut buffer: Buffers<'_>) -> u32 {
    match buffer.next_slice(TRANSPORT_RESET.len()) {
        Some(slice) if slice.len() == TRANSPORT_RESET.len() => {
            slice.copy_from(&TRANSPORT_RESET);
            4
        }
        _ => 0,
    }
}

fn fill(muxer: &mut Muxer, buffers: Buffers<'_>) -> Verdict {
    let Some((header, data)) = buffers.split_header() else {
        muxer.complain(&"a receive buffer has no room for data");
        return Verdict::Used(0);
    };
    match muxer.send(header, &data) {
        Some(bytes) => Verdict::Used(bytes),
        None => Verdict::Keep,
    }
}

impl VirtioDevice for Vsock {
    fn traits(&self) -> DeviceTraits {
        TRAITS
    }

    /// The one field is the guest's context identifier (virtio 1.2, section 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [receive, transmit, event] = activation.into_queues()?;
        self.queues = Some(Queues { receive, transmit, event });
        Ok(())
    }

    fn reset(&mut self) {
        if self.queues.take().is_some() && self.muxer.forget_guest() {
            self.owes_reset_event = true;
        }
        self.waits_for_driver = false;
        self.held_events = 0;
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        match index {
            EVENT_QUEUE => {
                self.report_reset()?;
                self.exchange()
            }
            _ => self.exchange(),
        }
    }

    fn backends(&self) -> Vec<Backend> {
        vec![Backend { fd: self.muxer.fd(), events: EventSet::IN }]
    }

    fn backend_ready(&mut self, _index: usize, _events: EventSet) -> Result<(), QueueError> {
        self.muxer.poll();
        self.exchange()
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        let Some(Queues { receive, transmit, event }) = &self.queues else {
            return Ok(Vec::new());
        };
        let event = event.position(self.held_events);
        Ok(vec![receive.position(0), transmit.position(0), event])
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock {
            had_streams: self.owes_reset_event
                || self.waits_for_driver
                || self.muxer.is_known_to_guest(),
            next_source_port: self.muxer.next_source_port(),
        }
    }

    /// The guest's streams are gone, as after a reset; its listening sockets are its own.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let &DeviceState::Vsock { had_streams, next_source_port } = state else {
            return Err(RestoreError::Kind);
        };
        self.owes_reset_event = had_streams;
        self.waits_for_driver = had_streams;
        self.muxer.connect_from(next_source_port);
        Ok(())
    }
}
