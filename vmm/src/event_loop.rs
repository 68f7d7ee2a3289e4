//! A thread that waits for file descriptors and calls their subscribers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::confinement::Confinement;
use crate::seccomp::Kind;

/// Address space of a loop's stack, in bytes; only what is used of it becomes memory.
const STACK_BYTES: usize = 512 << 10;

/// What a loop may own.
pub type BoxedSubscriber = Box<dyn MutEventSubscriber + Send>;

/// A running event loop; dropping it stops the thread and waits for it.
pub struct EventLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a thread of `kind` that serves `subscribers` until the loop is dropped.
    pub fn start(
        kind: Kind,
        subscribers: Vec<BoxedSubscriber>,
        confinement: &Confinement,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let running = Arc::new(AtomicBool::new(true));
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let stopped = Stop { event: stop.try_clone()?, running: running.clone() };
        manager.add_subscriber(Box::new(stopped) as BoxedSubscriber);
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        let builder = thread::Builder::new().name(kind.name().to_owned()).stack_size(STACK_BYTES);
        let thread = confinement.spawn(builder, kind, move || serve(manager, &running))?;
        Ok(EventLoop { stop, thread: Some(thread) })
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

    const CONFINEMENT: Confinement =
        Confinement { jail: None, seccomp: true, serves_files: false, user: None };

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
        let event_loop = EventLoop::start(Kind::Vmm, vec![Box::new(echo)], &CONFINEMENT).unwrap();

        event.write(7).unwrap();

        assert_eq!(sight.recv_timeout(Duration::from_secs(10)), Ok(7));
        drop(event_loop);
    }

    #[test]
    fn a_dropped_loop_has_dropped_its_subscribers() {
        let (seen, sight) = channel();
        let echo = Echo { event: EventFd::new(EFD_NONBLOCK).unwrap(), seen };
        let event_loop = EventLoop::start(Kind::Vmm, vec![Box::new(echo)], &CONFINEMENT).unwrap();

        drop(event_loop);

        assert!(sight.try_recv().is_err_and(|e| e == std::sync::mpsc::TryRecvError::Disconnected));
    }
}
