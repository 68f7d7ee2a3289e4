//! Memory device (virtio 1.2, section 5.15): memory that is plugged into a running guest, and out of
//! it again, in blocks of 2 MiB.
//!
//! The host says how much it wants plugged; the driver chooses the blocks. Only those that it plugs are
//! memory, and only until it unplugs them.

mod blocks;
mod host;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

pub use self::blocks::BLOCK_BYTES;
use self::blocks::Blocks;
pub use self::host::{Host, RequestError};
use super::buffers::Buffers;
use super::complaints::Complaints;
use super::config_space::ConfigSpace;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::state::{DeviceState, Position, RestoreError};
use super::{ActivateError, Activation, DeviceTraits, VirtioDevice, copy_config};
use crate::interrupt::Interrupt;

/// A request: type, address and number of blocks, each after its padding (virtio 1.2, section
/// 5.15.6.1).
const REQUEST_BYTES: usize = 24;
const ADDRESS: usize = 8;
const BLOCK_COUNT: usize = 16;

/// Request types.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// An answer: type and, after its padding, the state that was asked for.
const ANSWER_BYTES: usize = 10;
const ANSWER_STATE: usize = 8;

/// The driver must leave unplugged memory alone, which it may read otherwise (virtio 1.2, section 5.15.3).
const UNPLUGGED_INACCESSIBLE: u32 = 1;

const TRAITS: DeviceTraits = DeviceTraits {
    device_type: VIRTIO_ID_MEM,
    features: 1 << UNPLUGGED_INACCESSIBLE,
    queue_sizes: &[16],
};

/// What the device says to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Done; for a question about blocks, their state.
    Done(State),
    /// More than the host wants plugged.
    Denied,
    /// Not now.
    Busy,
    /// The request makes no sense.
    Wrong,
}

/// State of some blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Plugged,
    Unplugged,
    Mixed,
}

/// What the memory of a guest is plugged into. Ranges are guest addresses of whole blocks; what fails has
/// changed nothing.
pub trait Backing: Send {
    /// Makes blocks that are not plugged memory, which the guest and its devices can reach.
    fn plug(&mut self, range: &Range<u64>) -> io::Result<()>;

    /// Gives blocks back to the host, of which some may not be plugged. Whoever reads or writes there
    /// afterwards must not cost the host the memory again.
    fn unplug(&mut self, range: &Range<u64>) -> io::Result<()>;
}

/// Memory that can be plugged and unplugged.
pub struct Mem {
    blocks: Blocks,
    backing: Box<dyn Backing>,
    requested_bytes: u64,
    shown: ConfigSpace,
    complaints: Complaints,
    active: Option<Active>,
}

struct Active {
    requests: VirtQueue,
    buffers: Buffers,
    interrupt: Arc<dyn Interrupt>,
}

