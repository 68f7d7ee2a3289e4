//! Memory balloon (virtio 1.2, section 5.5): the guest hands memory it does not need to the host.
//!
//! There are three ways: the host asks for an amount (*inflate*), the guest tells of every large
//! piece it frees (*page reporting*), or the host asks once for all that is free (*hinting*).

pub(super) mod discard;
mod host;
mod statistics;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar};

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use self::discard::{BALLOON_PAGE, Discarder};
pub use self::host::Host;
pub use self::statistics::Statistics;
use super::buffers::Buffers;
use super::complaints::Complaints;
use super::config_space::ConfigSpace;
use super::queue::{Chain, QueueError, Verdict, VirtQueue};
use super::state::{DeviceState, Position, RestoreError};
use super::{ActivateError, Activation, DeviceTraits, VirtioDevice, copy_config};
use crate::interrupt::Interrupt;

/// Feature bits (virtio 1.2, section 5.5.3).
const STATS_VQ: u64 = 1;
const DEFLATE_ON_OOM: u64 = 2;
const FREE_PAGE_HINT: u64 = 3;
const PAGE_POISON: u64 = 4;
const PAGE_REPORTING: u64 = 5;

/// Balloon pages of one MiB.
const PAGES_PER_MIB: u32 = (1 << 20) / BALLOON_PAGE;

/// Descriptors of each queue: Linux reports 32 pieces of memory with one chain, or none at all. All
/// are the same because a queue's number depends on what the driver knows of.
const QUEUE_SIZES: [u16; 5] = [32; 5];

/// Inflate and deflate queues are always there, and the statistics queue is always the next.
const STATISTICS: usize = 2;

/// Offsets in the configuration space (virtio 1.2, section 5.5.4), each field of four bytes.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const HINT_COMMAND: usize = 8;
const POISON: usize = 12;
pub(super) const CONFIG_BYTES: usize = 16;

/// What a hint command is when it is no round (virtio 1.2, section 5.5.6.6).
const HINT_STOP: u32 = 0;
const HINT_DONE: u32 = 1;
const FIRST_ROUND: u32 = 2;

/// Most page numbers taken from one chain: the page full of them that the largest driver sends.
const MAX_PAGE_NUMBERS: usize = 1024;

/// Most pieces of memory taken from one chain, each of any size. Those past it just stay where they
/// are.
const MAX_PIECES: usize = 256;

/// What a balloon offers to the guest's driver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offer {
    /// The driver may take pages out of the balloon before a program of the guest dies for want of
    /// memory.
    pub deflate_on_oom: bool,
    /// The driver tells how its memory is used when it is asked.
    pub statistics: bool,
    /// The driver tells of all free memory when it is asked.
    pub free_page_hint: bool,
    /// The driver tells of every large piece of memory that becomes free.
    pub page_reporting: bool,
}

/// A memory balloon.
pub struct Balloon {
    offer: Offer,
    config: [u8; CONFIG_BYTES],
    shown: ConfigSpace,
    last_round: u32,
    statistics: Statistics,
    /// How often the driver sent statistics, so that an answer can be told from the one before.
    answers: u64,
    /// Notified after `answers` changed.
    answered: Arc<Condvar>,
    complaints: Complaints,
    /// What earlier drivers gave back, in bytes.
    given_back_before: u64,
    active: Option<Active>,
}

struct Active {
    queues: Vec<VirtQueue>,
    features: u64,
    buffers: Buffers,
    discarder: Discarder,
    interrupt: Arc<dyn Interrupt>,
    /// The buffer the driver lent for its next answer.
    statistics_request: Option<u16>,
    /// Whether the driver's hints are those of the round that was asked for.
    in_round: bool,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hint,
    Report,
}

