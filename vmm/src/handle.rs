//! A running virtual machine, as every thread of its process sees it.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arch::{Arch, Host, Kvm, VmFd};
use devices::listener::SocketFile;
use devices::virtio::balloon::Host as BalloonHost;
use devices::virtio::fs::Changes;
use devices::virtio::mem::Host as MemHost;
use devices::virtio::vsock::Host as VsockHost;

use crate::attachment::{AttachError, Attachment, DetachError, Device, Slots};
use crate::config::{ConfigError, DiskConfig, NetConfig};
use crate::console::ConsoleLog;
use crate::control::{Control, Exit};
use crate::error::Error;
use crate::event_loop::{BoxedSubscriber, EventLoop};
use crate::memory::{GuestRam, MemoryLayout};
use crate::metrics::{DeviceCounts, Metrics, Record};
use crate::opened::{self, Opened};
use crate::peripherals::{self, Ends};
use crate::processors::{GrantError, Processors};
use crate::seccomp::Kind;
use crate::state::{Devices, MachineState, Shape, Unsaved};

/// A running virtual machine; dropping it stops the guest and joins every thread.
///
/// The methods with `&self` may be called from any thread, in any order, also after the end.
pub struct VmHandle {
    pub(crate) control: Arc<Control>,
    pub(crate) processors: Processors,
    pub(crate) console: ConsoleLog,
    pub(crate) ends: Ends,
    pub(crate) record: Record,
    pub(crate) slots: Slots,
    /// Stopped before guest RAM goes: devices work on it.
    pub(crate) loops: Vec<EventLoop>,
    /// The threads that serve the sockets cannot reach their files.
    pub(crate) _socket_files: Vec<SocketFile>,
    pub(crate) devices: Devices,
    pub(crate) shape: Shape,
    pub(crate) kvm: Kvm,
    pub(crate) board: <Host as Arch>::Board,
    /// Closed after the vCPU threads are gone, and before guest RAM goes.
    pub(crate) vm: Arc<VmFd>,
    pub(crate) ram: GuestRam,
}

impl VmHandle {
    /// Stops the guest's processors; returns once none of them runs. Devices go on, until
    /// [`VmHandle::save`].
    pub fn pause(&self) {
        self.control.pause();
    }

    /// Like [`VmHandle::pause`], but gives up after `patience` and lets the guest go on: a processor may
    /// wait for whoever reads the guest's output. Returns whether the guest is paused.
    pub fn pause_within(&self, patience: Duration) -> bool {
        self.control.pause_within(patience)
    }

    /// Lets a paused guest go on.
    pub fn resume(&self) {
        self.devices.resume(&self.loops);
        self.control.resume();
    }

    /// Says where the paused machine stands, so that [`crate::Vmm::restore`] can build another one
    /// that goes on with its memory. All of the machine stands still from here on: the devices, too,
    /// until it is resumed. Then its memory changes, and the state is of no use any more; so drop the
    /// handle, or copy the memory first. No method of a host's end may be called meanwhile.
    ///
    /// Fails unless the machine is paused and all that its guest writes is kept in a file.
    pub fn save(&self) -> Result<MachineState, Error> {
        let no_file = |(what, field)| Err(Error::NoMemoryFile { what, field });
        if self.ram.file().is_none() {
            return no_file(("its memory", "memory.backing"));
        }
        self.save_all(|_| Ok(()))
    }

    /// Like [`VmHandle::save`], for a machine that has its memory in no file: `keep` is told where it
    /// stands and copies the memory to one, so that any number of machines can go on from there, as can
    /// this one once it is resumed.
    ///
    /// Fails unless the machine is paused and nothing is plugged into its memory.
    pub fn save_with(
        &self,
        keep: impl FnOnce(&MachineState, &MemoryLayout) -> io::Result<()>,
    ) -> Result<MachineState, Error> {
        if !self.ram.is_anonymous() {
            return Err(Error::Save(Unsaved::InFile));
        }
        if self.ends.pluggable.as_ref().is_some_and(|pluggable| pluggable.plugged_mib() != 0) {
            return Err(Error::Save(Unsaved::Grown));
        }
        self.save_all(|state| keep(state, &self.ram.layout()).map_err(Error::CopyMemory))
    }

