//! The one loop in which every device takes chains from the guest and gives them back.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::activity::Activity;
use super::state::Position;
use crate::interrupt::Interrupt;

/// Chains served in one go. A driver can offer chains as fast as they are served, so this is what
/// gives the other devices of the same event loop their turn.
const BUDGET: u32 = 256;

/// Layout of both rings: flags and index, then the entries (virtio 1.2, sections 2.7.6, 2.7.8).
const RING_HEADER_BYTES: u64 = 4;
const AVAILABLE_ENTRY_BYTES: u64 = 2;
const USED_ENTRY_BYTES: u64 = 8;

/// A descriptor chain in guest memory: the buffers of one request.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The driver broke the queue, or the queue lies outside guest memory.
#[derive(Debug, thiserror::Error)]
#[error("queue {index} is unusable")]
pub struct QueueError {
    index: u16,
    #[source]
    source: virtio_queue::Error,
}

/// What to do with a chain after the device looked at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Give the chain back; the device wrote this many bytes into it.
    Used(u32),
    /// The device gives the chain back later, with [`VirtQueue::complete`].
    Hold,
    /// Put the chain back unread and stop: the host side cannot go on now.
    Keep,
}

/// Where the driver placed a queue, for somebody else to serve it (virtio 1.2, section 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

/// A queue together with what is needed to serve it: the memory it lives in, the interrupt, and
/// the eventfd that makes the event loop look at it.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
    kicks: Arc<[EventFd]>,
    activity: Arc<Activity>,
    /// Where the used ring ended when the driver was last told, or was found not to care.
    notified: u16,
}