impl Answer {
    fn bytes(self) -> [u8; ANSWER_BYTES] {
        let (answer, state): (u16, u16) = match self {
            Answer::Done(State::Plugged) => (0, 0),
            Answer::Done(State::Unplugged) => (0, 1),
            Answer::Done(State::Mixed) => (0, 2),
            Answer::Denied => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Wrong => (3, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..2].copy_from_slice(&answer.to_le_bytes());
        bytes[ANSWER_STATE..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

impl Mem {
    /// An idle device for the guest memory at `addresses`, both multiples of [`BLOCK_BYTES`], of which
    /// nothing is plugged.
    pub fn new(addresses: Range<u64>, backing: Box<dyn Backing>) -> Self {
        Mem {
            blocks: Blocks::new(addresses.start, addresses.end - addresses.start),
            backing,
            requested_bytes: 0,
            shown: ConfigSpace::default(),
            complaints: Complaints::of("mem"),
            active: None,
        }
    }

    fn request(&mut self, bytes: u64) {
        self.requested_bytes = bytes;
        self.show_config();
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    /// The whole region is usable at any time; node 0 has all memory (virtio 1.2, section 5.15.4).
    fn config(&self) -> [[u8; 8]; 7] {
        let node = 0;
        let fields = [
            BLOCK_BYTES,
            node,
            self.blocks.start(),
            self.blocks.bytes(),
            self.blocks.bytes(),
            self.blocks.plugged_bytes(),
            self.requested_bytes,
        ];
        fields.map(u64::to_le_bytes)
    }

    fn show_config(&self) {
        self.shown.show(self.config().as_flattened());
    }

    /// Does what a request asks for.
    fn serve(&mut self, request: &[u8; REQUEST_BYTES]) -> Answer {
        let half = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let address = request[ADDRESS..BLOCK_COUNT].try_into().expect("an address has 8 bytes");
        let (kind, address) = (half(0), u64::from_le_bytes(address));
        if kind == UNPLUG_ALL {
            return self.unplug_all();
        }
        let Some(blocks) = self.blocks.find(address, half(BLOCK_COUNT)) else {
            return Answer::Wrong;
        };
        let bytes = u64::from(half(BLOCK_COUNT)) * BLOCK_BYTES;
        match (kind, self.blocks.state(&blocks)) {
            (STATE, state) => Answer::Done(state),
            (PLUG, State::Unplugged) => {
                if self.blocks.plugged_bytes() + bytes > self.requested_bytes {
                    return Answer::Denied;
                }
                let plugged = self.backing.plug(&(address..address + bytes));
                self.change(plugged, |all| all.set(&blocks, true))
            }
            (UNPLUG, State::Plugged) => {
                let unplugged = self.backing.unplug(&(address..address + bytes));
                self.change(unplugged, |all| all.set(&blocks, false))
            }
            _ => Answer::Wrong,
        }
    }

    fn unplug_all(&mut self) -> Answer {
        if self.blocks.plugged_bytes() == 0 {
            return Answer::Done(State::Plugged);
        }
        let (start, bytes) = (self.blocks.start(), self.blocks.bytes());
        let unplugged = self.backing.unplug(&(start..start + bytes));
        self.change(unplugged, Blocks::clear)
    }

    /// Notes what became of blocks if the backing did it.
    fn change(&mut self, done: io::Result<()>, note: impl FnOnce(&mut Blocks)) -> Answer {
        if let Err(error) = done {
            self.complaints.add(&error);
            return Answer::Busy;
        }
        note(&mut self.blocks);
        self.show_config();
        Answer::Done(State::Plugged)
    }
}

impl VirtioDevice for Mem {
    fn traits(&self) -> DeviceTraits {
        TRAITS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(self.config().as_flattened(), offset, data);
    }

    fn show_config_in(&mut self, space: ConfigSpace) {
        self.shown = space;
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        let [requests] = activation.into_queues()?;
        let buffers = Buffers::new(requests.memory().clone());
        self.active = Some(Active { requests, buffers, interrupt });
        Ok(())
    }

    /// Forgets the driver, but no block: what is plugged may be in use (section 5.15.5.2).
    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_ready(&mut self, _index: usize) -> Result<(), QueueError> {
        let Some(mut active) = self.active.take() else { return Ok(()) };
        let Active { requests, buffers, .. } = &mut active;
        let outcome = requests.drain(|chain, _| {
            buffers.clear();
            let mut request = [0; REQUEST_BYTES];
            let asked = buffers.add(chain.clone().readable());
            let whole = buffers.copy_out(0, &mut request) == request.len();

            buffers.clear();
            let room = asked.and_then(|_| buffers.add(chain.writable()));
            match room {
                // Nothing happens that the driver would not hear of.
                Ok(room) if room >= ANSWER_BYTES => {}
                Ok(_) => return Verdict::Used(0),
                Err(error) => {
                    self.complaints.add(&error);
                    return Verdict::Used(0);
                }
            }
            let answer = if whole { self.serve(&request) } else { Answer::Wrong };
            let written = buffers.copy_in(0, &answer.bytes());
            Verdict::Used(u32::try_from(written).expect("an answer has ten bytes"))
        });
        self.active = Some(active);
        outcome
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        Ok(self.active.iter().map(|active| active.requests.position(0)).collect())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Mem {
            requested_bytes: self.requested_bytes,
            plugged: self.blocks.bits().to_vec(),
        }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Mem { requested_bytes, plugged } = state else {
            return Err(RestoreError::Kind);
        };
        self.requested_bytes = *requested_bytes;
        if self.blocks.set_bits(plugged) {
            self.show_config();
            let mut plugged = self.blocks.plugged();
            return plugged
                .try_for_each(|range| self.backing.plug(&range))
                .map_err(RestoreError::Backend);
        }
        let (saved, found) = (plugged.len() as u64 * 64, self.blocks.bytes() / BLOCK_BYTES);
        Err(RestoreError::Other { what: "the number of blocks, up to", saved, found })
    }
}