impl Offer {
    fn features(self) -> u64 {
        let bit = |offered: bool, feature: u64| u64::from(offered) << feature;
        bit(self.statistics, STATS_VQ)
            | bit(self.deflate_on_oom, DEFLATE_ON_OOM)
            | bit(self.free_page_hint, FREE_PAGE_HINT)
            // A driver whose free pages have a certain content reports them only to a device that
            // may be told of it.
            | bit(self.free_page_hint || self.page_reporting, PAGE_POISON)
            | bit(self.page_reporting, PAGE_REPORTING)
    }
}

/// What queue `index` is for once these features are negotiated: the queues of features that are
/// not do not count. That is how every driver and every other device understands the numbers of
/// virtio 1.2, section 5.5.2.
fn role(features: u64, index: usize) -> Option<Role> {
    let with = |feature: u64, role| (features & 1 << feature != 0).then_some(role);
    [
        Some(Role::Inflate),
        Some(Role::Deflate),
        with(STATS_VQ, Role::Statistics),
        with(FREE_PAGE_HINT, Role::Hint),
        with(PAGE_REPORTING, Role::Report),
    ]
    .into_iter()
    .flatten()
    .nth(index)
}

impl Balloon {
    /// An idle balloon into which the guest shall put `target_mib` MiB.
    pub fn new(offer: Offer, target_mib: u32) -> Self {
        let mut balloon = Balloon {
            offer,
            config: [0; CONFIG_BYTES],
            shown: ConfigSpace::default(),
            last_round: HINT_DONE,
            statistics: Statistics::default(),
            answers: 0,
            answered: Arc::default(),
            complaints: Complaints::of("balloon"),
            given_back_before: 0,
            active: None,
        };
        balloon.set_field(NUM_PAGES, target_mib.saturating_mul(PAGES_PER_MIB));
        balloon
    }

    fn field(&self, offset: usize) -> u32 {
        let bytes = self.config[offset..offset + 4].try_into().expect("fields have four bytes");
        u32::from_le_bytes(bytes)
    }

    fn set_field(&mut self, offset: usize, value: u32) {
        self.config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        self.shown.show(&self.config);
    }

    fn target(&self) -> u32 {
        self.field(NUM_PAGES)
    }

    fn size(&self) -> u32 {
        self.field(ACTUAL)
    }

    fn set_target(&mut self, pages: u32) {
        self.set_field(NUM_PAGES, pages);
        self.config_changed();
    }

