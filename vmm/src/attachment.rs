//! Disks and network interfaces that come and go while the guest runs.
//!
//! virtio-mmio has no hot-plug, so the guest is told of a few places at its start that have no device
//! yet ([`VmConfig::spare_slots`](crate::VmConfig::spare_slots)). Its driver passes them over, and looks
//! again when somebody in the guest binds it to the place.

use std::sync::{Arc, Mutex, MutexGuard};

use arch::{Arch, Host, VmFd};
use devices::interrupt::IrqLine;
use devices::virtio::VirtioDevice;
use devices::virtio::activity::Activity;
use devices::virtio::slot::Slot;
use devices::virtio::subscriber::Subscriber;
use event_manager::SubscriberId;
use vm_memory::GuestMemoryMmap;

use crate::config::ConfigError;
use crate::error::Error;
use crate::event_loop::EventLoop;
use crate::placement::{Loop, PlacementError, SpareSlot, Wired, unwire};

/// Why a device was not attached. The machine goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A value of its configuration cannot be; the field is one of the device.
    #[error(transparent)]
    Config(ConfigError),
    /// Every place is taken, or there is none. That of a disk which was detached is taken until the guest
    /// has let go of it.
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
    Serve(#[source] std::io::Error),
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
    places: Mutex<Vec<Place>>,
}

struct Place {
    spare: SpareSlot,
    taken: Option<Taken>,
}

/// What a place holds beside what its slot holds.
struct Taken {
    name: String,
    served_by: Loop,
    subscriber: SubscriberId,
    line: Arc<IrqLine>,
    activity: Arc<Activity>,
    /// Whether there is no more than what answers the driver in the place of the device.
    is_detached: bool,
}

impl Slots {
    /// `spares` for devices that work on `memory`, in a machine that has devices called `fixed`.
    pub fn new(memory: GuestMemoryMmap, fixed: Vec<String>, spares: Vec<SpareSlot>) -> Self {
        let places = spares.into_iter().map(|spare| Place { spare, taken: None }).collect();
        Slots { memory, fixed, places: Mutex::new(places) }
    }

    /// Attaches what `open` returns under a `name` that says `field` of its configuration, and has it
    /// served by the right one of `loops`.
    pub fn attach(
        &self,
        vm: &Arc<VmFd>,
        loops: &[EventLoop],
        (field, name): (&str, &str),
        served_by: Loop,
        open: impl FnOnce(&GuestMemoryMmap) -> Result<Arc<Mutex<dyn VirtioDevice>>, Error>,
    ) -> Result<Attachment, AttachError> {
        let mut places = self.lock();
        let parted = places.iter_mut().filter(|place| place.lock().has_parted());
        parted.for_each(|place| place.clear(vm, loops));
        let taken = places.iter().filter_map(Place::attached);
        if self.fixed.iter().chain(taken.map(|taken| &taken.name)).any(|other| other == name) {
            let rule = format!("must be another one: {name} is there already");
            return Err(AttachError::Config(ConfigError { field: field.to_owned(), rule }));
        }
        let spare_slots = places.len();
        let free = places.iter_mut().find(|place| place.taken.is_none());
        let place = free.ok_or(AttachError::NoSlot { spare_slots })?;

        let device = open(&self.memory).map_err(|error| match error {
            Error::Config(ConfigError { field, rule }) => {
                AttachError::Config(ConfigError { field: of_device(&field), rule })
            }
            error => AttachError::Open(Box::new(error)),
        })?;
        let SpareSlot { number, place: at, .. } = &place.spare;
        let page = place.lock().page().clone();
        let wired = Wired::new(vm, &self.memory, at, page, name, device);
        let wired = wired.map_err(AttachError::Connect)?;
        let Wired { transport, subscriber, line } = wired;
        let served = find(loops, served_by).and_then(|one| one.add(Box::new(subscriber)));
        let subscriber = served.map_err(|error| {
            unwire(vm, at, &transport, &line);
            AttachError::Serve(error)
        })?;
        let activity = transport.activity().clone();
        place.lock().insert(transport);
        let attachment = Attachment { number: *number, names: Host::device_names(*number, at) };
        let name = name.to_owned();
        place.taken =
            Some(Taken { name, served_by, subscriber, line, activity, is_detached: false });
        Ok(attachment)
    }

    /// Takes the device called `name` out, and closes what it had open. A driver that has not let go of it
    /// finds one that was reset and is gone; or, if it waits for answers, is told of failures and keeps the
    /// place until it lets go.
    pub fn detach(&self, vm: &VmFd, loops: &[EventLoop], name: &str) -> Result<(), DetachError> {
        let mut places = self.lock();
        let is_it = |place: &&mut Place| place.attached().is_some_and(|taken| taken.name == name);
        let Some(place) = places.iter_mut().find(is_it) else {
            let is_fixed = self.fixed.iter().any(|fixed| fixed == name);
            let error = if is_fixed { DetachError::Fixed } else { DetachError::Unknown };
            return Err(error(name.to_owned()));
        };
        let stand_in = place.lock().withdraw(name);
        match (stand_in, &mut place.taken) {
            (Some(stand_in), Some(taken)) => taken.exchange(loops, stand_in),
            _ => place.clear(vm, loops),
        }
        Ok(())
    }

    /// The name and the counters of each device that is attached.
    pub fn activities(&self) -> Vec<(String, Arc<Activity>)> {
        let places = self.lock();
        let taken = places.iter().filter_map(Place::attached);
        taken.map(|taken| (taken.name.clone(), taken.activity.clone())).collect()
    }

    /// Whether a device is attached, or a driver has not let go of one that was.
    pub fn are_taken(&self) -> bool {
        self.lock().iter().any(|place| place.taken.is_some() && !place.lock().has_parted())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Place>> {
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

/// The field of a device that `field` names as one of a whole machine: `nets[0].tap` is `tap`.
pub fn of_device(field: &str) -> String {
    field.rsplit_once("].").map_or(field, |(_, field)| field).to_owned()
}

fn find(loops: &[EventLoop], wanted: Loop) -> std::io::Result<&EventLoop> {
    let is_gone = || std::io::Error::other("the thread is not there");
    loops.iter().find(|one| one.kind() == wanted.kind()).ok_or_else(is_gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_a_machine_becomes_one_of_the_device() {
        assert_eq!(of_device("nets[0].receive_limit.bytes_burst"), "receive_limit.bytes_burst");
        assert_eq!(of_device("tap"), "tap");
    }
}
