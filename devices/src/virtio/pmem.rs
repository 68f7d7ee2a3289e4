//! Persistent memory device (virtio 1.2, section 5.19): tells the guest where a file is mapped into
//! its memory. The file's bytes never pass through here.

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use super::buffers::Buffers;
use super::complaints::Complaints;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::state::Position;
use super::{ActivateError, Activation, DeviceTraits, VirtioDevice, copy_config};

/// The only request there is (virtio 1.2, section 5.19.6).
const FLUSH: u32 = 0;

/// What a request may come back with.
const SUCCESS: i32 = 0;
const FAILURE: i32 = -1;

const TRAITS: DeviceTraits =
    DeviceTraits { device_type: VIRTIO_ID_PMEM, features: 0, queue_sizes: &[32] };

/// The device of a file that is mapped for reading, or whose changes stay in the guest.
pub struct Pmem {
    /// Start and size, in bytes, of the mapping (virtio 1.2, section 5.19.4).
    config: [u8; 16],
    complaints: Complaints,
    active: Option<Active>,
}

struct Active {
    requests: VirtQueue,
    buffers: Buffers,
}

impl Pmem {
    /// An idle device for the `bytes` bytes from guest-physical address `start` on, which are
    /// mapped there for as long as the guest runs.
    pub fn new(start: u64, bytes: u64) -> Self {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&start.to_le_bytes());
        config[8..].copy_from_slice(&bytes.to_le_bytes());
        Pmem { config, complaints: Complaints::of("pmem"), active: None }
    }
}

impl VirtioDevice for Pmem {
    fn traits(&self) -> DeviceTraits {
        TRAITS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [requests] = activation.into_queues()?;
        let buffers = Buffers::new(requests.memory().clone());
        self.active = Some(Active { requests, buffers });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    /// Answers requests. A flush has nothing to do: no change of the guest's ever reaches the file.
    fn queue_ready(&mut self, _index: usize) -> Result<(), QueueError> {
        let Pmem { complaints, active, .. } = self;
        let Some(Active { requests, buffers }) = active else { return Ok(()) };
        requests.drain(|chain, _| {
            buffers.clear();
            let mut request = [0; 4];
            let asked = buffers.add(chain.clone().readable());
            let is_flush = buffers.copy_out(0, &mut request) == request.len()
                && u32::from_le_bytes(request) == FLUSH;
            let answer = if is_flush { SUCCESS } else { FAILURE };

            buffers.clear();
            if let Err(error) = asked.and_then(|_| buffers.add(chain.writable())) {
                complaints.add(&error);
            }
            let written = buffers.copy_in(0, &answer.to_le_bytes());
            Verdict::Used(u32::try_from(written).expect("an answer has four bytes"))
        })
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        Ok(self.active.iter().map(|active| active.requests.position(0)).collect())
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::split::Descriptor;

    use super::*;
    use crate::virtio::testing::{Driver, memory};

    fn active(driver: &Driver<'_>) -> Pmem {
        let mut pmem = Pmem::new(1 << 32, 2 << 20);
        pmem.activate(driver.activation()).unwrap();
        pmem
    }

    #[test]
    fn the_guest_is_told_where_the_file_is() {
        let pmem = Pmem::new(0x1_0000_0000, 0x20_0000);

        let mut config = [0xff; 17];
        pmem.read_config(0, &mut config);

        assert_eq!(config[..8], 0x1_0000_0000_u64.to_le_bytes());
        assert_eq!(config[8..16], 0x20_0000_u64.to_le_bytes());
        assert_eq!(config[16], 0);
    }

    #[test]
    fn a_flush_succeeds() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut pmem = active(&driver);

        driver.offer(0, &[&[0; 4]], &[4]);
        pmem.queue_ready(0).unwrap();

        assert_eq!(driver.written(0, 0), SUCCESS.to_le_bytes());
    }

    #[test]
    fn a_request_nobody_knows_fails() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut pmem = active(&driver);

        driver.offer(0, &[&[1, 0, 0, 0]], &[4]);
        driver.offer(0, &[&[0]], &[4]);
        driver.offer(0, &[], &[4]);
        pmem.queue_ready(0).unwrap();

        assert_eq!([0, 1, 2].map(|nth| driver.written(0, nth)), [FAILURE.to_le_bytes(); 3]);
    }

    #[test]
    fn a_request_without_room_for_the_answer_comes_back() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut pmem = active(&driver);

        let request = driver.offer(0, &[&[0; 4]], &[]);
        let elsewhere = driver.offer_descriptors(0, &[Descriptor::new(1 << 40, 4, 2, 0)]);
        pmem.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(request.into(), 0), (elsewhere.into(), 0)]);
    }

    #[test]
    fn is_silent_before_activation_and_after_reset() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut pmem = active(&driver);

        pmem.reset();
        driver.offer(0, &[&[0; 4]], &[4]);
        pmem.queue_ready(0).unwrap();

        assert_eq!(driver.used(), []);
    }

    #[test]
    fn a_device_built_anew_answers_what_comes_next() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut old = active(&driver);
        driver.offer(0, &[&[0; 4]], &[4]);
        old.queue_ready(0).unwrap();
        driver.offer(0, &[&[0; 4]], &[4]);

        let mut new = Pmem::new(1 << 32, 2 << 20);
        driver.hand_over(0, &mut old, &mut new);
        new.queue_ready(0).unwrap();

        assert_eq!(driver.used().len(), 2);
        assert_eq!(driver.written(0, 1), SUCCESS.to_le_bytes());
    }
}
