//! Does what requests ask for, whichever queue they came from.

use std::io;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use super::disk::Disk;
use super::request::{ID_BYTES, Limits, MAX_SEGMENTS, Request, SEGMENT_BYTES, Segments, Status};
use super::ring::Ring;
use super::transfer::{Transfer, Transfers};
use crate::virtio::Backend;
use crate::virtio::buffers::Buffers;
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::Chain;

/// A disk and the ways to it.
pub struct Server {
    disk: Disk,
    limits: Limits,
    id: [u8; ID_BYTES],
    ring: Option<Ring>,
    transfers: Transfers,
    complaints: Complaints,
}

/// How far a request got at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// It cannot begin before another one is over.
    Full,
    /// It completes later.
    InFlight {
        /// Data it is about.
        bytes: u64,
    },
    /// It is over.
    Done {
        /// Data it was about.
        bytes: u64,
        /// Bytes that were written into the chain.
        written: u32,
        /// Whether it may have taken so long that others have their turn before the next one.
        was_long: bool,
    },
}

/// A chain that may be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// The number of its queue.
    pub queue: usize,
    /// Its first descriptor.
    pub head: u16,
    /// Bytes that were written into it.
    pub written: u32,
}

/// A request that can be done, with all that it needs beside its buffers.
enum Task {
    Plain(Request),
    Discard(Segments),
    WriteZeroes(Segments),
}

impl Server {
    /// A server of `disk` that complains in the name of `name`.
    pub fn new(
        disk: Disk,
        limits: Limits,
        id: [u8; ID_BYTES],
        ring: Option<Ring>,
        name: String,
    ) -> Self {
        Server {
            disk,
            limits,
            id,
            ring,
            transfers: Transfers::default(),
            complaints: Complaints::of(name),
        }
    }

    /// Begins the request in `chain`, which came through queue number `queue` of the guest with this
    /// memory.
    pub fn start(&mut self, queue: usize, chain: Chain<'_>, memory: &GuestMemoryMmap) -> Started {
        let Some(number) = self.transfers.take(memory) else { return Started::Full };
        let started = self.begin(number, queue, chain);
        if !matches!(started, Started::InFlight { .. }) {
            self.transfers.give_back(number);
        }
        started
    }

    fn begin(&mut self, number: usize, queue: usize, chain: Chain<'_>) -> Started {
        let Server { disk, limits, id, ring, transfers, complaints } = self;
        let transfer = transfers.get(number);
        if let Err(error) = transfer.load(queue, chain) {
            complaints.add(&error);
            let written = transfer.finish(Status::IoError).unwrap_or(0);
            return Started::Done { bytes: 0, written, was_long: false };
        }
        let task = match transfer.parse(*limits).and_then(|_| Task::of(transfer, *limits)) {
            Ok(task) => task,
            Err(status) => {
                let written = done(transfer, status, complaints);
                return Started::Done { bytes: 0, written, was_long: false };
            }
        };
        let bytes = task.bytes(transfer);
        if let Some(ring) = ring {
            // SAFETY: the number is not free before the transfer has completed, so that nobody loads
            // another request into it, and `reset` waits before it drops transfers; the disk lives as
            // long as this server, whose end is a reset.
            if unsafe { ring.push(disk, transfer, number) } {
                return Started::InFlight { bytes };
            }
        }
        let outcome = task.perform(disk, id, transfer);
        let status = status(transfer.request, outcome, complaints);
        let written = done(transfer, status, complaints);
        Started::Done { bytes, written, was_long: task.may_be_long(disk) }
    }

    /// Makes all that changes the disk last before the driver is told, or no longer.
    pub fn set_write_through(&mut self, write_through: bool) {
        self.disk.set_write_through(write_through);
    }

    /// How much is in flight.
    pub fn in_flight(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::in_flight)
    }

    /// Hands what the ring took to the kernel.
    pub fn submit(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.submit();
        }
    }

    /// Gives up the ring, for another disk; nothing may be in flight.
    pub fn take_ring(&mut self) -> Option<Ring> {
        self.ring.take_if(|ring| ring.in_flight() == 0)
    }

    /// A chain whose request the ring has completed.
    pub fn completed(&mut self) -> Option<Completed> {
        let Server { disk, ring, transfers, complaints, .. } = self;
        let (number, result) = ring.as_mut()?.completed()?;
        let transfer = transfers.get(number);
        let outcome = conclude(disk, transfer, result);
        let status = status(transfer.request, outcome, complaints);
        let written = done(transfer, status, complaints);
        let (queue, head) = transfer.chain();
        transfers.give_back(number);
        Some(Completed { queue, head, written })
    }

    /// Waits until something that is in flight may have completed; `false` if nothing is, or if nothing has by
    /// `deadline`.
    pub fn wait(&mut self, deadline: Option<Instant>) -> bool {
        self.ring.as_mut().is_some_and(|ring| ring.wait(deadline))
    }

    /// Waits for all that is in flight, and forgets it.
    pub fn reset(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.quiesce();
        }
        self.transfers.clear();
    }

    /// What is ready when transfers have completed.
    pub fn backend(&self) -> Option<Backend> {
        self.ring.as_ref().map(Ring::backend)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.reset();
    }
}

