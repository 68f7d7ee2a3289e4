//! Gives each device its place in the machine: address window, interrupt line, bus slot, event loop.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arch::machine::{MmioDevice, Space};
use arch::{Arch, Host, VmFd};
use devices::bus::{BusBuilder, BusDevice, BusError};
use devices::clock::Clock;
use devices::interrupt::IrqLine;
use devices::listener::SocketFile;
use devices::serial::Serial;
use devices::virtio::VirtioDevice;
use devices::virtio::activity::Activity;
use devices::virtio::fs::Window;
use devices::virtio::mmio::{MMIO_WINDOW, MmioTransport, RegisterPage, RegisterPages};
use devices::virtio::slot::Slot;
use devices::virtio::subscriber::Subscriber;
use kvm_ioctls::IoEventAddress;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::dax::Windows;
use crate::event_loop::BoxedSubscriber;
use crate::posted::PostedWrites;
use crate::seccomp::Kind;
use crate::state::Devices;
use crate::vcpu::Buses;

/// Where a driver writes the number of the queue it kicks (virtio 1.2, section 4.2.2: QueueNotify).
const QUEUE_NOTIFY: u64 = 0x50;

/// The largest page of a host, in bytes: one memory slot cannot end within one.
const LARGEST_PAGE: u64 = 64 << 10;

/// Where the registers of all devices are, at the start of `window`: a block for each interrupt line.
pub fn registers(window: &Range<u64>) -> Range<u64> {
    let bytes = Host::device_gsis().len() as u64 * MMIO_WINDOW;
    window.start..window.end.min(window.start + bytes.next_multiple_of(LARGEST_PAGE))
}

/// Which thread serves a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loop {
    /// Devices that answer at once.
    Vmm,
    /// Devices that may block on files, and must never delay the others.
    Io,
}

impl Loop {
    /// The kind of its thread.
    pub fn kind(self) -> Kind {
        match self {
            Loop::Vmm => Kind::Vmm,
            Loop::Io => Kind::Io,
        }
    }
}

