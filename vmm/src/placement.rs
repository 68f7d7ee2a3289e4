//! Gives each device its place in the machine: address window, interrupt line, bus slot, event loop.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use arch::VmFd;
use arch::machine::{MmioDevice, Space};
use devices::bus::{BusBuilder, BusDevice, BusError};
use devices::interrupt::IrqLine;
use devices::listener::SocketFile;
use devices::serial::Serial;
use devices::virtio::VirtioDevice;
use devices::virtio::activity::Activity;
use devices::virtio::fs::Window;
use devices::virtio::mmio::{MMIO_WINDOW, MmioTransport};
use devices::virtio::subscriber::Subscriber;
use kvm_ioctls::IoEventAddress;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::dax::Windows;
use crate::event_loop::BoxedSubscriber;
use crate::state::Devices;
use crate::vcpu::Buses;

/// Where a driver writes the number of the queue it kicks (virtio 1.2, section 4.2.2: QueueNotify).
const QUEUE_NOTIFY: u64 = 0x50;

/// Which thread serves a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loop {
    /// Devices that answer at once.
    Vmm,
    /// Devices that may block on files, and must never delay the others.
    Io,
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
    /// KVM refused to connect an eventfd.
    #[error("connect its {what} to KVM")]
    Connect {
        /// Which eventfd.
        what: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The machine while devices are being put into it.
pub struct Placement<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemoryMmap,
    windows: AddressAllocator,
    lines: IdAllocator,
    memory_bus: BusBuilder,
    ports: BusBuilder,
    placed: Vec<MmioDevice>,
    devices: Devices,
    activities: Vec<(String, Arc<Activity>)>,
    vmm_loop: Vec<BoxedSubscriber>,
    io_loop: Vec<BoxedSubscriber>,
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
    /// To be removed when the machine ends.
    pub socket_files: Vec<SocketFile>,
    /// Through which the guest maps files.
    pub dax: Arc<[Arc<Window>]>,
}

impl<'a> Placement<'a> {
    /// An empty machine with room for devices at the addresses `windows` and on the interrupt lines
    /// `gsis`.
    pub fn new(
        vm: &'a VmFd,
        memory: &'a GuestMemoryMmap,
        windows: &Range<u64>,
        gsis: &Range<u32>,
    ) -> Result<Self, PlacementError> {
        Ok(Placement {
            vm,
            memory,
            windows: AddressAllocator::new(windows.start, windows.end - windows.start)
                .map_err(PlacementError::Full)?,
            lines: IdAllocator::new(gsis.start, gsis.end - 1).map_err(PlacementError::Full)?,
            memory_bus: BusBuilder::default(),
            ports: BusBuilder::default(),
            placed: Vec::new(),
            devices: Devices::default(),
            activities: Vec::new(),
            vmm_loop: Vec::new(),
            io_loop: Vec::new(),
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
        let window = self
            .windows
            .allocate(MMIO_WINDOW, MMIO_WINDOW, AllocPolicy::FirstMatch)
            .map_err(PlacementError::Full)?;
        let gsi = self.lines.allocate_id().map_err(PlacementError::Full)?;
        let line = self.irq_line(gsi)?;
        let transport = MmioTransport::new(self.memory.clone(), device.clone(), line)
            .map_err(PlacementError::Eventfd)?;

        let mut kicks = Vec::with_capacity(transport.kicks().len());
        let notify = IoEventAddress::Mmio(window.start() + QUEUE_NOTIFY);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            if !transport.serves_at_once(queue as usize) {
                self.vm.register_ioevent(kick, &notify, queue).map_err(|source| {
                    PlacementError::Connect { what: "queue notification", source }
                })?;
            }
            kicks.push(kick.try_clone().map_err(PlacementError::Eventfd)?);
        }
        let activity = transport.activity().clone();
        self.activities.push((name.to_owned(), activity.clone()));
        let subscriber = Box::new(Subscriber::new(name.to_owned(), kicks, device, activity));
        match served_by {
            Loop::Vmm => self.vmm_loop.push(subscriber),
            Loop::Io => self.io_loop.push(subscriber),
        }

        let base = GuestAddress(window.start());
        self.placed.push(MmioDevice { base, size: MMIO_WINDOW, gsi });
        let transport = Arc::new(Mutex::new(transport));
        self.devices.transports.push((name.to_owned(), transport.clone()));
        self.place_at(Space::Memory, base.0, MMIO_WINDOW, transport)
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
        let line = IrqLine::new().map_err(PlacementError::Eventfd)?;
        self.vm
            .register_irqfd(line.event(), gsi)
            .map_err(|source| PlacementError::Connect { what: "interrupt", source })?;
        Ok(Arc::new(line))
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
            socket_files: self.socket_files,
            dax: self.dax.finish(),
        }
    }
}