impl Task {
    /// What `transfer` asks for; takes out of its buffers, once, what has to be checked.
    fn of(transfer: &Transfer, limits: Limits) -> Result<Self, Status> {
        let mut data = [0; MAX_SEGMENTS * SEGMENT_BYTES];
        match transfer.request {
            Request::Discard { segments } => {
                let data = segment_data(&mut data, segments, &transfer.readable);
                Ok(Task::Discard(Segments::to_discard(data, limits)?))
            }
            Request::WriteZeroes { segments } => {
                let data = segment_data(&mut data, segments, &transfer.readable);
                Ok(Task::WriteZeroes(Segments::to_zero(data, limits)?))
            }
            request => Ok(Task::Plain(request)),
        }
    }

    /// Data it is about, in bytes. Zeros count as the writes they take the place of; what is
    /// discarded moves nowhere.
    fn bytes(&self, transfer: &Transfer) -> u64 {
        match self {
            Task::Plain(Request::Read { .. }) => transfer.writable.bytes() as u64,
            Task::Plain(Request::Write { .. }) => transfer.readable.bytes() as u64,
            Task::Plain(_) | Task::Discard(_) => 0,
            Task::WriteZeroes(segments) => segments.bytes(),
        }
    }

    /// Whether it may last longer than its data takes to be copied.
    fn may_be_long(&self, disk: &Disk) -> bool {
        match self {
            Task::Plain(Request::Read { .. } | Request::Id) => false,
            Task::Plain(Request::Write { .. }) => disk.is_write_through(),
            _ => true,
        }
    }

    /// Does it; uses up as much of the writable buffers as it filled.
    fn perform(&self, disk: &Disk, id: &[u8; ID_BYTES], transfer: &mut Transfer) -> io::Result<()> {
        let Transfer { readable, writable, .. } = transfer;
        match self {
            Task::Plain(Request::Read { offset }) => disk.read(*offset, writable),
            Task::Plain(Request::Write { offset }) => disk.write(*offset, readable),
            Task::Plain(Request::Id) => {
                writable.copy_in(0, id);
                writable.skip(ID_BYTES);
                Ok(())
            }
            Task::Plain(_) => disk.flush(),
            Task::Discard(segments) => segments.iter().try_for_each(|range| disk.discard(range)),
            Task::WriteZeroes(segments) => {
                segments.iter().try_for_each(|range| disk.write_zeroes(range))
            }
        }
    }
}

/// Does what the ring left of a request that ended with `result`: the rest of one that fell short, or all of
/// one that was interrupted.
fn conclude(disk: &Disk, transfer: &mut Transfer, result: i32) -> io::Result<()> {
    let moved = usize::try_from(result);
    if moved.is_err() {
        let error = io::Error::from_raw_os_error(-result);
        let again = [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock];
        if !again.contains(&error.kind()) {
            return Err(error);
        }
    }
    let Transfer { readable, writable, .. } = transfer;
    match (transfer.request, moved) {
        (Request::Read { offset }, moved) => {
            let moved = moved.unwrap_or(0);
            writable.skip(moved);
            disk.read(offset + moved as u64, writable)
        }
        (Request::Write { offset }, moved) => {
            let moved = moved.unwrap_or(0);
            readable.skip(moved);
            // What the ring has written lasts if it has to.
            if readable.bytes() == 0 {
                return Ok(());
            }
            disk.write(offset + moved as u64, readable)
        }
        (_, Ok(_)) => Ok(()),
        (_, Err(_)) => disk.flush(),
    }
}

fn status(request: Request, outcome: io::Result<()>, complaints: &mut Complaints) -> Status {
    match outcome {
        Ok(()) => Status::Ok,
        // The driver then stops asking.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
        Err(error) => {
            complaints.add(&format_args!("{request:?} failed: {error}"));
            Status::IoError
        }
    }
}

/// Tells the driver how its request ended. Returns how many bytes were written into the chain.
fn done(transfer: &Transfer, status: Status, complaints: &mut Complaints) -> u32 {
    transfer.finish(status).unwrap_or_else(|error| {
        complaints.add(&error);
        0
    })
}

/// The first `segments` of the readable data, as far as it goes.
fn segment_data<'d>(data: &'d mut [u8], segments: usize, readable: &Buffers) -> &'d [u8] {
    let data = &mut data[..segments * SEGMENT_BYTES];
    let copied = readable.copy_out(0, data);
    &data[..copied]
}
