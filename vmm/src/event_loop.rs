//! A thread that waits for file descriptors and calls their subscribers.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use event_manager::{
    EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};

use crate::confinement::Confinement;
use crate::seccomp::Kind;

/// Address space of a loop's stack, in bytes; only what is used of it becomes memory.
const STACK_BYTES: usize = 512 << 10;

/// What a loop may own.
pub type BoxedSubscriber = Box<dyn MutEventSubscriber + Send>;

/// A running event loop; dropping it stops the thread and waits for it.
pub struct EventLoop {
    kind: Kind,
    wish: Arc<Wish>,
    /// By which its thread is asked to change what it serves, or to look at `wish`.
    remote: RemoteEndpoint<BoxedSubscriber>,
    thread: Option<JoinHandle<()>>,
}

/// What the owner of a loop wants of its thread.
#[derive(Default)]
struct Wish {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stop: bool,
    park: bool,
    /// Whether the thread waits, because it was told to park.
    is_parked: bool,
}

impl EventLoop {
    /// Starts a thread of `kind` that serves `subscribers` until the loop is dropped.
    pub fn start(
        kind: Kind,
        subscribers: Vec<BoxedSubscriber>,
        confinement: &Confinement,
    ) -> io::Result<Self> {
        let wish = Arc::new(Wish::default());
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        let remote = manager.remote_endpoint();
        let builder = thread::Builder::new().name(kind.name().to_owned()).stack_size(STACK_BYTES);
        let thread = confinement.spawn(builder, kind, {
            let wish = wish.clone();
            move || serve(manager, &wish)
        })?;
        Ok(EventLoop { kind, wish, remote, thread: Some(thread) })
    }

    /// What it was started as.
    pub fn kind(&self) -> Kind {
        self.kind
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

    /// Returns once the thread does nothing any more, until [`EventLoop::unpark`].
    pub fn park(&self) {
        self.change(|state| state.park = true);
        let mut state = self.wish.lock();
        while state.park && !state.is_parked {
            state = self.wish.wait(state);
        }
    }

    /// Lets the thread go on with what came meanwhile.
    pub fn unpark(&self) {
        self.change(|state| state.park = false);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.wish.lock());
        self.wish.changed.notify_all();
        self.remote.kick().expect("an eventfd takes a 1");
    }
}

impl Wish {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the wish")
    }

    /// Rests for as long as the loop shall be parked. Returns whether it goes on then.
    fn obey(&self) -> bool {
        let mut state = self.lock();
        while state.park && !state.stop {
            state.is_parked = true;
            self.changed.notify_all();
            state = self.wait(state);
        }
        state.is_parked = false;
        !state.stop
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).expect("nothing panics while it holds the wish")
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.change(|state| state.stop = true);
        let thread = self.thread.take().expect("a loop is dropped once");
        if thread.join().is_err() && !thread::panicking() {
            panic!("an event loop panicked");
        }
    }
}

fn serve(mut manager: EventManager<BoxedSubscriber>, wish: &Wish) {
    while wish.obey() {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use event_manager::{EventOps, EventSet, Events};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

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
    fn a_running_loop_takes_a_subscriber_and_gives_it_up() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, sight) = channel();
        let echo = Echo { event: event.try_clone().unwrap(), seen };
        let event_loop = EventLoop::start(Kind::Vmm, Vec::new(), &CONFINEMENT).unwrap();

        let id = event_loop.add(Box::new(echo)).unwrap();
        event.write(7).unwrap();
        assert_eq!(sight.recv_timeout(Duration::from_secs(10)), Ok(7));
        event_loop.remove(id).unwrap();

        assert!(sight.try_recv().is_err_and(|e| e == std::sync::mpsc::TryRecvError::Disconnected));
        assert!(event_loop.remove(id).is_err());
    }

    #[test]
    fn a_parked_loop_does_nothing_until_it_goes_on() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, sight) = channel();
        let echo = Echo { event: event.try_clone().unwrap(), seen };
        let event_loop = EventLoop::start(Kind::Vmm, vec![Box::new(echo)], &CONFINEMENT).unwrap();

        event_loop.park();
        event.write(7).unwrap();
        assert!(sight.recv_timeout(Duration::from_millis(50)).is_err());
        event_loop.unpark();

        assert_eq!(sight.recv_timeout(Duration::from_secs(10)), Ok(7));
    }

    #[test]
    fn a_parked_loop_can_be_dropped() {
        let event_loop = EventLoop::start(Kind::Vmm, Vec::new(), &CONFINEMENT).unwrap();

        event_loop.park();
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
