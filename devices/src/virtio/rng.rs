//! Entropy device (virtio 1.2, section 5.4): fills guest buffers with host random bytes.

use std::fs::File;
use std::os::fd::AsFd;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::buffers::Buffers;
use super::complaints::Complaints;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::state::Position;
use super::{ActivateError, Activation, DeviceTraits, VirtioDevice};

/// Most bytes served per request. A chain may name the same page many times over, so its length
/// is no bound on the work a guest can ask for.
const MAX_REQUEST_BYTES: u16 = 4 << 10;

const TRAITS: DeviceTraits =
    DeviceTraits { device_type: VIRTIO_ID_RNG, features: 0, queue_sizes: &[8] };

/// An entropy device that reads from a file.
pub struct Rng {
    source: File,
    complaints: Complaints,
    active: Option<Active>,
}

struct Active {
    requests: VirtQueue,
    buffers: Buffers,
}

impl Rng {
    /// Creates an idle device. `source` is `/dev/urandom` outside tests.
    pub fn new(source: File) -> Self {
        Rng { source, complaints: Complaints::of("rng"), active: None }
    }
}

impl VirtioDevice for Rng {
    fn traits(&self) -> DeviceTraits {
        TRAITS
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

    fn queue_ready(&mut self, _index: usize) -> Result<(), QueueError> {
        let Rng { source, complaints, active } = self;
        let Some(Active { requests, buffers }) = active else { return Ok(()) };
        requests.drain(|chain, _| {
            buffers.clear();
            if let Err(error) = buffers.add(chain.writable()) {
                complaints.add(&error);
                return Verdict::Used(0);
            }
            buffers.truncate(MAX_REQUEST_BYTES.into());
            match buffers.read_from(source.as_fd()) {
                Ok(bytes) => Verdict::Used(u16::try_from(bytes).map_or(0, u32::from)),
                Err(error) => {
                    complaints.add(&format_args!("read random bytes: {error}"));
                    Verdict::Used(0)
                }
            }
        })
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        Ok(self.active.iter().map(|active| active.requests.position(0)).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use virtio_queue::desc::split::Descriptor;

    use super::*;
    use crate::virtio::testing::{Driver, memory};

    /// A device whose random bytes are these, and then no more.
    fn active(driver: &Driver<'_>, random: &[u8]) -> Rng {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(random).unwrap();
        let mut rng = Rng::new(file.reopen().unwrap());
        rng.activate(driver.activation()).unwrap();
        rng
    }

    #[test]
    fn fills_the_whole_buffer() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut rng = active(&driver, &[0xa5; 16]);

        driver.offer_writable(&[10, 6]);
        rng.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, 16)]);
        assert_eq!(driver.buffer(0, 16), [0xa5; 16]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn serves_at_most_4_kib_per_request() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut rng = active(&driver, &[1; 5 << 10]);

        driver.offer_writable(&[5 << 10]);
        rng.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, 4 << 10)]);
    }

    #[test]
    fn a_buffer_outside_memory_comes_back_empty() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut rng = active(&driver, &[1; 16]);

        driver.offer_descriptors(0, &[Descriptor::new(1 << 40, 16, 2, 0)]);
        rng.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn a_buffer_to_read_from_comes_back_empty() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut rng = active(&driver, &[1; 16]);

        driver.offer(0, &[b"not for you"], &[]);
        rng.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn a_chain_that_loops_is_served_and_ends() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut rng = active(&driver, &[1; 4 << 10]);

        driver.write_descriptor(0, 0, Descriptor::new(0x2_0000, 16, 2 | 1, 0));
        driver.offer_head(0, 0);
        rng.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, 64 * 16)]);
    }

    #[test]
    fn is_silent_before_activation_and_after_reset() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut rng = active(&driver, &[]);

        rng.reset();
        rng.reset();
        driver.offer_writable(&[16]);
        rng.queue_ready(0).unwrap();

        assert_eq!(driver.used(), []);
    }

    #[test]
    fn a_device_built_anew_serves_what_comes_next() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let mut old = active(&driver, &[1; 16]);
        driver.offer_writable(&[16]);
        old.queue_ready(0).unwrap();
        driver.offer_writable(&[8]);

        let mut new = Rng::new(tempfile::tempfile().unwrap());
        (&new.source).write_all(&[2; 16]).unwrap();
        std::io::Seek::rewind(&mut new.source).unwrap();
        driver.hand_over(0, &mut old, &mut new);
        new.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, 16), (1, 8)]);
        assert_eq!(driver.written(0, 1), [2; 8]);
    }
}
