//! The queue loop and the buffers of chains, without any device.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::interrupt::Interrupt;
use devices::virtio::buffers::Buffers;
use devices::virtio::queue::{Chain, Verdict, VirtQueue};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Seed, bounds};

/// Guest memory, in two regions; the rings may be anywhere in it.
const REGIONS: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 64 << 10), (GuestAddress(128 << 10), 64 << 10)];

/// Most chains that one call may serve: a bound, whatever it is.
const MOST_CHAINS: usize = 256;

/// Most steps of one input.
const MOST_STEPS: usize = 64;

/// Where the queue is. Addresses are taken as the registers would let them through.
#[derive(Serialize, Deserialize)]
struct Place {
    size_log2: u8,
    descriptors: u32,
    available: u32,
    used: u32,
    next_available: u16,
    next_used: u16,
    event_index: bool,
}

#[derive(Serialize, Deserialize)]
enum Step<'a> {
    /// The driver writes.
    Memory { address: u32, bytes: &'a [u8] },
    /// The device serves what there is: each byte, of which the last counts for all that follow, says
    /// what becomes of a chain.
    Drain { verdicts: &'a [u8] },
    /// The device completes this many of the chains it holds, together.
    Complete { count: u8 },
}

#[derive(Default)]
struct Line {
    needs_reset: AtomicBool,
}

impl Interrupt for Line {
    fn used_buffer(&self) {}

    fn config_changed(&self) {}

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Relaxed);
    }
}

/// A device that holds and gives back chains as it is told.
struct Device {
    queue: VirtQueue,
    buffers: Buffers,
    held: VecDeque<(u16, u32)>,
    zeros: File,
}

/// Plays `data`.
pub fn run(data: &[u8]) {
    bounds::begin();
    let Ok((place, mut rest)) = postcard::take_from_bytes::<Place>(data) else { return };
    let memory = GuestMemoryMmap::from_ranges(&REGIONS).expect("a few pages of memory");
    let line = Arc::new(Line::default());
    let queue = place.queue(&memory, line.clone());
    let zeros = File::open("/dev/zero").expect("every host has one");
    let buffers = Buffers::new(memory.clone());
    let mut device = Device { queue, buffers, held: VecDeque::new(), zeros };
    for _ in 0..MOST_STEPS {
        let Ok((step, left)) = postcard::take_from_bytes::<Step<'_>>(rest) else { break };
        rest = left;
        let outcome = match step {
            Step::Memory { address, bytes } => {
                // What is not there cannot be written.
                let _ = memory.write_slice(bytes, GuestAddress(address.into()));
                Ok(())
            }
            Step::Drain { verdicts } => device.drain(verdicts),
            Step::Complete { count } => device.complete(count),
        };
        if outcome.is_err() {
            assert!(line.needs_reset.load(Ordering::Relaxed), "the driver was not told");
            break;
        }
    }
}

impl Place {
    fn queue(&self, memory: &GuestMemoryMmap, line: Arc<Line>) -> VirtQueue {
        let size = 1 << (self.size_log2 % 11);
        let mut queue = Queue::new(1024).expect("a power of two");
        queue.set_size(size);
        // The registers refuse what is not aligned, and what is not in memory.
        queue.set_desc_table_address(Some(self.descriptors & !15), Some(0));
        queue.set_avail_ring_address(Some(self.available & !1), Some(0));
        queue.set_used_ring_address(Some(self.used & !3), Some(0));
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
        queue.set_event_idx(self.event_index);
        queue.set_ready(true);
        let kicks = Arc::from([EventFd::new(EFD_NONBLOCK).expect("an eventfd")]);
        VirtQueue::new(0, queue, memory.clone(), line, kicks, Arc::default())
    }
}

impl Device {
    fn drain(&mut self, verdicts: &[u8]) -> Result<(), devices::virtio::queue::QueueError> {
        let Device { queue, buffers, held, zeros } = self;
        let mut served = 0;
        queue.drain(|chain, _| {
            served += 1;
            assert!(served <= MOST_CHAINS, "one call goes on and on");
            let head = chain.head_index();
            let written = look(buffers, chain, zeros);
            match verdicts.get(served - 1).or(verdicts.last()).unwrap_or(&0) % 4 {
                0 | 1 => Verdict::Used(written),
                2 => {
                    held.push_back((head, written));
                    Verdict::Hold
                }
                _ => Verdict::Keep,
            }
        })
    }