    /// Says where the machine stands; once it stands still, `keep` keeps its memory.
    fn save_all(
        &self,
        keep: impl FnOnce(&MachineState) -> Result<(), Error>,
    ) -> Result<MachineState, Error> {
        let no_file = |(what, field)| Err(Error::NoMemoryFile { what, field });
        if self.shape.has_private_pmem {
            return no_file(("what it writes to persistent memory", "pmem.read_only"));
        }
        if self.shape.has_window {
            return no_file(("what it has mapped through a window", "shares.dax_mib"));
        }
        if self.slots.are_taken() {
            return Err(Error::Save(Unsaved::Attached));
        }
        let save = || {
            let state = self.save_paused()?;
            keep(&state)?;
            Ok(state)
        };
        self.control.while_paused(save).map_err(Error::Save)?
    }

    fn save_paused(&self) -> Result<MachineState, Error> {
        // What the guest wrote is a part of where its devices stand.
        self.processors.carry_out_writes();
        // First, because what they finish now interrupts the guest.
        let devices = self.devices.save(&self.loops);
        let failed = |step| move |source| Error::Arch { step, source };
        let vcpus = self.processors.save(&self.kvm).map_err(failed("save a vCPU"))?;
        let board = Host::save_board(&self.board, &self.vm).map_err(failed("save the machine"))?;
        Ok(MachineState::new(self.shape, vcpus, board, devices))
    }

    /// The file that the guest's memory is kept in, if it is; what the guest writes is there at once.
    /// Not for a machine that went on privately from a file.
    pub fn memory_file(&self) -> Option<&File> {
        self.ram.file()
    }

    /// Ends the VM as [`Exit::Stopped`], unless it ended before.
    pub fn stop(&self) {
        self.control.end(Exit::Stopped);
    }

    /// Starts the threads that serve devices: each a loop of its kind, for its subscribers.
    pub(crate) fn start_loops(
        &mut self,
        loops: Vec<(Kind, Vec<BoxedSubscriber>)>,
    ) -> Result<(), Error> {
        for (kind, subscribers) in loops {
            let started = EventLoop::start(kind, subscribers, self.processors.confinement());
            let failed = |source| Error::Start { what: "an event loop", source };
            self.loops.push(started.map_err(failed)?);
        }
        Ok(())
    }

    /// Has the calling thread, which starts the machine, give up all but system calls.
    pub(crate) fn give_up_privileges(&self) -> io::Result<()> {
        if self.slots.are_there() {
            self.slots.close();
        }
        self.processors.confinement().give_up_privileges()
    }

    /// Leaves the calling thread, which has started the machine, the system calls that controlling it takes.
    pub(crate) fn filter_this_thread(&self) -> io::Result<()> {
        let can_grow = self.slots.are_there() || self.processors.count() < self.shape.most_vcpus;
        let kind = if can_grow { Kind::Growing } else { Kind::Main };
        self.processors.confinement().filter(kind)
    }

