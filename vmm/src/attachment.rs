//! Disks and network interfaces that come and go while the guest runs.
//!
//! virtio-mmio has no hot-plug, so the guest is told of a few places at its start that have no device
//! yet ([`VmConfig::spare_slots`](crate::VmConfig::spare_slots)). Its driver passes them over, and looks
//! again when somebody in the guest binds it to the place.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arch::{Arch, Host, VmFd};
use devices::interrupt::IrqLine;
use devices::virtio::VirtioDevice;
use devices::virtio::activity::Activity;
use devices::virtio::block::{Block, Ring};
use devices::virtio::mmio::{Unsettled, lock_until};
use devices::virtio::net::{Net, Tap};
use devices::virtio::slot::Slot;
use devices::virtio::subscriber::Subscriber;
use event_manager::SubscriberId;
use vm_memory::GuestMemoryMmap;

use crate::config::{ConfigError, DiskConfig, DiskEngine};
use crate::error::Error;
use crate::event_loop::EventLoop;
use crate::opened;
use crate::peripherals;
use crate::placement::{Loop, PlacementError, SpareSlot, Wired, unwire};

/// How long the host may take to finish what a device that is detached has in flight.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a device was not attached. The machine goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A value of its configuration cannot be; the field is one of the device.
    #[error(transparent)]
    Config(ConfigError),
    /// Every place is taken, or there is none. That of a disk, or of an interface with several queue pairs,
    /// which was detached is taken until the guest has let go of it.
    #[error(
        "the machine has no free place for a device: it was built with spare_slots = {spare_slots}, and \
         what was detached leaves its place when the guest's driver lets go of it"
    )]
    NoSlot {
        /// How many places it has.
        spare_slots: usize,
    },
    /// The file, the tap or the like cannot be used.
    #[error("open it")]
    Open(#[source] Box<Error>),
    /// It could not be connected to the machine.
    #[error("connect it")]
    Connect(#[source] PlacementError),
    /// The thread that has to serve it does not answer.
    #[error("have it served")]
    Serve(#[source] io::Error),
}

/// Why a device was not detached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DetachError {
    /// There is none of that name.
    #[error("there is no {0}")]
    Unknown(String),
    /// It was there from the start.
    #[error("{0} was there when the machine started, and stays as long as it does")]
    Fixed(String),
    /// The host has not finished what the guest asked it for. All goes on.
    #[error("{0} has requests in flight that the host does not finish")]
    Busy(String),
}

/// Where a device was attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its number among the virtio devices the guest was told about.
    pub number: usize,
    /// Which names the guest may know the place by: somebody there has to write the right one to
    /// `/sys/bus/platform/drivers/virtio-mmio/bind`.
    pub names: Vec<String>,
}

/// The places for devices of a running machine.
pub struct Slots {
    memory: GuestMemoryMmap,
    /// Names of the devices that were there from the start.
    fixed: Vec<String>,
    places: Mutex<Places>,
}

struct Places {
    all: Vec<Place>,
    /// Whether this process opens nothing any more.
    is_closed: bool,
}

struct Place {
    spare: SpareSlot,
    /// For a disk that comes once this process may make no ring any more.
    ring: Option<Ring>,
    taken: Option<Taken>,
}

/// A device that comes and goes.
#[derive(Clone)]
pub enum Device {
    /// A disk.
    Disk(Arc<Mutex<Block>>),
    /// A network interface.
    Net(Arc<Mutex<Net<Tap>>>),
}

/// What a place holds beside what its slot holds.
struct Taken {
    name: String,
    /// The device, if it is a disk that was not detached.
    disk: Option<Arc<Mutex<Block>>>,
    served_by: Loop,
    subscriber: SubscriberId,
    line: Arc<IrqLine>,
    activity: Arc<Activity>,
    /// Whether there is no more than what answers the driver in the place of the device.
    is_detached: bool,
}

impl Device {
    fn shared(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        match self {
            Device::Disk(disk) => disk.clone(),
            Device::Net(net) => net.clone(),
        }
    }

    fn disk(&self) -> Option<Arc<Mutex<Block>>> {
        match self {
            Device::Disk(disk) => Some(disk.clone()),
            Device::Net(_) => None,
        }
    }

