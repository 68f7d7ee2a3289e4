//! What a driver finds in the place of an interface with a control queue that was taken away from it: its
//! frames go nowhere, and each command fails, until the driver resets the device.

use super::control::Control;
use super::{Pairs, all_positions};
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{QueueError, Verdict, VirtQueue};
use crate::virtio::state::Position;
use crate::virtio::{ActivateError, Activation, DeviceTraits, VirtioDevice};

/// A network device without a tap.
pub struct Gone {
    traits: DeviceTraits,
    complaints: Complaints,
    active: Option<Active>,
}

struct Active {
    pairs: Vec<VirtQueue>,
    control: Option<Control>,
    control_index: usize,
}

impl Gone {
    /// One in the place of a device with these `traits`.
    pub fn new(traits: DeviceTraits) -> Self {
        Gone { traits, complaints: Complaints::of("net"), active: None }
    }
}

impl VirtioDevice for Gone {
    fn traits(&self) -> DeviceTraits {
        self.traits
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (pairs, control, control_index) = Pairs::split(activation.queues, activation.features);
        self.active = Some(Active { pairs, control, control_index });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(Active { pairs, control, control_index }) = &mut self.active else {
            return Ok(());
        };
        if index == *control_index {
            // A driver waits for each answer, and lets nobody else change an interface meanwhile.
            let control = control.as_mut();
            return control.map_or(Ok(()), |one| one.run(&mut self.complaints, |_, _| false));
        }
        let is_transmit = index % 2 == 1;
        let queue = pairs.get_mut(index).filter(|_| is_transmit);
        queue.map_or(Ok(()), |queue| queue.drain(|_, _| Verdict::Used(0)))
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        let Some(active) = &self.active else { return Ok(Vec::new()) };
        let pairs = active.pairs.iter().map(|queue| queue.position(0)).collect();
        Ok(all_positions(pairs, active.control.as_ref(), active.control_index, self.traits))
    }
}
