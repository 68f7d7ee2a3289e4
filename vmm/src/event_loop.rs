//! A thread that waits for file descriptors and calls their subscribers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
    SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Address space of a loop's stack, in bytes; only what is used of it becomes memory.
const STACK_BYTES: usize = 512 << 10;

/// What a loop may own.
pub type BoxedSubscriber = Box<dyn MutEventSubscriber + Send>;

/// A running event loop; dropping it stops the thread and waits for it.
pub struct EventLoop {
    name: &'static str,
    stop: EventFd,
    /// By which its thread is asked to change what it serves.
    remote: RemoteEndpoint<BoxedSubscriber>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a thread called `name` that serves `subscribers` until the loop is dropped.
    pub fn start(name: &'static str, subscribers: Vec<BoxedSubscriber>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let running = Arc::new(AtomicBool::new(true));
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let stopped = Stop { event: stop.try_clone()?, running: running.clone() };
        manager.add_subscriber(Box::new(stopped) as BoxedSubscriber);
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        let remote = manager.remote_endpoint();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || serve(manager, &running))?;
        Ok(EventLoop { name, stop, remote, thread: Some(thread) })
    }

    /// What it was started as.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Serves `subscriber`, too, until it is removed. Not to be called from a loop's thread.
    pub fn add(&self, subscriber: BoxedSubscriber) -> io::Result<SubscriberId> {
        self.remote
            .call_blocking(move |loop_| Ok(loop_.add_subscriber(subscriber)))
            .map_err(|error: event_manager::Error| io::Error::other(error))
    }

    /// Serves and keeps subscriber `id` no longer. Not to be called from a loop's thread.
    pub fn remove(&self, id: SubscriberId) -> io::Result<()> {
        self.remote
            .call_blocking(move |loop_| loop_.remove_subscriber(id).map(drop))
            .map_err(|error: event_manager::Error| io::Error::other(error))
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop.write(1).expect("an eventfd takes a 1");
        let thread = self.thread.take().expect("a loop is dropped once");
        if thread.join().is_err() && !thread::panicking() {
            panic!("an event loop panicked");
        }
    }
}

fn serve(mut manager: EventManager<BoxedSubscriber>, running: &AtomicBool) {
    while running.load(Ordering::Relaxed) {
        match manager.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if is_interruption(&error) => {}
            Err(error) => panic!("epoll_wait on our own descriptors: {error}"),
        }
    }
}

/// A debugger or a stop signal interrupts a wait, too.
fn is_interruption(error: &vmm_sys_util::errno::Error) -> bool {
    error.errno() == libc::EINTR
}

/// Ends the loop when its owner drops it.
struct Stop {
    event: EventFd,
    running: Arc<AtomicBool>,
}

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.event, EventSet::IN)).expect("a fresh eventfd can be polled");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.running.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;

    struct Echo {
        event: EventFd,
        seen: Sender<u64>,
    }

    impl MutEventSubscriber for Echo {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.seen.send(self.event.read().unwrap()).unwrap();
        }
    }

    #[test]
    fn an_event_reaches_its_subscriber() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, sight) = channel();
        let echo = Echo { event: event.try_clone().unwrap(), seen };
        let event_loop = EventLoop::start("test", vec![Box::new(echo)]).unwrap();

        event.write(7).unwrap();

        assert_eq!(sight.recv_timeout(Duration::from_secs(10)), Ok(7));
        drop(event_loop);
    }

    #[test]
    fn a_running_loop_takes_a_subscriber_and_gives_it_up() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, sight) = channel();
        let echo = Echo { event: event.try_clone().unwrap(), seen };
        let event_loop = EventLoop::start("test", Vec::new()).unwrap();

        let id = event_loop.add(Box::new(echo)).unwrap();
        event.write(7).unwrap();
        assert_eq!(sight.recv_timeout(Duration::from_secs(10)), Ok(7));
        event_loop.remove(id).unwrap();

        assert!(sight.try_recv().is_err_and(|e| e == std::sync::mpsc::TryRecvError::Disconnected));
        assert!(event_loop.remove(id).is_err());
    }

    #[test]
    fn a_dropped_loop_has_dropped_its_subscribers() {
        let (seen, sight) = channel();
        let echo = Echo { event: EventFd::new(EFD_NONBLOCK).unwrap(), seen };
        let event_loop = EventLoop::start("test", vec![Box::new(echo)]).unwrap();

        drop(event_loop);

        assert!(sight.try_recv().is_err_and(|e| e == std::sync::mpsc::TryRecvError::Disconnected));
    }
}