    fn config_changed(&self) {
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    fn statistics(&self) -> Statistics {
        self.statistics
    }

    fn answers(&self) -> u64 {
        self.answers
    }

    fn given_back_bytes(&self) -> u64 {
        let now = self.active.as_ref().map_or(0, |active| active.discarder.given_back_bytes());
        self.given_back_before.saturating_add(now)
    }

    /// Gives the driver its buffer back, which asks for the next answer (virtio 1.2, section
    /// 5.5.6.3). Returns how many answers there were before; `None` without a driver that answers.
    fn request_statistics(&mut self) -> Result<Option<u64>, QueueError> {
        let Some(active) = &mut self.active else { return Ok(None) };
        if role(active.features, STATISTICS) != Some(Role::Statistics) {
            return Ok(None);
        }
        // Without the buffer a request is on its way already, and its answer is as good.
        if let Some(head) = active.statistics_request.take() {
            let queue = &mut active.queues[STATISTICS];
            queue.complete(&[(head, 0)])?;
            queue.notify()?;
        }
        Ok(Some(self.answers))
    }

    /// Asks the driver for a round of hints; `false` without a driver that gives them.
    fn start_hinting(&mut self) -> bool {
        let Some(active) = &mut self.active else { return false };
        if active.features & 1 << FREE_PAGE_HINT == 0 {
            return false;
        }
        active.in_round = false;
        self.last_round = self.last_round.checked_add(1).unwrap_or(FIRST_ROUND);
        self.set_field(HINT_COMMAND, self.last_round);
        self.config_changed();
        true
    }

    /// Takes the pages whose numbers the driver lists (virtio 1.2, section 5.5.6).
    fn inflate(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Active { queues, buffers, discarder, .. } = active;
        let complaints = &mut self.complaints;
        queues[index].drain(|chain, _| {
            let mut bytes = [0; MAX_PAGE_NUMBERS * 4];
            let length = copy_readable(buffers, chain, &mut bytes, complaints);
            let mut pages = [0; MAX_PAGE_NUMBERS];
            let numbers = bytes[..length].chunks_exact(4);
            let count = numbers.len();
            for (page, number) in pages.iter_mut().zip(numbers) {
                *page = u32::from_le_bytes(number.try_into().expect("chunks of four bytes"));
            }
            if let Err(error) = discarder.pages(&mut pages[..count]) {
                complaints.add(&error);
            }
            Verdict::Used(0)
        })
    }

    /// Lets the driver take pages back: they are there again as soon as they are touched.
    fn deflate(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        active.queues[index].drain(|_, _| Verdict::Used(0))
    }

    /// Takes an answer and keeps its buffer for the next request.
    fn receive_statistics(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Active { queues, buffers, statistics_request, .. } = active;
        let (statistics, complaints) = (&mut self.statistics, &mut self.complaints);
        let mut answers = 0;
        queues[index].drain(|chain, _| {
            // A driver has one buffer (virtio 1.2, section 5.5.6.3.1).
            if statistics_request.is_some() {
                return Verdict::Used(0);
            }
            let mut bytes = [0; statistics::MAX_BYTES];
            *statistics_request = Some(chain.head_index());
            let length = copy_readable(buffers, chain, &mut bytes, complaints);
            *statistics = Statistics::parse(&bytes[..length]);
            answers += 1;
            Verdict::Hold
        })?;
        if answers != 0 {
            self.answers = self.answers.wrapping_add(answers);
            self.answered.notify_all();
        }
        Ok(())
    }

    /// Takes what the driver says is free (virtio 1.2, section 5.5.6.7): it does not touch that
    /// memory before it has the chain back.
    fn take_reports(&mut self, index: usize) -> Result<(), QueueError> {
        let keep = self.has_poison();
        let Some(active) = &mut self.active else { return Ok(()) };
        let (discarder, complaints) = (&mut active.discarder, &mut self.complaints);
        active.queues[index].drain(|chain, _| {
            if !keep {
                discard_writable(discarder, chain, complaints);
            }
            Verdict::Used(0)
        })
    }

    /// Takes the hints of the round that was asked for and tells the driver when it is over (virtio
    /// 1.2, section 5.5.6.6). See [`VirtioDevice::serves_at_once`] for why that is safe.
    fn take_hints(&mut self, index: usize) -> Result<(), QueueError> {
        let keep = self.has_poison();
        let command = self.field(HINT_COMMAND);
        let Some(active) = &mut self.active else { return Ok(()) };
        let Active { queues, buffers, discarder, in_round, .. } = active;
        let complaints = &mut self.complaints;
        let mut over = false;
        queues[index].drain(|chain, _| {
            let mut bytes = [0; 4];
            if copy_readable(buffers, chain.clone(), &mut bytes, complaints) == bytes.len() {
                let said = u32::from_le_bytes(bytes);
                over |= *in_round && said == HINT_STOP;
                *in_round = said == command && command >= FIRST_ROUND;
            }
            if *in_round && !keep {
                discard_writable(discarder, chain, complaints);
            }
            Verdict::Used(0)
        })?;
        if over && !active.in_round {
            self.set_field(HINT_COMMAND, HINT_DONE);
            self.config_changed();
        }
        Ok(())
    }

    /// Whether free pages have a content that what was given back may not have (virtio 1.2, section
    /// 5.5.6.7): poison, or zeros, where memory is private and on a file.
    fn has_poison(&self) -> bool {
        self.active.as_ref().is_some_and(|active| {
            active.features & 1 << PAGE_POISON != 0
                && (self.field(POISON) != 0 || active.discarder.may_leave_contents())
        })
    }
}

/// Copies what the driver wrote into `chain`; returns how many bytes there were room for.
fn copy_readable(
    buffers: &mut Buffers,
    chain: Chain<'_>,
    bytes: &mut [u8],
    complaints: &mut Complaints,
) -> usize {
    buffers.clear();
    if let Err(error) = buffers.add(chain.readable()) {
        complaints.add(&error);
    }
    buffers.copy_out(0, bytes)
}

/// Gives the memory back that `chain` offers to be overwritten.
fn discard_writable(discarder: &mut Discarder, chain: Chain<'_>, complaints: &mut Complaints) {
    for piece in chain.writable().take(MAX_PIECES) {
        if let Err(error) = discarder.range(piece.addr().0, piece.len().into()) {
            complaints.add(&error);
        }
    }
}

impl VirtioDevice for Balloon {
    fn traits(&self) -> DeviceTraits {
        let features = self.offer.features();
        let queues = (0..QUEUE_SIZES.len()).filter_map(|index| role(features, index)).count();
        DeviceTraits {
            device_type: VIRTIO_ID_BALLOON,
            features,
            queue_sizes: &const { QUEUE_SIZES }[..queues],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let fields = self.config.iter_mut().enumerate().skip(offset);
        for ((at, field), &byte) in fields.zip(data) {
            if matches!(at - at % 4, ACTUAL | POISON) {
                *field = byte;
            }
        }
        self.shown.show(&self.config);
    }

    fn show_config_in(&mut self, space: ConfigSpace) {
        self.shown = space;
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { queues, features, interrupt } = activation;
        let expected = self.traits().queue_sizes.len();
        let (Some(first), true) = (queues.first(), queues.len() == expected) else {
            return Err(ActivateError::QueueCount { expected, actual: queues.len() });
        };
        let memory = first.memory().clone();
        self.active = Some(Active {
            buffers: Buffers::new(memory.clone()),
            discarder: Discarder::new(memory),
            queues,
            features,
            interrupt,
            statistics_request: None,
            in_round: false,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.given_back_before = self.given_back_bytes();
        self.active = None;
        self.set_field(ACTUAL, 0);
        self.set_field(HINT_COMMAND, HINT_STOP);
        self.set_field(POISON, 0);
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = &self.active else { return Ok(()) };
        match role(active.features, index) {
            Some(Role::Inflate) => self.inflate(index),
            Some(Role::Deflate) => self.deflate(index),
            Some(Role::Statistics) => self.receive_statistics(index),
            Some(Role::Hint) => self.take_hints(index),
            Some(Role::Report) => self.take_reports(index),
            None => Ok(()),
        }
    }

    /// A hint must be taken before its driver goes on. Under memory pressure Linux uses a page again
    /// that it hinted at, without a word to the device, but not before the kick for it returned: a
    /// device that takes its time would throw away what was written since. Which of the later queues
    /// the hints come through depends on the driver.
    fn serves_at_once(&self, index: usize) -> bool {
        self.offer.free_page_hint && index >= STATISTICS
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        let Some(active) = &self.active else { return Ok(Vec::new()) };
        let held = |index| index == STATISTICS && active.statistics_request.is_some();
        let queues = active.queues.iter().enumerate();
        Ok(queues.map(|(index, queue)| queue.position(held(index).into())).collect())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon {
            config: self.config,
            last_round: self.last_round,
            in_round: self.active.as_ref().is_some_and(|active| active.in_round),
        }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let &DeviceState::Balloon { config, last_round, in_round } = state else {
            return Err(RestoreError::Kind);
        };
        self.config = config;
        self.shown.show(&self.config);
        self.last_round = last_round;
        if let Some(active) = &mut self.active {
            active.in_round = in_round;
        }
        Ok(())
    }
}