    /// A descriptor that is readable once the VM has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.control.ended()
    }

    /// Whether the VM has ended.
    pub fn has_ended(&self) -> bool {
        self.control.has_ended()
    }

    /// Blocks until the VM has ended and says how.
    pub fn outcome(&self) -> Exit {
        self.control.outcome()
    }

    /// Blocks until the VM has ended, joins every thread and says how it ended.
    pub fn wait(self) -> Exit {
        self.control.outcome()
    }

    /// How many vCPUs the guest may use: those it started with, and those it was granted.
    pub fn vcpus(&self) -> u8 {
        self.processors.count()
    }

    /// Grants the guest vCPUs until it has `count`, at least what it has and at most what the
    /// configuration allows. They are idle until the guest brings them online, which is up to an agent
    /// there. Not for a thread of a device.
    pub fn grant_vcpus(&self, count: u8) -> Result<(), GrantError> {
        self.processors.grant(&self.kvm, &self.vm, count)
    }

    /// Attaches a disk to the running machine: opens it, and puts it into a free place. The guest's
    /// driver has to be bound to the place then. Not for a thread of a device.
    pub fn attach_disk(&self, config: &DiskConfig) -> Result<Attachment, AttachError> {
        self.put_disk(config, || Opened::of_disk(config))
    }

    /// The same with a disk that [`Opened::disk`] opened, or could not, may be in another process.
    pub fn attach_opened_disk(
        &self,
        config: &DiskConfig,
        opened: Result<Opened, ConfigError>,
    ) -> Result<Attachment, AttachError> {
        self.put_disk(config, || opened.map_err(Error::from))
    }

    fn put_disk(
        &self,
        config: &DiskConfig,
        open: impl FnOnce() -> Result<Opened, Error>,
    ) -> Result<Attachment, AttachError> {
        config.validate().map_err(|error| opened::refused(error.into()))?;
        let name = peripherals::disk_name(&config.id);
        self.processors.carry_out_writes();
        self.slots.attach(&self.vm, &self.loops, ("id", &name), |_, kept| {
            let ring = || Slots::ring(config, kept);
            let disk = peripherals::build_disk(config, open()?, ring)?;
            Ok(Device::Disk(Arc::new(Mutex::new(disk))))
        })
    }

    /// Takes an attached disk away, whether or not the guest has let go of it. Waits for the requests
    /// that are being served, two seconds at most; all others fail, as do those that come until the guest lets
    /// go of the disk. Not for a thread of a device.
    pub fn detach_disk(&self, id: &str) -> Result<(), DetachError> {
        self.slots.detach(&self.vm, &self.loops, &peripherals::disk_name(id))
    }

    /// Attaches a network interface, as [`VmHandle::attach_disk`] does a disk.
    pub fn attach_net(&self, config: &NetConfig) -> Result<Attachment, AttachError> {
        self.put_net(config, || Opened::of_net(0, config))
    }

    /// The same with an interface that [`Opened::net`] opened, or could not, may be in another process.
    pub fn attach_opened_net(
        &self,
        config: &NetConfig,
        opened: Result<Opened, ConfigError>,
    ) -> Result<Attachment, AttachError> {
        self.put_net(config, || opened.map_err(Error::from))
    }

    fn put_net(
        &self,
        config: &NetConfig,
        open: impl FnOnce() -> Result<Opened, Error>,
    ) -> Result<Attachment, AttachError> {
        config.validate().map_err(|error| opened::refused(error.into()))?;
        let name = peripherals::net_name(&config.tap);
        self.processors.carry_out_writes();
        self.slots.attach(&self.vm, &self.loops, ("tap", &name), |memory, _| {
            let net = peripherals::build_net(0, config, open()?, memory)?;
            Ok(Device::Net(Arc::new(Mutex::new(net))))
        })
    }

    /// Takes the attached network interface on `tap` away, as [`VmHandle::detach_disk`] does a disk. Only one
    /// with several queue pairs keeps its place until the guest lets go of it.
    pub fn detach_net(&self, tap: &str) -> Result<(), DetachError> {
        self.slots.detach(&self.vm, &self.loops, &peripherals::net_name(tap))
    }

    /// The last lines the guest printed on its consoles: at most 8 KiB, without control characters.
    pub fn console_tail(&self) -> String {
        self.console.tail()
    }

    /// The host's end of the socket device, if the VM has one.
    pub fn vsock(&self) -> Option<&VsockHost> {
        self.ends.vsock.as_ref()
    }

    /// What others change in the first shared directory that is told of.
    pub fn changes(&self) -> Option<&Changes> {
        self.ends.changes.as_deref()
    }

    /// The host's end of the memory balloon, if the VM has one.
    pub fn balloon(&self) -> Option<&BalloonHost> {
        self.ends.balloon.as_ref()
    }

    /// The host's end of the memory that can be plugged in, if the VM has any.
    pub fn pluggable_memory(&self) -> Option<&MemHost> {
        self.ends.pluggable.as_ref()
    }

    /// Tells the guest how large the terminal of its console is, in characters; 0 is unknown. A
    /// serial port has no way to tell it.
    pub fn resize_console(&self, columns: u16, rows: u16) {
        if let Some(console) = &self.ends.console {
            let mut console = console.lock().expect("no device panics while it holds its lock");
            console.resize(columns, rows);
        }
    }

    /// What the VM did so far.
    pub fn metrics(&self) -> Metrics {
        let first_entry_ns = self.control.first_entry_ns();
        let mut metrics = Metrics { first_entry_ns, ..self.record.metrics() };
        for (name, activity) in self.slots.activities() {
            metrics.devices.insert(name, DeviceCounts::of(&activity));
        }
        self.processors.add_to(&mut metrics.exits);
        metrics
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        self.control.end(Exit::Stopped);
        self.processors.join();
        self.loops.clear();
    }
}
