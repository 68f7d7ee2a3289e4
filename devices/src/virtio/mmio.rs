//! The virtio-mmio register block: a driver finds, negotiates with and starts a device through it
//! (virtio 1.2, section 4.2; the modern interface only).

mod page;
mod shared;
mod state;
mod withdrawal;
mod words;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_SEL, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::activity::Activity;
use super::complaints::Complaints;
use super::config_space::ConfigSpace;
use super::queue::VirtQueue;
use super::state::Position;
use super::{Activation, VirtioDevice};
use crate::bus::BusDevice;
use crate::interrupt::{Interrupt, IrqLine};

pub use self::page::{Publish, RegisterPage, RegisterPages};
use self::shared::Shared;
pub use self::state::TransportState;
pub use self::withdrawal::{Unsettled, lock_until};
use self::words::{set_high, set_low, word, word_shift};

/// Size of a device's register block, in bytes: one page, so that it can be mapped alone.
pub const MMIO_WINDOW: u64 = 0x1000;

/// Room for the configuration space of a device, in bytes: more than any has.
const CONFIG_BYTES: usize = 0x100;

/// "virt", read as a little-endian number.
pub(super) const MAGIC: u32 = 0x7472_6976;
/// The register layout since virtio 1.0.
pub(super) const VERSION: u32 = 2;
/// "CRCL", read as a little-endian number.
const VENDOR: u32 = 0x4c43_5243;
/// What length and base of a shared memory region that does not exist read as (virtio 1.2, section
/// 4.2.2).
const NO_REGION: u64 = u64::MAX;

/// What every device can do because its ring code can.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Status bits the driver sets; DEVICE_NEEDS_RESET is the device's.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// A virtio device behind its memory-mapped registers.
pub struct MmioTransport {
    memory: GuestMemoryMmap,
    /// Lock order: whoever holds the transport may lock the device, never the other way round.
    device: Arc<Mutex<dyn VirtioDevice>>,
    shared: Arc<Shared>,
    kicks: Arc<[EventFd]>,
    device_type: u32,
    device_features: u64,
    registers: Registers,
    complaints: Complaints,
}

/// What the driver wrote and may read back; plain data.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    region_select: u32,
    queues: Vec<QueueRegisters>,
}