    fn served_by(&self) -> Loop {
        match self {
            Device::Disk(_) => Loop::Io,
            Device::Net(_) => Loop::Vmm,
        }
    }
}

impl Slots {
    /// `spares` for devices that work on `memory`, in a machine that has devices called `fixed`.
    pub fn new(memory: GuestMemoryMmap, fixed: Vec<String>, spares: Vec<SpareSlot>) -> Self {
        let places = spares.into_iter().map(|spare| Place { spare, ring: None, taken: None });
        let places = Places { all: places.collect(), is_closed: false };
        Slots { memory, fixed, places: Mutex::new(places) }
    }

    /// Makes what a device may need that this process will not be able to make for it any more: rings.
    /// System call filters do not see what a ring does, so that only a thread without one makes any.
    pub fn close(&self) {
        let mut places = self.lock();
        places.is_closed = true;
        for place in &mut places.all {
            // Disks do without, as they do where the host has none.
            place.ring = Ring::open().ok();
        }
    }

    /// A ring for the disk of `config`, which `kept` may be.
    pub fn ring(
        config: &DiskConfig,
        kept: Option<&mut Option<Ring>>,
    ) -> Result<Option<Ring>, Error> {
        let Some(kept) = kept else { return peripherals::open_ring(0, config) };
        match kept.take() {
            None if config.engine == DiskEngine::IoUring => {
                Err(peripherals::no_ring(0, &io::ErrorKind::Unsupported.into()))
            }
            ring => Ok(ring),
        }
    }

    /// Attaches what `open` returns under a `name` that says `field` of its configuration, and has it
    /// served by the right one of `loops`. `open` gets a ring to use if no other may be made.
    pub fn attach(
        &self,
        vm: &Arc<VmFd>,
        loops: &[EventLoop],
        (field, name): (&str, &str),
        open: impl FnOnce(&GuestMemoryMmap, Option<&mut Option<Ring>>) -> Result<Device, Error>,
    ) -> Result<Attachment, AttachError> {
        let mut places = self.lock();
        let Places { all: places, is_closed } = &mut *places;
        // Whoever has a place locked may wait for the host.
        let parted = places.iter_mut().filter(|place| {
            lock_until(&place.spare.slot, Instant::now()).is_some_and(|slot| slot.has_parted())
        });
        parted.for_each(|place| place.clear(vm, loops));
        let taken = places.iter().filter_map(Place::attached);
        if self.fixed.iter().chain(taken.map(|taken| &taken.name)).any(|other| other == name) {
            let rule = format!("must be another one: {name} is there already");
            return Err(AttachError::Config(ConfigError { field: field.to_owned(), rule }));
        }
        let spare_slots = places.len();
        let free = places.iter_mut().find(|place| place.taken.is_none());
        let place = free.ok_or(AttachError::NoSlot { spare_slots })?;

        let kept = is_closed.then_some(&mut place.ring);
        let device = open(&self.memory, kept).map_err(opened::refused)?;
        let attached = self.connect(vm, loops, place, name, &device);
        attached.inspect_err(|_| place.keep_ring(device.disk().filter(|_| *is_closed)))?;
        let SpareSlot { number, place: at, .. } = &place.spare;
        Ok(Attachment { number: *number, names: Host::device_names(*number, at) })
    }

    /// Puts `device` into `place`.
    fn connect(
        &self,
        vm: &Arc<VmFd>,
        loops: &[EventLoop],
        place: &mut Place,
        name: &str,
        device: &Device,
    ) -> Result<(), AttachError> {
        let at = &place.spare.place;
        let page = place.lock().page().clone();
        let wired = Wired::new(vm, &self.memory, at, page, name, device.shared());
        let wired = wired.map_err(AttachError::Connect)?;
        let Wired { transport, subscriber, line } = wired;
        let served = find(loops, device.served_by()).and_then(|one| one.add(Box::new(subscriber)));
        let subscriber = served.map_err(|error| {
            unwire(vm, at, &transport, &line);
            AttachError::Serve(error)
        })?;
        let activity = transport.activity().clone();
        place.lock().insert(transport);
        place.taken = Some(Taken {
            name: name.to_owned(),
            disk: device.disk(),
            served_by: device.served_by(),
            subscriber,
            line,
            activity,
            is_detached: false,
        });
        Ok(())
    }

