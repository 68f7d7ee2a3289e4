//! The only place where a virtio device meets the event loop.

use std::error::Error;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::activity::Activity;
use super::complaints::Complaints;
use super::{Backend, VirtioDevice, eagerness};

/// Event data of backend 0; queue events carry the bare queue index.
const FIRST_BACKEND: u32 = 1 << 16;

/// Turns readiness of a device's kick eventfds and backends into calls on the device.
pub struct Subscriber {
    /// One for each queue.
    kicks: Arc<[EventFd]>,
    backends: Vec<Backend>,
    device: Arc<Mutex<dyn VirtioDevice>>,
    activity: Arc<Activity>,
    complaints: Complaints,
}

impl Subscriber {
    /// `name` is what log lines call the device; `kicks` holds one eventfd per queue, to which KVM
    /// writes when the driver kicks that queue, and `activity` counts these kicks.
    pub fn new(
        name: String,
        kicks: Arc<[EventFd]>,
        device: Arc<Mutex<dyn VirtioDevice>>,
        activity: Arc<Activity>,
    ) -> Self {
        let backends = device.lock().expect("fresh lock").backends();
        Subscriber { kicks, backends, device, activity, complaints: Complaints::of(name) }
    }
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps) {
        // Edge-triggered, so that nobody needs to read the counter: each kick is an edge.
        let device = self.device.lock().expect("no device panics while it holds its lock");
        let kicks = (0..).zip(&*self.kicks);
        for (index, kick) in kicks.filter(|(index, _)| device.serves(*index as usize)) {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data(kick, index, events)).expect("a fresh eventfd can be polled");
        }
        drop(device);
        for (backend, data) in self.backends.iter().zip(FIRST_BACKEND..) {
            let events = backend.events | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data_raw(backend.fd, data, events))
                .expect("a backend can be polled");
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        eagerness::woken();
        let mut device = self.device.lock().expect("no device panics while it holds its lock");
        let outcome = match events.data().checked_sub(FIRST_BACKEND) {
            Some(index) => device.backend_ready(index as usize, events.event_set()),
            None => {
                self.activity.add_kick();
                device.queue_ready(events.data() as usize)
            }
        };
        if let Err(error) = outcome {
            // The queue has already told the driver that the device needs a reset.
            device.reset();
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            self.complaints.add(&format_args!("stopped until it is reset: {error}: {cause}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use event_manager::{EventManager, SubscriberOps};
    use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::virtio::queue::{QueueError, Verdict, VirtQueue};
    use crate::virtio::state::Position;
    use crate::virtio::testing::{Driver, memory};
    use crate::virtio::{ActivateError, Activation, DeviceTraits};

    /// Gives every chain back.
    #[derive(Default)]
    struct Sink(Option<VirtQueue>);

    impl VirtioDevice for Sink {
        fn traits(&self) -> DeviceTraits {
            DeviceTraits { device_type: VIRTIO_ID_RNG, features: 0, queue_sizes: &[64] }
        }

        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            let [queue] = activation.into_queues()?;
            self.0 = Some(queue);
            Ok(())
        }

        fn reset(&mut self) {
            self.0 = None;
        }

        fn queue_ready(&mut self, _index: usize) -> Result<(), QueueError> {
            self.0.as_mut().map_or(Ok(()), |queue| queue.drain(|_, _| Verdict::Used(0)))
        }

        fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
            Ok(self.0.iter().map(|queue| queue.position(0)).collect())
        }
    }

    fn watched(device: &Arc<Mutex<Sink>>) -> (EventManager<Subscriber>, Arc<[EventFd]>) {
        counted(device, Arc::default())
    }

    fn counted(
        device: &Arc<Mutex<Sink>>,
        activity: Arc<Activity>,
    ) -> (EventManager<Subscriber>, Arc<[EventFd]>) {
        let kicks: Arc<[_]> = [EventFd::new(EFD_NONBLOCK).unwrap()].into();
        let mut manager = EventManager::new().unwrap();
        let subscriber =
            Subscriber::new("sink".to_owned(), kicks.clone(), device.clone(), activity);
        manager.add_subscriber(subscriber);
        (manager, kicks)
    }

    #[test]
    fn every_kick_reaches_the_device() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let device = Arc::new(Mutex::new(Sink::default()));
        device.lock().unwrap().activate(driver.activation()).unwrap();
        let (mut manager, kicks) = watched(&device);

        for chains in 1..=3 {
            driver.offer(0, &[b"x"], &[]);
            kicks[0].write(1).unwrap();
            manager.run_with_timeout(1000).unwrap();
            assert_eq!(driver.used().len(), chains);
        }
    }

    #[test]
    fn kicks_are_counted() {
        let device = Arc::new(Mutex::new(Sink::default()));
        let activity = Arc::new(Activity::default());
        let (mut manager, kicks) = counted(&device, activity.clone());

        for _ in 0..3 {
            kicks[0].write(1).unwrap();
            manager.run_with_timeout(1000).unwrap();
        }

        assert_eq!(activity.counts().kicks, 3);
    }

    #[test]
    fn a_broken_queue_resets_the_device() {
        let memory = memory();
        let driver = Driver::new(&memory);
        let device = Arc::new(Mutex::new(Sink::default()));
        device.lock().unwrap().activate(driver.activation()).unwrap();
        let (mut manager, kicks) = watched(&device);

        driver.claim_available(0, 1000);
        kicks[0].write(1).unwrap();
        manager.run_with_timeout(1000).unwrap();

        assert!(device.lock().unwrap().0.is_none());
        assert!(driver.told_to_reset());
    }

    /// Serves its second queue only, and remembers what it was called for.
    #[derive(Default)]
    struct Half(Vec<usize>);

    impl VirtioDevice for Half {
        fn traits(&self) -> DeviceTraits {
            DeviceTraits { device_type: VIRTIO_ID_RNG, features: 0, queue_sizes: &[64, 64] }
        }

        fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
            Ok(())
        }

        fn reset(&mut self) {}

        fn serves(&self, index: usize) -> bool {
            index == 1
        }

        fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
            self.0.push(index);
            Ok(())
        }

        fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn kicks_somebody_else_watches_do_not_reach_the_device() {
        let kicks: Arc<[_]> = (0..2).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        kicks.iter().for_each(|kick| kick.write(1).unwrap());
        let device = Arc::new(Mutex::new(Half::default()));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(Subscriber::new(
            "half".to_owned(),
            kicks,
            device.clone(),
            Arc::default(),
        ));

        manager.run_with_timeout(1000).unwrap();

        assert_eq!(device.lock().unwrap().0, [1]);
    }
}