    fn complete(&mut self, count: u8) -> Result<(), devices::virtio::queue::QueueError> {
        let count = self.held.len().min(count.into());
        let chains: Vec<_> = self.held.drain(..count).collect();
        self.queue.complete(&chains)?;
        self.queue.notify()
    }
}

/// Uses the buffers of a chain in every way there is. Returns how many bytes were written.
fn look(buffers: &mut Buffers, chain: Chain<'_>, zeros: &File) -> u32 {
    let mut bytes = [0; 64];
    buffers.clear();
    if let Ok(length) = buffers.add(chain.clone().readable()) {
        assert_eq!(length, buffers.bytes());
        buffers.copy_out(length / 2, &mut bytes);
        buffers.skip(length / 3);
        assert_eq!(buffers.bytes(), length - length / 3);
    }
    buffers.clear();
    let Ok(length) = buffers.add(chain.writable()) else { return 0 };
    buffers.copy_in(length / 2, &bytes);
    buffers.truncate(4096);
    buffers.skip(buffers.bytes() / 3);
    let whole: usize = buffers.iovecs().iter().map(|slice| slice.iov_len).sum();
    assert_eq!(whole, buffers.bytes(), "the pieces are the whole");
    let read = buffers.read_from(zeros.as_fd()).unwrap_or(0);
    u32::try_from(read).expect("no more than 4096")
}

/// A queue in the middle of memory, and one at its end, with chains good and bad.
pub fn seeds() -> Vec<Seed> {
    let place = Place {
        size_log2: 3,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        next_available: 0,
        next_used: 0,
        event_index: false,
    };
    // Address, length, flags and number of the next one.
    let table = |entries: &[(u64, u32, u16, u16)]| -> Vec<u8> {
        let entry = |&(address, length, flags, next): &(u64, u32, u16, u16)| {
            let halves = [flags.to_le_bytes(), next.to_le_bytes()].concat();
            [address.to_le_bytes().to_vec(), length.to_le_bytes().to_vec(), halves].concat()
        };
        entries.iter().flat_map(entry).collect()
    };
    let halves = |values: &[u16]| -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    };
    let good = table(&[(0x8000, 32, 1, 1), (0x9000, 64, 2, 0), (0x2_0000, 128, 2, 0)]);
    let bad = table(&[
        (0x8000, 32, 1, 0),
        (1 << 40, 64, 2, 0),
        (0xff00, u32::MAX, 2, 0),
        (0x1000, 48, 4, 0),
        (u64::MAX - 1, 2, 0, 0),
    ]);
    let ring = halves(&[0, 3, 0, 2, 0]);
    let jumped = halves(&[0, 9, 0, 2, 0]);
    let all = halves(&[0, 7, 0, 1, 2, 3, 4, 0xffff, 7]);
    let write = |address, bytes| Step::Memory { address, bytes };
    let script = |place: &Place, steps: &[Step<'_>]| {
        let mut bytes = postcard::to_stdvec(place).expect("every place can be written");
        for step in steps {
            bytes.extend(postcard::to_stdvec(step).expect("every step can be written"));
        }
        bytes
    };
    let drain = |verdicts| Step::Drain { verdicts };
    let served = [write(0x1000, &good), write(0x2000, &ring), drain(&[0])];
    let held = [
        write(0x1000, &good),
        write(0x2000, &ring),
        drain(&[2, 2, 3]),
        Step::Complete { count: 2 },
        drain(&[0]),
    ];
    let broken = [write(0x1000, &bad), write(0x2000, &all), drain(&[0])];
    let jump = [write(0x1000, &good), write(0x2000, &jumped), drain(&[0])];
    let edge = Place { used: 0xfff0, event_index: true, next_used: 0xffff, ..place };
    vec![
        ("served", script(&place, &served)),
        ("held", script(&Place { event_index: true, ..place }, &held)),
        ("broken", script(&place, &broken)),
        ("jump", script(&place, &jump)),
        ("rings_at_the_edge", script(&edge, &served)),
    ]
}