    /// Takes the device called `name` out, and closes what it had open. A driver that has not let go of it
    /// finds one that was reset and is gone; or, if it waits for answers, is told of failures and keeps the
    /// place until it lets go.
    pub fn detach(&self, vm: &VmFd, loops: &[EventLoop], name: &str) -> Result<(), DetachError> {
        let mut places = self.lock();
        let Places { all: places, is_closed } = &mut *places;
        let is_it = |place: &&mut Place| place.attached().is_some_and(|taken| taken.name == name);
        let Some(place) = places.iter_mut().find(is_it) else {
            let is_fixed = self.fixed.iter().any(|fixed| fixed == name);
            let error = if is_fixed { DetachError::Fixed } else { DetachError::Unknown };
            return Err(error(name.to_owned()));
        };
        let deadline = Instant::now() + PATIENCE;
        let stand_in = lock_until(&place.spare.slot, deadline)
            .map_or(Err(Unsettled), |mut slot| slot.withdraw(name, deadline))
            .map_err(|Unsettled| DetachError::Busy(name.to_owned()))?;
        let disk = place.taken.as_mut().and_then(|taken| taken.disk.take());
        let disk = disk.filter(|_| *is_closed);
        match (stand_in, &mut place.taken) {
            (Some(stand_in), Some(taken)) => taken.exchange(loops, stand_in),
            _ => place.clear(vm, loops),
        }
        place.keep_ring(disk);
        Ok(())
    }

    /// The name and the counters of each device that is attached.
    pub fn activities(&self) -> Vec<(String, Arc<Activity>)> {
        let places = self.lock();
        let taken = places.all.iter().filter_map(Place::attached);
        taken.map(|taken| (taken.name.clone(), taken.activity.clone())).collect()
    }

    /// Whether there are any places.
    pub fn are_there(&self) -> bool {
        !self.lock().all.is_empty()
    }

    /// Whether a device is attached, or a driver has not let go of one that was.
    pub fn are_taken(&self) -> bool {
        self.lock().all.iter().any(|place| place.taken.is_some() && !place.lock().has_parted())
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().expect("nothing panics while it attaches a device")
    }
}

impl Place {
    /// The device in it.
    fn attached(&self) -> Option<&Taken> {
        self.taken.as_ref().filter(|taken| !taken.is_detached)
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.spare.slot.lock().expect("no device panics while it holds its lock")
    }

    /// Keeps the ring of a `disk` that is not there any more, if it had one.
    fn keep_ring(&mut self, disk: Option<Arc<Mutex<Block>>>) {
        if let Some(disk) = disk {
            let mut disk = disk.lock().expect("no device panics while it holds its lock");
            self.ring = disk.take_ring().or(self.ring.take());
        }
    }

    /// Takes out what is in it.
    fn clear(&mut self, vm: &VmFd, loops: &[EventLoop]) {
        let transport = self.lock().remove();
        if let (Some(transport), Some(taken)) = (transport, self.taken.take()) {
            unwire(vm, &self.spare.place, &transport, &taken.line);
            taken.forsake(loops);
        }
    }
}

impl Taken {
    /// Serves and keeps the device no longer.
    fn forsake(&self, loops: &[EventLoop]) {
        // A loop that is gone serves nothing any more.
        let _ = find(loops, self.served_by).and_then(|one| one.remove(self.subscriber));
    }

    /// Has `stand_in` served in the place of the device.
    fn exchange(&mut self, loops: &[EventLoop], stand_in: Subscriber) {
        self.is_detached = true;
        // Both watch the same kicks, which a loop does once only.
        self.forsake(loops);
        // As above. The kicks of the meantime are still to be seen.
        let served = find(loops, self.served_by).and_then(|one| one.add(Box::new(stand_in)));
        self.subscriber = served.unwrap_or(self.subscriber);
    }
}

fn find(loops: &[EventLoop], wanted: Loop) -> io::Result<&EventLoop> {
    let is_gone = || io::Error::other("the thread is not there");
    loops.iter().find(|one| one.kind() == wanted.kind()).ok_or_else(is_gone)
}
