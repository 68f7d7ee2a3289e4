//! One request from its chain to its status, and the requests that are in flight.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::request::{HEADER_BYTES, Limits, Request, Status, parse};
use crate::virtio::buffers::{BufferError, Buffers};
use crate::virtio::queue::Chain;

/// Most requests of one device that are in flight.
pub const MOST_IN_FLIGHT: usize = 64;

/// Why a request could not even be looked at, or its driver not be told how it ended.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The chain names memory the guest does not have, or too many pieces of it.
    #[error("request refused: {0}")]
    Buffers(#[from] BufferError),
    /// There is nowhere to say how it ended.
    #[error("request dropped: it has no room for a status")]
    NoStatus,
}

/// A request and the guest's memory it is about.
pub struct Transfer {
    memory: GuestMemoryMmap,
    /// Data the driver sends; what is left of it.
    pub readable: Buffers,
    /// Room for data the driver wants; what is left of it.
    pub writable: Buffers,
    /// What is asked for.
    pub request: Request,
    queue: usize,
    head: u16,
    /// Room for data when the request came, in bytes.
    room: usize,
    /// Where the driver looks how it ended, if it said that.
    status: Option<GuestAddress>,
}

impl Transfer {
    fn new(memory: &GuestMemoryMmap) -> Self {
        Transfer {
            memory: memory.clone(),
            readable: Buffers::new(memory.clone()),
            writable: Buffers::new(memory.clone()),
            request: Request::Flush,
            queue: 0,
            head: 0,
            room: 0,
            status: None,
        }
    }

    /// Takes over the buffers of `chain`, which is from queue number `queue`. If one of them is bad, the
    /// driver can still be told.
    pub fn load(&mut self, queue: usize, chain: Chain<'_>) -> Result<(), TransferError> {
        self.readable.clear();
        self.writable.clear();
        self.queue = queue;
        self.head = chain.head_index();
        self.room = 0;
        self.status = last_byte(chain.clone());
        self.readable.add(chain.clone().readable())?;
        let room = self.writable.add(chain.writable())?.checked_sub(1);
        self.room = room.ok_or(TransferError::NoStatus)?;
        self.writable.truncate(self.room);
        Ok(())
    }

    /// Takes the header off the readable data and checks what it asks for.
    pub fn parse(&mut self, limits: Limits) -> Result<Request, Status> {
        let mut header = [0; HEADER_BYTES];
        if self.readable.copy_out(0, &mut header) < HEADER_BYTES {
            return Err(Status::IoError);
        }
        self.readable.skip(HEADER_BYTES);
        self.request = parse(&header, self.readable.bytes(), self.room, limits)?;
        Ok(self.request)
    }

    /// Tells the driver how it ended. Returns how many bytes were written into the chain.
    pub fn finish(&self, status: Status) -> Result<u32, TransferError> {
        let at = self.status.ok_or(TransferError::NoStatus)?;
        self.memory.write_obj(status.byte(), at).map_err(BufferError::OutOfMemory)?;
        let written = self.room - self.writable.bytes() + 1;
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// The number of its queue, and its first descriptor.
    pub fn chain(&self) -> (usize, u16) {
        (self.queue, self.head)
    }
}

/// Where the status goes: the last byte of the last buffer that has any.
pub fn last_byte(chain: Chain<'_>) -> Option<GuestAddress> {
    let last = chain.writable().filter(|descriptor| descriptor.len() > 0).last()?;
    last.addr().checked_add(u64::from(last.len()) - 1)
}

/// Room for [`MOST_IN_FLIGHT`] requests, each with a number; made when it is first needed.
#[derive(Default)]
pub struct Transfers {
    all: Vec<Transfer>,
    free: Vec<usize>,
}

impl Transfers {
    /// The number of room for another request of the guest with this memory, if not too many are in
    /// flight.
    pub fn take(&mut self, memory: &GuestMemoryMmap) -> Option<usize> {
        if let Some(number) = self.free.pop() {
            return Some(number);
        }
        let number = self.all.len();
        (number < MOST_IN_FLIGHT).then(|| {
            self.all.push(Transfer::new(memory));
            number
        })
    }

    /// The request `number`, which was taken.
    pub fn get(&mut self, number: usize) -> &mut Transfer {
        &mut self.all[number]
    }

    /// Forgets all requests and their room.
    pub fn clear(&mut self) {
        *self = Transfers::default();
    }

    /// Takes back the room of the request `number`, which is over.
    pub fn give_back(&mut self, number: usize) {
        debug_assert!(number < self.all.len() && !self.free.contains(&number));
        self.free.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::memory;

    #[test]
    fn requests_in_flight_are_bounded_and_their_room_is_used_again() {
        let memory = memory();
        let mut transfers = Transfers::default();
        let take = |transfers: &mut Transfers| transfers.take(&memory);
        let numbers: Vec<_> = (0..MOST_IN_FLIGHT).map(|_| take(&mut transfers).unwrap()).collect();
        assert_eq!(take(&mut transfers), None);

        transfers.give_back(numbers[7]);

        assert_eq!(take(&mut transfers), Some(numbers[7]));
        assert_eq!(take(&mut transfers), None);
    }
}