impl VirtQueue {
    /// Wraps queue number `index` of a device. `kicks` holds the eventfds of all its queues, and
    /// `activity` counts their chains.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: GuestMemoryMmap,
        interrupt: Arc<dyn Interrupt>,
        kicks: Arc<[EventFd]>,
        activity: Arc<Activity>,
    ) -> Self {
        assert!(usize::from(index) < kicks.len(), "every queue has its kick eventfd");
        let notified = queue.next_used();
        VirtQueue { index, queue, memory, interrupt, kicks, activity, notified }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Where the driver placed the queue, in guest memory; `None` if it did not set it up.
    pub fn rings(&self) -> Option<Rings> {
        self.queue.ready().then(|| Rings {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        })
    }

    /// Where the device stands, if the last `held` chains it took count as not taken; they must be
    /// the last ones, and none of them may have been given back.
    pub fn position(&self, held: usize) -> Position {
        let held = u16::try_from(held).expect("no more chains than the queue has descriptors");
        Position {
            next_available: self.queue.next_avail().wrapping_sub(held),
            next_used: self.queue.next_used(),
        }
    }

    /// Where the device stands if somebody else served the queue, who took its chains up to
    /// `next_available`.
    pub fn position_of_other(&self, next_available: u16) -> Result<Position, QueueError> {
        if !self.queue.ready() {
            return Ok(Position::default());
        }
        let index = GuestAddress(self.queue.used_ring() + 2);
        let next_used = self.memory.load(index, Ordering::Acquire).map(u16::from_le);
        let next_used = self.checked(next_used.map_err(virtio_queue::Error::GuestMemory))?;
        Ok(Position { next_available, next_used })
    }

    /// What the driver's kicks signal.
    pub fn kick_event(&self) -> &EventFd {
        &self.kicks[usize::from(self.index)]
    }

    /// Offers every available chain to `serve`, in order, and interrupts the driver once if it asked.
    ///
    /// Kicks are switched off while the loop runs. After they are back on the ring is looked at
    /// again, so a chain that arrived in between is not lost (virtio 1.2, section 2.7.10). A driver
    /// that never stops is served in instalments: the rest comes with another `queue_ready`.
    pub fn drain(
        &mut self,
        mut serve: impl FnMut(Chain<'_>, &GuestMemoryMmap) -> Verdict,
    ) -> Result<(), QueueError> {
        // A driver need not set up every queue; without rings there is nothing to serve.
        if !self.queue.ready() {
            return Ok(());
        }
        let outcome = self.drain_with(&mut serve);
        self.checked(outcome)
    }

    /// Gives back chains that a `Hold` left to the device: for each, its first descriptor and the
    /// number of bytes written into it. The driver sees either none or all of them, and is told with
    /// the next [`VirtQueue::notify`].
    pub fn complete(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let outcome = self.complete_all(chains);
        self.activity.add_chains(chains.len() as u64);
        self.checked(outcome)
    }

    /// Interrupts the driver if it asked for it; to be called after some chains were completed.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let outcome = self.notify_driver();
        self.checked(outcome)
    }

    /// Has the driver kick only once it has offered `count` more chains, or half of what the queue holds,
    /// until the next [`VirtQueue::drain`] (virtio 1.2, section 2.7.10); the caller looks at the queue by
    /// itself meanwhile. Returns whether the driver understands that.
    pub fn defer_kicks(&mut self, count: u16) -> Result<bool, QueueError> {
        if !self.queue.ready() || !self.queue.event_idx_enabled() {
            return Ok(false);
        }
        let ahead = count.min(self.queue.size() / 2).saturating_sub(1);
        let entry = self.queue.next_avail().wrapping_add(ahead);
        let offset = RING_HEADER_BYTES + USED_ENTRY_BYTES * u64::from(self.queue.size());
        let event = GuestAddress(self.queue.used_ring() + offset);
        let stored = self.memory.store(entry.to_le(), event, Ordering::Release);
        self.checked(stored.map_err(virtio_queue::Error::GuestMemory))?;
        Ok(true)
    }

    /// Makes the event loop call `queue_ready` for this queue once more, after the other devices.
    pub fn kick(&self) {
        // The only failure is a counter at its maximum, and then the kick is pending anyway.
        let _ = self.kick_event().write(1);
    }

    fn drain_with(
        &mut self,
        serve: &mut dyn FnMut(Chain<'_>, &GuestMemoryMmap) -> Verdict,
    ) -> Result<(), virtio_queue::Error> {
        let mut left = BUDGET;
        let mut used = 0;
        let VirtQueue { queue, memory, .. } = self;
        // The iterator would take a ring it cannot read for an empty one, and log a line each time.
        let available = GuestAddress(queue.avail_ring());
        let bytes = RING_HEADER_BYTES + AVAILABLE_ENTRY_BYTES * u64::from(queue.size());
        if !memory.check_range(available, usize::try_from(bytes).expect("at most 128 KiB")) {
            let error = GuestMemoryError::InvalidGuestAddress(available);
            return Err(virtio_queue::Error::GuestMemory(error));
        }
        let finished = 'ring: loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.iter(&*memory)?.next() {
                let head = chain.head_index();
                // `add_used` would find out, too, but logs a line each time.
                if head >= queue.size() {
                    return Err(virtio_queue::Error::InvalidDescriptorIndex);
                }
                match serve(chain, memory) {
                    Verdict::Used(written) => {
                        queue.add_used(memory, head, written)?;
                        used += 1;
                    }
                    Verdict::Hold => {}
                    Verdict::Keep => {
                        queue.go_to_previous_position();
                        break 'ring true;
                    }
                }
                left -= 1;
                if left == 0 {
                    break 'ring false;
                }
            }
            if !queue.enable_notification(memory)? {
                break true;
            }
            left -= 1;
            if left == 0 {
                break false;
            }
        };
        if !finished {
            self.kick();
        }
        // Chains that were only held are notified of when they are complete.
        if used == 0 {
            return Ok(());
        }
        self.activity.add_chains(used);
        self.notify_driver()
    }

    /// `Queue::add_used` shows each entry to the driver at once. So the entries before the last are
    /// written behind its back.
    fn complete_all(&mut self, chains: &[(u16, u32)]) -> Result<(), virtio_queue::Error> {
        let VirtQueue { queue, memory, .. } = self;
        let Some((&(last, written), others)) = chains.split_last() else { return Ok(()) };
        for &(head, written) in others {
            if head >= queue.size() {
                return Err(virtio_queue::Error::InvalidDescriptorIndex);
            }
            let entry = u64::from(queue.next_used() % queue.size()) * USED_ENTRY_BYTES;
            let address = GuestAddress(queue.used_ring() + RING_HEADER_BYTES + entry);
            memory
                .write_obj([u32::from(head).to_le(), written.to_le()], address)
                .map_err(virtio_queue::Error::GuestMemory)?;
            queue.set_next_used(queue.next_used().wrapping_add(1));
        }
        queue.add_used(memory, last, written)
    }

    /// Interrupts if chains were given back since the last call, and the driver wants to know of
    /// one of them (virtio 1.2, section 2.7.7.2). `Queue::needs_notification` cannot tell: it does
    /// not know of [`VirtQueue::complete`], nor of the flag of drivers without event indices.
    fn notify_driver(&mut self) -> Result<(), virtio_queue::Error> {
        let new = self.queue.next_used();
        let old = mem::replace(&mut self.notified, new);
        let added = new.wrapping_sub(old);
        if added == 0 {
            return Ok(());
        }
        // The driver must see the used ring move before it is looked at whether it is waiting.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let event = RING_HEADER_BYTES + u64::from(self.queue.size()) * AVAILABLE_ENTRY_BYTES;
            new.wrapping_sub(self.available(event)?).wrapping_sub(1) < added
        } else {
            u32::from(self.available(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// The field at `offset` of the available ring.
    fn available(&self, offset: u64) -> Result<u16, virtio_queue::Error> {
        self.memory
            .load(GuestAddress(self.queue.avail_ring() + offset), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(virtio_queue::Error::GuestMemory)
    }

    /// Every failure of a queue ends here, so that the driver is always told.
    fn checked<T>(&self, outcome: Result<T, virtio_queue::Error>) -> Result<T, QueueError> {
        outcome.map_err(|source| {
            self.interrupt.needs_reset();
            QueueError { index: self.index, source }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, MEMORY_BYTES, memory};

    fn only_queue(driver: &Driver<'_>) -> VirtQueue {
        let [queue] = driver.activation().into_queues().unwrap();
        queue
    }

    #[test]
    fn many_chains_cause_one_interrupt() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);
        (0..3).for_each(|_| _ = driver.offer(0, &[], &[1]));

        queue.drain(|_, _| Verdict::Used(1)).unwrap();

        assert_eq!(driver.used().len(), 3);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn an_empty_ring_causes_no_interrupt() {
        let memory = memory();
        let driver = Driver::new(&memory);

        only_queue(&driver).drain(|_, _| Verdict::Used(0)).unwrap();

        assert_eq!(driver.interrupts(), 0);
    }

    #[test]
    fn a_ring_whose_end_is_not_in_memory_breaks_the_queue() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);
        let last = u32::try_from(MEMORY_BYTES).unwrap() - 4;
        queue.queue.set_avail_ring_address(Some(last), Some(0));

        assert!(queue.drain(|_, _| Verdict::Used(0)).is_err());
    }

    #[test]
    fn a_kept_chain_is_offered_again() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);
        driver.offer(0, &[], &[1]);

        queue.drain(|_, _| Verdict::Keep).unwrap();
        assert_eq!(driver.used(), []);
        queue.drain(|_, _| Verdict::Used(1)).unwrap();

        assert_eq!(driver.used(), [(0, 1)]);
    }

    #[test]
    fn a_held_chain_comes_back_when_completed() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);
        driver.offer(0, &[], &[1]);

        queue.drain(|_, _| Verdict::Hold).unwrap();
        assert_eq!(driver.used(), []);
        queue.complete(&[(0, 1)]).unwrap();
        queue.notify().unwrap();

        assert_eq!(driver.used(), [(0, 1)]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn chains_completed_together_come_back_in_order() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);
        (0..3).for_each(|_| _ = driver.offer(0, &[], &[8]));

        queue.drain(|_, _| Verdict::Hold).unwrap();
        queue.complete(&[(0, 8), (1, 8), (2, 4)]).unwrap();
        queue.notify().unwrap();

        assert_eq!(driver.used(), [(0, 8), (1, 8), (2, 4)]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn chains_are_counted_when_they_are_given_back() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);
        (0..3).for_each(|_| _ = driver.offer(0, &[], &[8]));
        let mut verdicts = [Verdict::Used(0), Verdict::Hold, Verdict::Keep].into_iter();

        queue.drain(|_, _| verdicts.next().unwrap()).unwrap();
        assert_eq!(driver.activity().chains, 1);
        queue.complete(&[(1, 8)]).unwrap();

        assert_eq!(driver.activity().chains, 2);
    }

    #[test]
    fn completing_a_head_outside_the_table_breaks_the_queue() {
        let memory = memory();
        let driver = Driver::new(&memory);

        only_queue(&driver).complete(&[(4711, 0), (0, 0)]).unwrap_err();

        assert!(driver.told_to_reset());
    }

    #[test]
    fn a_driver_that_wants_no_interrupt_gets_none() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);

        driver.set_available_flags(0, VRING_AVAIL_F_NO_INTERRUPT);
        driver.offer(0, &[], &[1]);
        queue.drain(|_, _| Verdict::Used(1)).unwrap();

        assert_eq!(driver.interrupts(), 0);
    }

    #[test]
    fn a_driver_is_interrupted_at_the_entry_it_named() {
        let memory = memory();
        let driver = Driver::with_event_index(&memory);
        let mut queue = only_queue(&driver);
        driver.interrupt_at(0, 2);

        for (chains, interrupts) in [(1, 0), (2, 0), (3, 1), (4, 1)] {
            driver.offer(0, &[], &[1]);
            queue.drain(|_, _| Verdict::Used(1)).unwrap();
            assert_eq!((driver.used().len(), driver.interrupts()), (chains, interrupts));
        }
    }

    #[test]
    fn kicks_are_deferred_until_so_many_chains_are_there_or_half_the_queue() {
        let memory = memory();
        let driver = Driver::with_event_index(&memory);
        let mut queue = only_queue(&driver);
        let half = queue.queue.size() / 2;
        driver.offer(0, &[], &[1]);
        queue.drain(|_, _| Verdict::Used(1)).unwrap();
        assert_eq!(driver.kick_entry(0), 1);

        assert!(queue.defer_kicks(4).unwrap());
        assert_eq!(driver.kick_entry(0), 4);
        assert!(queue.defer_kicks(u16::MAX).unwrap());
        assert_eq!(driver.kick_entry(0), half);

        driver.offer(0, &[], &[1]);
        queue.drain(|_, _| Verdict::Used(1)).unwrap();
        assert_eq!(driver.kick_entry(0), 2);
    }

    #[test]
    fn a_driver_without_event_indices_kicks_each_time() {
        let memory = memory();
        let driver = Driver::new(&memory);

        assert!(!only_queue(&driver).defer_kicks(4).unwrap());
    }

    #[test]
    fn a_batch_that_passes_the_entry_named_interrupts() {
        let memory = memory();
        let driver = Driver::with_event_index(&memory);
        let mut queue = only_queue(&driver);
        driver.interrupt_at(0, 1);
        (0..4).for_each(|_| _ = driver.offer(0, &[], &[8]));

        queue.drain(|_, _| Verdict::Hold).unwrap();
        queue.complete(&[(0, 8), (1, 8), (2, 8), (3, 8)]).unwrap();
        queue.notify().unwrap();

        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn an_endless_driver_is_served_in_instalments() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut queue = only_queue(&driver);
        let mut served = 0;
        driver.offer(0, &[], &[1]);

        queue
            .drain(|_, _| {
                served += 1;
                driver.offer(0, &[], &[1]);
                Verdict::Used(0)
            })
            .unwrap();

        assert_eq!(served, BUDGET);
        assert!(driver.kicked(0));
    }

    #[test]
    fn more_chains_than_descriptors_break_the_queue() {
        let memory = memory();
        let driver = Driver::new(&memory);
        driver.claim_available(0, 1000);

        only_queue(&driver).drain(|_, _| Verdict::Used(0)).unwrap_err();

        assert!(driver.told_to_reset());
    }

    #[test]
    fn a_head_outside_the_table_breaks_the_queue() {
        let memory = memory();
        let driver = Driver::new(&memory);
        driver.offer_head(0, 4711);

        only_queue(&driver).drain(|_, _| Verdict::Used(0)).unwrap_err();

        assert!(driver.told_to_reset());
    }

    #[test]
    fn a_queue_that_was_not_set_up_is_empty() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let kicks = Arc::new([EventFd::new(0).unwrap()]);
        let interrupt = driver.activation().interrupt;
        let queue = Queue::new(64).unwrap();

        let mut queue = VirtQueue::new(0, queue, memory.clone(), interrupt, kicks, Arc::default());

        queue.drain(|_, _| Verdict::Used(0)).unwrap();
    }
}