/// Which step of placing a device failed.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// The machine is full.
    #[error("find a free address window or interrupt line (the VM has too many devices)")]
    Full(#[source] vm_allocator::Error),
    /// Two devices claim an address.
    #[error("place it on the bus")]
    Bus(#[source] BusError),
    /// The host has no eventfd left.
    #[error("create its eventfds (raise the limit of open files, ulimit -n)")]
    Eventfd(#[source] io::Error),
    /// KVM refused to connect an eventfd or the registers.
    #[error("connect its {what} to KVM")]
    Connect {
        /// What of the device.
        what: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// A place for a device that may come while the guest runs.
pub struct SpareSlot {
    /// Its number among all devices the guest is told about.
    pub number: usize,
    /// Where it is.
    pub place: MmioDevice,
    /// What the bus shows there.
    pub slot: Arc<Mutex<Slot>>,
}

/// A device that is connected to KVM, but not on the bus yet.
pub struct Wired {
    /// What the bus has to show.
    pub transport: MmioTransport,
    /// What a loop has to serve.
    pub subscriber: Subscriber,
    /// Its interrupt line.
    pub line: Arc<IrqLine>,
}

/// The machine while devices are being put into it.
pub struct Placement<'a> {
    vm: &'a Arc<VmFd>,
    posted: &'a PostedWrites,
    memory: &'a GuestMemoryMmap,
    registers: &'a RegisterPages,
    windows: AddressAllocator,
    lines: IdAllocator,
    memory_bus: BusBuilder,
    ports: BusBuilder,
    placed: Vec<MmioDevice>,
    devices: Devices,
    activities: Vec<(String, Arc<Activity>)>,
    vmm_loop: Vec<BoxedSubscriber>,
    io_loop: Vec<BoxedSubscriber>,
    spares: Vec<SpareSlot>,
    socket_files: Vec<SocketFile>,
    dax: Windows<'a>,
}

/// A machine that is complete.
pub struct Placed {
    /// The devices the guest must be told about.
    pub devices: Vec<MmioDevice>,
    /// The same devices, and those of the platform, for who wants to know where they stand.
    pub(crate) kept: Devices,
    /// What counts the activity of each virtio device, with the device's name.
    pub activities: Vec<(String, Arc<Activity>)>,
    /// The frozen buses.
    pub buses: Buses,
    /// What the `vmm` loop serves.
    pub vmm_loop: Vec<BoxedSubscriber>,
    /// What the `io` loop serves.
    pub io_loop: Vec<BoxedSubscriber>,
    /// Where devices can come while the guest runs.
    pub spares: Vec<SpareSlot>,
    /// To be removed when the machine ends.
    pub socket_files: Vec<SocketFile>,
    /// Through which the guest maps files.
    pub dax: Arc<[Arc<Window>]>,
}

impl<'a> Placement<'a> {
    /// An empty machine with room for devices whose registers are in `registers`.
    pub fn new(
        vm: &'a Arc<VmFd>,
        posted: &'a PostedWrites,
        memory: &'a GuestMemoryMmap,
        registers: &'a RegisterPages,
    ) -> Result<Self, PlacementError> {
        let gsis = Host::device_gsis();
        let windows = registers.addresses();
        let windows = AddressAllocator::new(windows.start, windows.end - windows.start);
        Ok(Placement {
            vm,
            posted,
            memory,
            registers,
            windows: windows.map_err(PlacementError::Full)?,
            lines: IdAllocator::new(gsis.start, gsis.end - 1).map_err(PlacementError::Full)?,
            memory_bus: BusBuilder::default(),
            ports: BusBuilder::default(),
            placed: Vec::new(),
            devices: Devices::default(),
            activities: Vec::new(),
            vmm_loop: Vec::new(),
            io_loop: Vec::new(),
            spares: Vec::new(),
            socket_files: Vec::new(),
            dax: Windows::new(vm, 0..0),
        })
    }

    /// Puts windows for mapped files at the guest-physical `addresses`.
    pub fn with_dax_at(mut self, addresses: Range<u64>) -> Self {
        self.dax = Windows::new(self.vm, addresses);
        self
    }

    /// The windows for mapped files.
    pub fn dax(&mut self) -> &mut Windows<'a> {
        &mut self.dax
    }

    /// The memory in which drivers place rings and buffers.
    pub fn memory(&self) -> &GuestMemoryMmap {
        self.memory
    }

    /// Places a virtio device called `name` in log lines.
    pub fn place(
        &mut self,
        name: &str,
        device: Arc<Mutex<dyn VirtioDevice>>,
        served_by: Loop,
    ) -> Result<(), PlacementError> {
        let place = self.find_place()?;
        let page = self.registers.page(place.base.0);
        let wired = Wired::new(self.vm, self.memory, &place, page, name, device)?;
        self.activities.push((name.to_owned(), wired.transport.activity().clone()));
        let subscriber = Box::new(wired.subscriber);
        match served_by {
            Loop::Vmm => self.vmm_loop.push(subscriber),
            Loop::Io => self.io_loop.push(subscriber),
        }
        wired.transport.show();
        let transport = Arc::new(Mutex::new(wired.transport));
        self.devices.transports.push((name.to_owned(), transport.clone()));
        self.place_at(Space::Memory, place.base.0, MMIO_WINDOW, transport)
    }

    /// Keeps a place free for a device that may come while the guest runs.
    pub fn reserve(&mut self) -> Result<(), PlacementError> {
        let place = self.find_place()?;
        let slot = Arc::new(Mutex::new(Slot::new(self.registers.page(place.base.0))));
        let range = place.base.0..place.base.0 + MMIO_WINDOW;
        self.memory_bus.place(range, slot.clone()).map_err(PlacementError::Bus)?;
        self.spares.push(SpareSlot { number: self.placed.len() - 1, place, slot });
        Ok(())
    }

    /// The next free window and interrupt line, which the guest is told about.
    fn find_place(&mut self) -> Result<MmioDevice, PlacementError> {
        let window = self
            .windows
            .allocate(MMIO_WINDOW, MMIO_WINDOW, AllocPolicy::FirstMatch)
            .map_err(PlacementError::Full)?;
        let gsi = self.lines.allocate_id().map_err(PlacementError::Full)?;
        let place = MmioDevice { base: GuestAddress(window.start()), size: MMIO_WINDOW, gsi };
        self.posted
            .expect_at(self.vm, &place)
            .map_err(|source| PlacementError::Connect { what: "registers", source })?;
        self.placed.push(place);
        Ok(place)
    }

    /// Places a serial port at `size` addresses from `base` on.
    pub fn place_serial(
        &mut self,
        space: Space,
        base: u64,
        size: u64,
        serial: Serial,
    ) -> Result<(), PlacementError> {
        let serial = Arc::new(Mutex::new(serial));
        self.devices.serials.push(serial.clone());
        self.place_at(space, base, size, serial)
    }

    /// Places a real-time clock at `size` addresses of memory from `base` on. Nothing of it is saved: the
    /// guest of another machine shall see what time it is then.
    pub fn place_clock(
        &mut self,
        base: u64,
        size: u64,
        clock: Clock,
    ) -> Result<(), PlacementError> {
        self.place_at(Space::Memory, base, size, Arc::new(Mutex::new(clock)))
    }

    fn place_at(
        &mut self,
        space: Space,
        base: u64,
        size: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), PlacementError> {
        let bus = match space {
            Space::Memory => &mut self.memory_bus,
            Space::Port => &mut self.ports,
        };
        bus.place(base..base + size, device).map_err(PlacementError::Bus)
    }

    /// An interrupt line that raises `gsi`.
    pub fn irq_line(&self, gsi: u32) -> Result<Arc<IrqLine>, PlacementError> {
        irq_line(self.vm, gsi)
    }

    /// Keeps `file` for as long as the machine lasts.
    pub fn keep(&mut self, file: SocketFile) {
        self.socket_files.push(file);
    }

    /// Freezes the machine.
    pub fn finish(self) -> Placed {
        Placed {
            devices: self.placed,
            kept: self.devices,
            activities: self.activities,
            buses: Buses { memory: self.memory_bus.build(), ports: self.ports.build() },
            vmm_loop: self.vmm_loop,
            io_loop: self.io_loop,
            spares: self.spares,
            socket_files: self.socket_files,
            dax: self.dax.finish(),
        }
    }
}

impl Wired {
    /// Connects `device`, called `name` in log lines, to KVM at `place`.
    pub fn new(
        vm: &Arc<VmFd>,
        memory: &GuestMemoryMmap,
        place: &MmioDevice,
        page: RegisterPage,
        name: &str,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> Result<Self, PlacementError> {
        let line = irq_line(vm, place.gsi)?;
        let transport = MmioTransport::new(memory.clone(), device.clone(), line.clone(), page)
            .map_err(PlacementError::Eventfd)?;
        let connected = connect_kicks(vm, place, &transport);
        connected.inspect_err(|_| unwire(vm, place, &transport, &line))?;
        let (kicks, activity) = (transport.kicks().clone(), transport.activity().clone());
        let subscriber = Subscriber::new(name.to_owned(), kicks, device, activity);
        Ok(Wired { transport, subscriber, line })
    }
}

/// Has KVM signal the eventfd of each queue that the driver kicks.
fn connect_kicks(
    vm: &VmFd,
    place: &MmioDevice,
    transport: &MmioTransport,
) -> Result<(), PlacementError> {
    let notify = IoEventAddress::Mmio(place.base.0 + QUEUE_NOTIFY);
    for (queue, kick) in (0u32..).zip(transport.kicks().iter()) {
        if !transport.serves_at_once(queue as usize) {
            vm.register_ioevent(kick, &notify, queue)
                .map_err(|source| PlacementError::Connect { what: "queue notification", source })?;
        }
    }
    Ok(())
}

/// Disconnects a device at `place` from KVM, however far it was connected.
pub fn unwire(vm: &VmFd, place: &MmioDevice, transport: &MmioTransport, line: &IrqLine) {
    let notify = IoEventAddress::Mmio(place.base.0 + QUEUE_NOTIFY);
    for (queue, kick) in (0u32..).zip(transport.kicks().iter()) {
        // It only fails for what is not connected.
        let _ = vm.unregister_ioevent(kick, &notify, queue);
    }
    if let Some(event) = line.event() {
        let _ = vm.unregister_irqfd(event, place.gsi);
    }
}

/// An interrupt line that raises `gsi`.
fn irq_line(vm: &Arc<VmFd>, gsi: u32) -> Result<Arc<IrqLine>, PlacementError> {
    if Host::IRQFDS_WAIT {
        return Ok(Arc::new(direct_line(vm, gsi)));
    }
    let line = IrqLine::new().map_err(PlacementError::Eventfd)?;
    if let Some(event) = line.event() {
        vm.register_irqfd(event, gsi)
            .map_err(|source| PlacementError::Connect { what: "interrupt", source })?;
    }
    Ok(Arc::new(line))
}

/// A line that whoever raises it raises by itself. It does not keep the machine alive.
fn direct_line(vm: &Arc<VmFd>, gsi: u32) -> IrqLine {
    let vm = Arc::downgrade(vm);
    // An edge within another one would be none.
    let is_raised = Mutex::new(());
    IrqLine::Direct(Box::new(move || {
        let _one = is_raised.lock().unwrap_or_else(PoisonError::into_inner);
        // A machine that is gone is not interrupted. KVM refuses lines that it does not have only.
        if let Some(vm) = vm.upgrade() {
            let _ = vm.set_irq_line(gsi, true).and_then(|()| vm.set_irq_line(gsi, false));
        }
    }))
}