/// Where the driver placed one queue (virtio 1.2, section 4.2.2).
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct QueueRegisters {
    max_size: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// Why a driver could not start the device.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("size {size} of queue {queue} is not a power of two up to {max}")]
    Size { queue: u16, size: u32, max: u16 },
    #[error("{ring} of queue {queue} at {address:#x} is misaligned or not in guest memory")]
    Ring { queue: u16, ring: &'static str, address: u64 },
    #[error("device refused: {0}")]
    Device(#[from] super::ActivateError),
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        Registers {
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            region_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueRegisters::new(size)).collect(),
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }

    fn set_driver_features(&mut self, value: u32) {
        if let Some(shift) = word_shift(self.driver_features_select) {
            let kept = self.driver_features & !(u64::from(u32::MAX) << shift);
            self.driver_features = kept | u64::from(value) << shift;
        }
    }

    /// Stores a register of the selected queue. A ready queue is in use and keeps its place.
    fn set_queue(&mut self, register: u32, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if queue.ready && register != VIRTIO_MMIO_QUEUE_READY {
            return;
        }
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 == 1,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        QueueRegisters {
            max_size,
            size: max_size.into(),
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }

    /// The queue the registers describe, checked: its rings are aligned and in guest memory.
    fn build(
        &self,
        index: u16,
        event_idx: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<Queue, StartError> {
        let mut queue = Queue::new(self.max_size).expect("a device's queue sizes are valid");
        if !self.ready {
            return Ok(queue);
        }
        let size = u16::try_from(self.size).unwrap_or(0);
        queue.try_set_size(size).map_err(|_| StartError::Size {
            queue: index,
            size: self.size,
            max: self.max_size,
        })?;
        let size = usize::from(size);
        let place = |ring, address, bytes, aligned: bool| {
            let inside = address != 0 && memory.check_range(GuestAddress(address), bytes);
            if aligned && inside {
                return Ok(());
            }
            Err(StartError::Ring { queue: index, ring, address })
        };
        // The sizes of section 2.7, with the event index behind each ring.
        let aligned = queue.try_set_desc_table_address(GuestAddress(self.descriptors)).is_ok();
        place("descriptor table", self.descriptors, 16 * size, aligned)?;
        let aligned = queue.try_set_avail_ring_address(GuestAddress(self.available)).is_ok();
        place("available ring", self.available, 6 + 2 * size, aligned)?;
        let aligned = queue.try_set_used_ring_address(GuestAddress(self.used)).is_ok();
        place("used ring", self.used, 6 + 8 * size, aligned)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

impl MmioTransport {
    /// Puts `device` behind registers that are read in `page`, for a driver whose memory is `memory` and
    /// which listens to `irq`.
    pub fn new(
        memory: GuestMemoryMmap,
        device: Arc<Mutex<dyn VirtioDevice>>,
        irq: Arc<IrqLine>,
        page: RegisterPage,
    ) -> io::Result<Self> {
        let traits = device.lock().expect("a fresh device does not panic").traits();
        let kicks = traits
            .queue_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        Ok(MmioTransport {
            memory,
            device,
            shared: Arc::new(Shared::new(irq, page)),
            kicks,
            device_type: traits.device_type,
            device_features: traits.features | RING_FEATURES,
            registers: Registers::new(traits.queue_sizes),
            complaints: Complaints::of(format!("virtio device type {}", traits.device_type)),
        })
    }

    /// Lets the driver find the device: until then it reads what there was before. To be called once.
    pub fn show(&self) {
        let page = self.shared.page();
        page.set(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
        page.set(VIRTIO_MMIO_VERSION, VERSION);
        page.set(VIRTIO_MMIO_DEVICE_ID, self.device_type);
        page.set(VIRTIO_MMIO_VENDOR_ID, VENDOR);
        self.show_selected();
        self.show_region();
        let mut config = [0; CONFIG_BYTES];
        let mut device = self.lock_device();
        device.read_config(0, &mut config);
        page.set_config(&config);
        device.show_config_in(ConfigSpace::of(page.clone()));
    }

    /// Shows the words of the feature set and of the queue that are selected.
    fn show_selected(&self) {
        let (page, registers) = (self.shared.page(), &self.registers);
        let features = word(self.device_features, registers.device_features_select);
        page.set(VIRTIO_MMIO_DEVICE_FEATURES, features);
        let queue = registers.queue();
        page.set(VIRTIO_MMIO_QUEUE_NUM_MAX, queue.map_or(0, |queue| queue.max_size.into()));
        page.set(VIRTIO_MMIO_QUEUE_READY, queue.map_or(0, |queue| queue.ready.into()));
    }

    /// Shows length and base of the selected shared memory region.
    fn show_region(&self) {
        let region = self.lock_device().shared_memory(self.registers.region_select);
        let (length, base) = region
            .map_or((NO_REGION, NO_REGION), |region| (region.end - region.start, region.start));
        for (register, value) in [
            (VIRTIO_MMIO_SHM_LEN_LOW, word(length, 0)),
            (VIRTIO_MMIO_SHM_LEN_HIGH, word(length, 1)),
            (VIRTIO_MMIO_SHM_BASE_LOW, word(base, 0)),
            (VIRTIO_MMIO_SHM_BASE_HIGH, word(base, 1)),
        ] {
            self.shared.page().set(register, value);
        }
    }

    /// One eventfd per queue, to be signalled when the driver kicks that queue. The hypervisor
    /// does it by itself if it was told so; else a write to the register does.
    pub fn kicks(&self) -> &Arc<[EventFd]> {
        &self.kicks
    }

    /// What counts this device's activity.
    pub fn activity(&self) -> &Arc<Activity> {
        self.shared.activity()
    }

    fn lock_device(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        self.device.lock().expect("no device panics while it holds its lock")
    }

    fn write_register(&mut self, register: u32, value: u32) {
        let status = self.shared.status();
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            // What was agreed on stays (virtio 1.2, section 3.1.1, step 5).
            VIRTIO_MMIO_DRIVER_FEATURES if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 => {
                self.registers.set_driver_features(value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            VIRTIO_MMIO_SHM_SEL => self.registers.region_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value as usize),
            VIRTIO_MMIO_INTERRUPT_ACK => self.shared.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ if status & VIRTIO_CONFIG_S_DRIVER_OK == 0 => {
                self.registers.set_queue(register, value);
            }
            _ => {}
        }
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL | VIRTIO_MMIO_QUEUE_SEL | VIRTIO_MMIO_QUEUE_READY => {
                self.show_selected();
            }
            VIRTIO_MMIO_SHM_SEL => self.show_region(),
            _ => {}
        }
    }

    /// Whether kicks of queue `index` must come here, and not go to its eventfd.
    pub fn serves_at_once(&self, index: usize) -> bool {
        self.lock_device().serves_at_once(index)
    }

    fn kick(&mut self, index: usize) {
        let Some(kick) = self.kicks.get(index) else { return };
        let mut device = self.lock_device();
        if !device.serves_at_once(index) {
            // The only failure is a counter at its maximum, and then the kick is pending anyway.
            let _ = kick.write(1);
        } else if let Err(error) = device.queue_ready(index) {
            // The queue has already told the driver that the device needs a reset.
            device.reset();
            drop(device);
            self.complaints.add(&format_args!("stopped until it is reset: {error}"));
        }
    }

    /// Walks the states of virtio 1.2, section 2.1: a driver adds bits in their order, or starts
    /// over. Steps out of order are ignored, and the driver sees that when it reads the status back.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & DRIVER_STATUS;
        let current = self.shared.status() & DRIVER_STATUS;
        if current & !value != 0 {
            self.complaints.add(&"driver cleared a status bit");
            return;
        }
        for bit in [
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
            VIRTIO_CONFIG_S_FAILED,
        ] {
            if value & !current & bit != 0 && self.may_set(bit) {
                self.shared.page().add_bits(VIRTIO_MMIO_STATUS, bit);
                if bit == VIRTIO_CONFIG_S_DRIVER_OK {
                    self.start(&[]);
                }
            }
        }
    }

    fn may_set(&self, bit: u32) -> bool {
        let status = self.shared.status();
        let has = |bits| status & bits == bits;
        match bit {
            VIRTIO_CONFIG_S_DRIVER => has(VIRTIO_CONFIG_S_ACKNOWLEDGE),
            VIRTIO_CONFIG_S_FEATURES_OK => has(VIRTIO_CONFIG_S_DRIVER) && self.features_fit(),
            VIRTIO_CONFIG_S_DRIVER_OK => {
                has(VIRTIO_CONFIG_S_FEATURES_OK) && !has(VIRTIO_CONFIG_S_FAILED)
            }
            _ => true,
        }
    }

    fn features_fit(&self) -> bool {
        let features = self.registers.driver_features;
        features & !self.device_features == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// Hands the queues to the device, which goes on in each at its position, or at the start if there is
    /// none, and lets it look for what came before it was ready.
    fn start(&mut self, positions: &[Position]) {
        if let Err(error) = self.activate(positions) {
            self.shared.needs_reset();
            self.complaints.add(&error);
            return;
        }
        self.kick_all();
    }

    /// Has the event loop look at every queue.
    fn kick_all(&self) {
        for kick in &*self.kicks {
            // The only failure is a counter at its maximum, and then the kick is pending anyway.
            let _ = kick.write(1);
        }
    }

    /// Starts the device; it goes on in each queue at its position, or at the start if there is none.
    fn activate(&self, positions: &[Position]) -> Result<(), StartError> {
        let features = self.registers.driver_features;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = (0u16..)
            .zip(&self.registers.queues)
            .map(|(index, registers)| {
                let mut queue = registers.build(index, event_idx, &self.memory)?;
                let position = positions.get(usize::from(index)).copied().unwrap_or_default();
                queue.set_next_avail(position.next_available);
                queue.set_next_used(position.next_used);
                let (memory, kicks) = (self.memory.clone(), self.kicks.clone());
                let (interrupt, activity) = (self.shared.clone(), self.shared.activity().clone());
                Ok(VirtQueue::new(index, queue, memory, interrupt, kicks, activity))
            })
            .collect::<Result<_, StartError>>()?;
        let interrupt = self.shared.clone();
        Ok(self.lock_device().activate(Activation { queues, features, interrupt })?)
    }

    /// Makes the device idle, and forgets what the driver wrote (virtio 1.2, section 2.4).
    pub(super) fn reset(&mut self) {
        let mut device = self.lock_device();
        device.reset();
        // Still under the device's lock, so that no thread of the device reports to the next driver
        // what it saw with the last one.
        self.shared.forget();
        drop(device);
        for queue in &mut self.registers.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        self.registers.driver_features = 0;
        self.show_selected();
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.shared.page().read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            return self.lock_device().write_config(offset, data);
        }
        if let (Ok(value), Ok(register)) = (data.try_into(), u32::try_from(offset)) {
            self.write_register(register, u32::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
    use virtio_bindings::virtio_mmio::{
        VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
        VIRTIO_MMIO_INTERRUPT_STATUS,
    };
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::queue::{QueueError, Verdict};
    use crate::virtio::state::RestoreError;
    use crate::virtio::testing::memory;
    use crate::virtio::{ActivateError, DeviceTraits};

    const ACKNOWLEDGE: u32 = 1;
    const DRIVER: u32 = 2;
    const DRIVER_OK: u32 = 4;
    const FEATURES_OK: u32 = 8;
    const NEEDS_RESET: u32 = 64;
    const FAILED: u32 = 128;
    const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

    /// A feature of the device type, and one it does not have.
    const OFFERED: u64 = 1 << 3;
    const UNKNOWN: u64 = 1 << 4;
    const VERSION_1: u64 = 1 << 32;

    /// Shared memory of the device.
    const REGION: Range<u64> = 0x5_8000_0000..0x9_8020_0000;

    /// Remembers what the transport does with it.
    #[derive(Default)]
    struct Probe {
        active: Option<Activation>,
        resets: usize,
        config: Vec<u8>,
        at_once: bool,
        served: usize,
    }

    impl VirtioDevice for Probe {
        fn traits(&self) -> DeviceTraits {
            DeviceTraits { device_type: VIRTIO_ID_RNG, features: OFFERED, queue_sizes: &[16, 8] }
        }

        fn read_config(&self, offset: u64, data: &mut [u8]) {
            crate::virtio::copy_config(b"config", offset, data);
        }

        fn write_config(&mut self, _offset: u64, data: &[u8]) {
            self.config = data.to_vec();
        }

        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            self.active = Some(activation);
            Ok(())
        }

        fn reset(&mut self) {
            self.active = None;
            self.resets += 1;
        }

        fn queue_ready(&mut self, _index: usize) -> Result<(), QueueError> {
            self.served += 1;
            self.active
                .as_mut()
                .map_or(Ok(()), |active| active.queues[0].drain(|_, _| Verdict::Used(0)))
        }

        fn serves_at_once(&self, index: usize) -> bool {
            self.at_once && index == 0
        }

        fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
            let queues = self.active.iter().flat_map(|active| &active.queues);
            Ok(queues.map(|queue| queue.position(0)).collect())
        }

        fn shared_memory(&self, id: u32) -> Option<Range<u64>> {
            (id == 7).then_some(REGION)
        }
    }

    fn page() -> RegisterPage {
        RegisterPage::alone().unwrap()
    }

    struct Guest {
        device: Arc<Mutex<Probe>>,
        transport: MmioTransport,
        irq: Arc<IrqLine>,
        memory: GuestMemoryMmap,
    }

    impl Guest {
        fn new() -> Self {
            let memory = memory();
            let device = Arc::new(Mutex::new(Probe::default()));
            let irq = Arc::new(IrqLine::new().unwrap());
            let transport =
                MmioTransport::new(memory.clone(), device.clone(), irq.clone(), page()).unwrap();
            transport.show();
            Guest { device, transport, irq, memory }
        }

        fn read(&mut self, register: u32) -> u32 {
            let mut data = [0xee; 4];
            self.transport.read(register.into(), &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&mut self, register: u32, value: u32) {
            self.transport.write(register.into(), &value.to_le_bytes());
        }

        fn status(&mut self) -> u32 {
            self.read(VIRTIO_MMIO_STATUS)
        }

        fn set_status(&mut self, value: u32) -> u32 {
            self.write(VIRTIO_MMIO_STATUS, value);
            self.status()
        }

        /// Everything up to FEATURES_OK.
        fn negotiate(&mut self, features: u64) -> u32 {
            self.set_status(ACKNOWLEDGE);
            self.set_status(ACKNOWLEDGE | DRIVER);
            for (select, value) in [(0, word(features, 0)), (1, word(features, 1))] {
                self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
                self.write(VIRTIO_MMIO_DRIVER_FEATURES, value);
            }
            self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        }

        fn place_queue(&mut self, index: u32, size: u32, addresses: [u64; 3]) {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index);
            self.write(VIRTIO_MMIO_QUEUE_NUM, size);
            let registers = [
                VIRTIO_MMIO_QUEUE_DESC_LOW,
                VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                VIRTIO_MMIO_QUEUE_USED_LOW,
            ];
            for (register, address) in registers.into_iter().zip(addresses) {
                self.write(register, word(address, 0));
                self.write(register + 4, word(address, 1));
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }

        /// What the device tells its driver through, once it runs.
        fn interrupt(&self) -> Arc<dyn Interrupt> {
            self.device.lock().unwrap().active.as_ref().unwrap().interrupt.clone()
        }

        /// A device that runs with one queue.
        fn running() -> Self {
            let mut guest = Guest::new();
            guest.negotiate(VERSION_1);
            guest.place_queue(0, 16, [0x1000, 0x2000, 0x3000]);
            assert_eq!(guest.set_status(RUNNING), RUNNING);
            guest
        }

        /// The status after a start with queue 0 like this.
        fn started_with(size: u32, addresses: [u64; 3]) -> u32 {
            let mut guest = Guest::new();
            guest.negotiate(VERSION_1);
            guest.place_queue(0, size, addresses);
            guest.set_status(RUNNING)
        }

        fn is_active(&self) -> bool {
            self.device.lock().unwrap().active.is_some()
        }
    }

    #[test]
    fn a_queue_that_is_served_at_once_needs_no_eventfd() {
        let mut guest = Guest::running();
        guest.transport.kicks().iter().for_each(|kick| _ = kick.read());
        guest.device.lock().unwrap().at_once = true;

        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);

        assert_eq!(guest.device.lock().unwrap().served, 1);
        let kicked = guest.transport.kicks().iter().map(|kick| kick.read().is_ok());
        assert_eq!(kicked.collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn a_broken_queue_that_is_served_at_once_resets_the_device() {
        let mut guest = Guest::running();
        guest.device.lock().unwrap().at_once = true;

        guest.memory.write_obj(1000_u16, GuestAddress(0x2002)).unwrap();
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);

        assert!(!guest.is_active());
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
    }

    #[test]
    fn a_device_is_not_there_before_it_is_shown() {
        let memory = memory();
        let device = Arc::new(Mutex::new(Probe::default()));
        let irq = Arc::new(IrqLine::new().unwrap());
        let page = page();
        let transport = MmioTransport::new(memory, device, irq, page.clone()).unwrap();
        assert_eq!(page.get(VIRTIO_MMIO_DEVICE_ID), 0);

        transport.show();

        assert_eq!(page.get(VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_RNG);
        let mut config = [0xff; 8];
        page.read(VIRTIO_MMIO_CONFIG.into(), &mut config);
        assert_eq!(&config, b"config\0\0");
    }

    #[test]
    fn the_device_introduces_itself() {
        let mut guest = Guest::new();
        assert_eq!(guest.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
        assert_eq!(guest.read(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_RNG);
        assert_eq!(guest.read(VIRTIO_MMIO_VENDOR_ID).to_le_bytes(), *b"CRCL");
    }

    #[test]
    fn features_are_read_word_by_word() {
        let mut guest = Guest::new();
        let mut word_of = |select| {
            guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            guest.read(VIRTIO_MMIO_DEVICE_FEATURES)
        };
        assert_eq!(word_of(0), 1 << 3 | 1 << 28 | 1 << 29);
        assert_eq!(word_of(1), 1);
        assert_eq!(word_of(2), 0);
        assert_eq!(word_of(u32::MAX), 0);
    }

    #[test]
    fn a_driver_without_version_1_is_refused() {
        assert_eq!(Guest::new().negotiate(OFFERED) & FEATURES_OK, 0);
    }

    #[test]
    fn a_feature_that_was_not_offered_is_refused() {
        assert_eq!(Guest::new().negotiate(VERSION_1 | UNKNOWN) & FEATURES_OK, 0);
    }

    #[test]
    fn features_stay_as_agreed_on() {
        let mut guest = Guest::new();
        guest.negotiate(VERSION_1 | OFFERED);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 0);
        guest.set_status(RUNNING);
        let features = guest.device.lock().unwrap().active.as_ref().unwrap().features;
        assert_eq!(features, VERSION_1 | OFFERED);
    }

    #[test]
    fn states_cannot_be_skipped() {
        let mut guest = Guest::new();
        assert_eq!(guest.set_status(DRIVER), 0);
        assert_eq!(guest.set_status(FEATURES_OK | DRIVER_OK), 0);
        assert_eq!(guest.set_status(ACKNOWLEDGE | DRIVER_OK), ACKNOWLEDGE);
        assert!(!guest.is_active());
    }

    #[test]
    fn status_bits_cannot_be_cleared_one_by_one() {
        let mut guest = Guest::running();
        assert_eq!(guest.set_status(ACKNOWLEDGE), RUNNING);
        assert!(guest.is_active());
    }

    #[test]
    fn a_driver_that_failed_cannot_start() {
        let mut guest = Guest::new();
        let negotiated = guest.negotiate(VERSION_1);
        assert_eq!(guest.set_status(negotiated | FAILED), negotiated | FAILED);
        guest.set_status(RUNNING | FAILED);
        assert!(!guest.is_active());
    }

    #[test]
    fn a_start_kicks_every_queue_once() {
        let guest = Guest::running();
        let kicks: Vec<u64> =
            guest.transport.kicks().iter().map(|kick| kick.read().unwrap()).collect();
        assert_eq!(kicks, [1, 1]);
    }

    #[test]
    fn a_second_start_does_nothing() {
        let mut guest = Guest::running();
        guest.transport.kicks()[0].read().unwrap();
        guest.set_status(RUNNING);
        assert!(guest.transport.kicks()[0].read().is_err());
    }

    #[test]
    fn queues_have_their_own_largest_size() {
        let mut guest = Guest::new();
        let mut max = |queue| {
            guest.write(VIRTIO_MMIO_QUEUE_SEL, queue);
            guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX)
        };
        assert_eq!([max(0), max(1), max(2), max(u32::MAX)], [16, 8, 0, 0]);
    }

    #[test]
    fn a_queue_is_ready_when_the_driver_says_so() {
        let mut guest = Guest::running();
        guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 1);
        guest.write(VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    }

    #[test]
    fn a_queue_size_that_is_none_stops_the_start() {
        for size in [0, 3, 32, 1 << 16 | 16, u32::MAX] {
            let status = Guest::started_with(size, [0x1000, 0x2000, 0x3000]);
            assert_eq!(status, RUNNING | NEEDS_RESET, "{size}");
        }
    }

    #[test]
    fn rings_outside_memory_or_misaligned_stop_the_start() {
        let end = crate::virtio::testing::MEMORY_BYTES as u64;
        for rings in [
            [end, 0x2000, 0x3000],
            [end - 16, 0x2000, 0x3000],
            [u64::MAX - 15, 0x2000, 0x3000],
            [0x1000, end - 2, 0x3000],
            [0x1000, 0x2000, end - 4],
            [0x1001, 0x2000, 0x3000],
            [0x1000, 0x2001, 0x3000],
            [0x1000, 0x2000, 0x3002],
            [0, 0, 0],
        ] {
            assert_eq!(Guest::started_with(16, rings), RUNNING | NEEDS_RESET, "{rings:#x?}");
        }
    }

    #[test]
    fn rings_may_end_where_memory_ends() {
        let end = crate::virtio::testing::MEMORY_BYTES as u64;
        assert_eq!(Guest::started_with(16, [end - 256, 0x2000, 0x3000]), RUNNING);
    }

    #[test]
    fn a_running_queue_cannot_be_moved() {
        let mut guest = Guest::running();
        guest.place_queue(0, 8, [0x5000, 0x6000, 0x7000]);
        assert_eq!(guest.transport.registers.queues[0].descriptors, 0x1000);
    }

    #[test]
    fn used_buffers_are_a_cause_from_the_first_interrupt_on() {
        let mut guest = Guest::running();
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);

        guest.interrupt().used_buffer();
        assert!(guest.irq.event().unwrap().read().is_ok());
        guest.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);

        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    }

    #[test]
    fn a_changed_configuration_space_is_a_cause_until_acknowledged() {
        let mut guest = Guest::running();
        let interrupt = guest.interrupt();

        interrupt.used_buffer();
        interrupt.config_changed();

        assert_eq!(guest.irq.event().unwrap().read().unwrap(), 2);
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
        guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 3);
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        assert!(guest.irq.event().unwrap().read().is_err());
    }

    #[test]
    fn a_change_that_may_not_have_been_read_interrupts_again_when_the_one_before_is_acknowledged() {
        let mut guest = Guest::running();
        let interrupt = guest.interrupt();
        interrupt.config_changed();
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);

        interrupt.config_changed();
        guest.irq.event().unwrap().read().unwrap();
        guest.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);

        assert!(guest.irq.event().unwrap().read().is_ok());
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
        guest.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
        assert!(guest.irq.event().unwrap().read().is_err());
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }

    #[test]
    fn a_config_change_is_a_new_generation() {
        let mut guest = Guest::running();
        let before = guest.read(VIRTIO_MMIO_CONFIG_GENERATION);
        guest.interrupt().config_changed();
        assert_ne!(guest.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
    }

    #[test]
    fn a_broken_queue_asks_for_a_reset_and_gets_going_again_after_it() {
        let mut guest = Guest::running();
        // More chains than the queue has descriptors.
        guest.memory.write_obj(1000u16, GuestAddress(0x2002)).unwrap();

        let mut active = guest.device.lock().unwrap().active.take().unwrap();
        assert!(active.queues[0].drain(|_, _| Verdict::Used(0)).is_err());
        assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);

        assert_eq!(guest.set_status(0), 0);
        guest.negotiate(VERSION_1);
        guest.place_queue(0, 16, [0x1000, 0x4000, 0x3000]);
        assert_eq!(guest.set_status(RUNNING), RUNNING);
    }

    #[test]
    fn interrupts_are_counted_across_a_reset() {
        let mut guest = Guest::running();
        guest.interrupt().used_buffer();

        guest.set_status(0);

        assert_eq!(guest.transport.activity().counts().interrupts, 1);
    }

    #[test]
    fn a_reset_stops_the_device_and_forgets_everything() {
        let mut guest = Guest::running();
        guest.interrupt().used_buffer();

        assert_eq!(guest.set_status(0), 0);

        assert!(!guest.is_active());
        assert_eq!(guest.device.lock().unwrap().resets, 1);
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    }

    #[test]
    fn a_write_to_the_notify_register_kicks() {
        let mut guest = Guest::new();
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 2);
        assert!(guest.transport.kicks()[0].read().is_err());
        assert_eq!(guest.transport.kicks()[1].read().unwrap(), 1);
    }

    #[test]
    fn the_configuration_space_is_the_devices() {
        let mut guest = Guest::new();
        let mut data = [0xff; 2];
        guest.transport.read(0x104, &mut data);
        assert_eq!(&data, b"ig");
        guest.transport.write(0x100, b"set");
        assert_eq!(guest.device.lock().unwrap().config, b"set");
    }

    fn shared_memory(guest: &mut Guest, id: u32) -> [u32; 4] {
        guest.write(VIRTIO_MMIO_SHM_SEL, id);
        [
            VIRTIO_MMIO_SHM_LEN_LOW,
            VIRTIO_MMIO_SHM_LEN_HIGH,
            VIRTIO_MMIO_SHM_BASE_LOW,
            VIRTIO_MMIO_SHM_BASE_HIGH,
        ]
        .map(|register| guest.read(register))
    }

    #[test]
    fn shared_memory_has_a_length_and_a_base_of_two_words() {
        let mut guest = Guest::new();

        assert_eq!(shared_memory(&mut guest, 7), [0x20_0000, 4, 0x8000_0000, 5]);
    }

    #[test]
    fn shared_memory_that_is_not_there_reads_as_all_ones() {
        let mut guest = Guest::new();

        assert_eq!(shared_memory(&mut guest, 0), [u32::MAX; 4]);
        assert_eq!(shared_memory(&mut guest, u32::MAX), [u32::MAX; 4]);
    }

    #[test]
    fn accesses_of_other_widths_read_their_part_and_write_nothing() {
        let mut guest = Guest::new();
        for width in [0, 1, 2, 3, 8] {
            let mut data = vec![0xff; width];
            guest.transport.read(0, &mut data);
            assert_eq!(data, b"virt\x02\0\0\0"[..width]);
            guest.transport.write(VIRTIO_MMIO_STATUS.into(), &vec![1; width]);
        }
        assert_eq!(guest.status(), 0);
    }

    #[test]
    fn any_write_to_any_register_is_survived() {
        let mut guest = Guest::new();
        for value in [0, 1, 2, 3, 0xf, 0xff, 1 << 31, u32::MAX] {
            for register in (0..0x110).step_by(4) {
                guest.write(register, value);
                guest.read(register);
            }
        }
    }

    /// Another device in the place of the one of `old`, in the same memory.
    fn handed_over(mut old: Guest) -> Guest {
        let bytes = postcard::to_stdvec(&old.transport.save()).unwrap();
        let device = Arc::new(Mutex::new(Probe::default()));
        let irq = Arc::new(IrqLine::new().unwrap());
        let transport = MmioTransport::new(old.memory.clone(), device.clone(), irq.clone(), page());
        let mut new = Guest { device, transport: transport.unwrap(), irq, memory: old.memory };
        new.transport.show();
        new.transport.restore(&postcard::from_bytes(&bytes).unwrap()).unwrap();
        new
    }

    /// Makes `count` chains of one descriptor, number 0, available in the queue of `running`.
    fn offer(guest: &Guest, count: u16) {
        guest.memory.write_obj(count, GuestAddress(0x2002)).unwrap();
    }

    fn used(guest: &Guest) -> u16 {
        guest.memory.read_obj(GuestAddress(0x3002)).unwrap()
    }

    #[test]
    fn a_device_built_anew_runs_where_the_old_one_was() {
        let mut old = Guest::running();
        offer(&old, 3);
        old.device.lock().unwrap().queue_ready(0).unwrap();
        old.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
        offer(&old, 5);

        let mut new = handed_over(old);

        assert_eq!(new.status(), RUNNING);
        assert!(new.transport.kicks().iter().all(|kick| kick.read().is_ok()));
        assert!(new.irq.event().unwrap().read().is_ok());
        assert_eq!(used(&new), 3);
        new.device.lock().unwrap().queue_ready(0).unwrap();
        assert_eq!(used(&new), 5);
        new.set_status(0);
        assert!(!new.is_active());
    }

    #[test]
    fn a_driver_acknowledges_to_a_device_built_anew_what_it_read_before() {
        let mut old = Guest::running();
        let interrupt = old.interrupt();
        interrupt.config_changed();
        assert_eq!(old.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
        interrupt.used_buffer();

        let mut new = handed_over(old);
        new.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);

        // It may have been another change.
        assert_eq!(new.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
        new.write(VIRTIO_MMIO_INTERRUPT_ACK, 3);
        assert_eq!(new.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    }

    #[test]
    fn a_driver_finds_selected_what_it_had_selected() {
        let mut old = Guest::running();
        old.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        old.write(VIRTIO_MMIO_QUEUE_SEL, 1);
        let region = shared_memory(&mut old, 7);
        let generation = old.read(VIRTIO_MMIO_CONFIG_GENERATION);

        let mut new = handed_over(old);

        assert_eq!(new.read(VIRTIO_MMIO_DEVICE_FEATURES), 1);
        assert_eq!(new.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 8);
        assert_eq!(new.read(VIRTIO_MMIO_SHM_BASE_LOW), region[2]);
        assert_eq!(new.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    }

    #[test]
    fn a_driver_goes_on_negotiating_with_a_device_built_anew() {
        let mut old = Guest::new();
        old.negotiate(VERSION_1);
        old.place_queue(1, 8, [0x1000, 0x2000, 0x3000]);

        let mut new = handed_over(old);

        assert!(!new.is_active());
        assert_eq!(new.read(VIRTIO_MMIO_QUEUE_READY), 1);
        assert_eq!(new.set_status(RUNNING), RUNNING);
        assert!(new.is_active());
    }

    #[test]
    fn a_device_that_waits_for_its_reset_still_does() {
        let old = Guest::running();
        old.transport.shared.needs_reset();
        old.device.lock().unwrap().reset();

        let mut new = handed_over(old);

        assert_eq!(new.status(), RUNNING | NEEDS_RESET);
        assert!(!new.is_active());
    }

    #[test]
    fn the_state_of_another_device_is_refused() {
        let state = Guest::running().transport.save();
        let refused = |change: fn(&mut MmioTransport)| {
            let mut other = Guest::new();
            change(&mut other.transport);
            other.transport.restore(&state).unwrap_err().to_string()
        };

        let message = refused(|transport| transport.device_type = 77);
        assert!(message.contains("the type was 0x4 and is 0x4d"), "{message}");
        let message = refused(|transport| transport.device_features = 0);
        assert!(message.contains("the set of features"), "{message}");
        let message = refused(|transport| _ = transport.registers.queues.pop());
        assert!(message.contains("the number of queues"), "{message}");
    }

    #[test]
    fn rings_outside_memory_are_refused_in_a_state_too() {
        let mut guest = Guest::running();
        guest.transport.registers.queues[0].used = 1 << 40;
        let state = guest.transport.save();

        let refused = Guest::new().transport.restore(&state);

        assert!(matches!(refused, Err(RestoreError::Start(_))), "{refused:?}");
    }
}
