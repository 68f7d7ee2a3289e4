//! A place for a virtio device that may come later: a register block that is there from the start, and
//! says that it has no device until it gets one.
//!
//! A driver skips a block whose device has number 0 (virtio 1.2, section 4.2.3.1.1), and looks again
//! only when it is told to.

use std::time::Instant;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_VERSION};

use super::mmio::{MAGIC, MmioTransport, RegisterPage, Unsettled, VERSION};
use super::subscriber::Subscriber;
use crate::bus::BusDevice;

/// A register block with a device, or without.
pub struct Slot {
    transport: Option<MmioTransport>,
    /// Whether what is left of the device is there for its driver only.
    is_withdrawn: bool,
    page: RegisterPage,
}

impl Slot {
    /// One without, shown in `page`.
    pub fn new(page: RegisterPage) -> Self {
        let slot = Slot { transport: None, is_withdrawn: false, page };
        slot.show_empty();
        slot
    }

    /// What a device has to show itself in that is to come here.
    pub fn page(&self) -> &RegisterPage {
        &self.page
    }

    /// Shows that there is no device.
    fn show_empty(&self) {
        self.page.clear();
        self.page.set(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
        self.page.set(VIRTIO_MMIO_VERSION, VERSION);
    }

    /// Whether it has a device.
    pub fn is_taken(&self) -> bool {
        self.transport.is_some()
    }

    /// Puts a device into an empty slot, whose page it has.
    pub fn insert(&mut self, transport: MmioTransport) {
        debug_assert!(!self.is_taken(), "a slot is asked before it is filled");
        transport.show();
        self.transport = Some(transport);
    }

    /// Takes the device away from a driver that waits for it: until the driver has let go of it, its
    /// requests fail. Returns what has to be served in the place of the device, and called `name` in log
    /// lines; none if nobody waits or could be answered, and then the device is still there. So it is after
    /// an error: the host did not finish what is in flight until `deadline`.
    pub fn withdraw(
        &mut self,
        name: &str,
        deadline: Instant,
    ) -> Result<Option<Subscriber>, Unsettled> {
        let Some(transport) = self.transport.as_mut() else { return Ok(None) };
        let Some(stand_in) = transport.withdraw(deadline)? else { return Ok(None) };
        self.is_withdrawn = true;
        let (kicks, activity) = (transport.kicks().clone(), transport.activity().clone());
        Ok(Some(Subscriber::new(name.to_owned(), kicks, stand_in, activity)))
    }

    /// Whether the driver has let go of a device that was withdrawn.
    pub fn has_parted(&self) -> bool {
        self.is_withdrawn && self.transport.as_ref().is_some_and(|gone| !gone.is_in_use())
    }

    /// Takes the device out, or what is left of it. It is idle from here on, whatever its driver did; a
    /// driver that still uses it finds a device of number 0 that was reset.
    pub fn remove(&mut self) -> Option<MmioTransport> {
        let mut transport = self.transport.take()?;
        self.is_withdrawn = false;
        transport.reset();
        self.show_empty();
        Some(transport)
    }
}

impl BusDevice for Slot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // What a driver says to a device without number is no start.
        if self.has_parted() {
            return;
        }
        if let Some(transport) = &mut self.transport {
            transport.write(offset, data);
        }
        if self.has_parted() {
            self.transport.iter_mut().for_each(MmioTransport::reset);
            self.show_empty();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use event_manager::{EventManager, SubscriberOps};
    use tempfile::NamedTempFile;
    use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
    use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_RNG};
    use virtio_bindings::virtio_mmio::{
        VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
        VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
        VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
    };
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::interrupt::IrqLine;
    use crate::virtio::block::{Access, Block, Disk};
    use crate::virtio::rate_limit::RateLimiter;
    use crate::virtio::rng::Rng;
    use crate::virtio::testing::{AVAILABLE, Driver, QUEUE_SIZE, RINGS, USED, memory};

    fn transport(slot: &Slot) -> MmioTransport {
        let device = Arc::new(Mutex::new(Rng::new(File::open("/dev/zero").unwrap())));
        let line = Arc::new(IrqLine::new().unwrap());
        MmioTransport::new(memory(), device, line, slot.page().clone()).unwrap()
    }

    /// The queue that the driver of a disk uses.
    const QUEUE: u32 = 1;

    /// What a driver writes to start a disk.
    fn start() -> [(u32, u32); 11] {
        let rings = u32::try_from(RINGS).unwrap() * QUEUE;
        let [available, used] = [AVAILABLE, USED].map(|ring| rings + u32::try_from(ring).unwrap());
        [
            (VIRTIO_MMIO_STATUS, 1),
            (VIRTIO_MMIO_STATUS, 1 | 2),
            (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
            (VIRTIO_MMIO_DRIVER_FEATURES, 1), // VIRTIO_F_VERSION_1
            (VIRTIO_MMIO_STATUS, 1 | 2 | 8),
            (VIRTIO_MMIO_QUEUE_SEL, QUEUE),
            (VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into()),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, rings),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
            (VIRTIO_MMIO_QUEUE_READY, 1),
        ]
    }

    fn write(slot: &mut Slot, (register, value): (u32, u32)) {
        slot.write(register.into(), &value.to_le_bytes());
    }

    /// A slot with a disk for a driver whose memory this is, and its interrupts.
    fn slot_with_disk(memory: &GuestMemoryMmap) -> (Slot, Arc<IrqLine>) {
        let (slot, line, _) = slot_and_disk(memory);
        (slot, line)
    }

    /// The same, and the disk.
    fn slot_and_disk(memory: &GuestMemoryMmap) -> (Slot, Arc<IrqLine>, Arc<Mutex<Block>>) {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let disk = Disk::open(image.path(), Access::default()).unwrap();
        let block = Block::new(disk, "disk", 2, RateLimiter::unlimited(), None);
        let line = Arc::new(IrqLine::new().unwrap());
        let mut slot = Slot::new(RegisterPage::alone().unwrap());
        let (block, page) = (Arc::new(Mutex::new(block)), slot.page().clone());
        let transport =
            MmioTransport::new(memory.clone(), block.clone(), line.clone(), page).unwrap();
        slot.insert(transport);
        (slot, line, block)
    }

    /// What serves `disk` in `slot`.
    fn service(slot: &Slot, disk: Arc<Mutex<Block>>) -> Subscriber {
        let transport = slot.transport.as_ref().unwrap();
        let (kicks, activity) = (transport.kicks().clone(), transport.activity().clone());
        Subscriber::new("disk".to_owned(), kicks, disk, activity)
    }

    /// Offers a read.
    fn read_sector(driver: &Driver<'_>) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&VIRTIO_BLK_T_IN.to_le_bytes());
        driver.offer(QUEUE as usize, &[&header], &[512, 1]);
    }

    /// Whether the driver was interrupted and each of its `count` reads failed, and nothing was read.
    fn all_failed(driver: &Driver<'_>, line: &IrqLine, count: usize) -> bool {
        let used = driver.used_of(QUEUE as usize);
        let statuses = (0..count).map(|nth| driver.buffer(nth as u64 * 529 + 528, 1)[0]);
        line.event().unwrap().read().is_ok()
            && used.len() == count
            && used.iter().all(|&(_, written)| written == 1)
            && statuses.eq(std::iter::repeat_n(1, count))
    }

    fn read(slot: &mut Slot, register: u32) -> u32 {
        let mut data = [0xff; 4];
        slot.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_empty_slot_is_a_virtio_block_without_a_device() {
        let mut slot = Slot::new(RegisterPage::alone().unwrap());

        slot.write(VIRTIO_MMIO_STATUS.into(), &1_u32.to_le_bytes());

        assert_eq!(read(&mut slot, VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_VERSION), VERSION);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), 0);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 0);
        assert_eq!(read(&mut slot, 0x100), 0);
    }

    #[test]
    fn a_slot_shows_its_device_for_as_long_as_it_has_it() {
        let mut slot = Slot::new(RegisterPage::alone().unwrap());

        slot.insert(transport(&slot));
        slot.write(VIRTIO_MMIO_STATUS.into(), &1_u32.to_le_bytes());
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_RNG);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 1);
        let removed = slot.remove();

        assert!(removed.is_some() && slot.remove().is_none());
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), 0);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 0);
    }

    fn withdraw(slot: &mut Slot) -> Option<Subscriber> {
        slot.withdraw("disk", Instant::now()).unwrap()
    }

    #[test]
    fn a_disk_whose_requests_the_host_does_not_finish_is_not_withdrawn() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut slot, line, disk) = slot_and_disk(&memory);
        start().into_iter().for_each(|step| write(&mut slot, step));
        write(&mut slot, (VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8));
        // As its thread has it for as long as the host takes.
        let busy = disk.lock().unwrap();

        let outcome = slot.withdraw("disk", Instant::now() + Duration::from_millis(5));
        assert_eq!(outcome.err(), Some(Unsettled));
        drop(busy);

        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(service(&slot, disk));
        read_sector(&driver);
        write(&mut slot, (VIRTIO_MMIO_QUEUE_NOTIFY, QUEUE));
        manager.run_with_timeout(1000).unwrap();
        assert!(!all_failed(&driver, &line, 1) && !slot.has_parted());
        assert!(withdraw(&mut slot).is_some());
    }

    #[test]
    fn requests_to_a_disk_that_is_withdrawn_fail_until_its_driver_lets_go() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut slot, line) = slot_with_disk(&memory);
        start().into_iter().for_each(|step| write(&mut slot, step));
        write(&mut slot, (VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8));
        let mut manager = EventManager::new().unwrap();

        read_sector(&driver);
        manager.add_subscriber(withdraw(&mut slot).unwrap());
        manager.run_with_timeout(1000).unwrap();
        assert!(all_failed(&driver, &line, 1));
        read_sector(&driver);
        write(&mut slot, (VIRTIO_MMIO_QUEUE_NOTIFY, QUEUE));
        manager.run_with_timeout(1000).unwrap();
        assert!(all_failed(&driver, &line, 2));

        assert!(!slot.has_parted());
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_BLOCK);
        write(&mut slot, (VIRTIO_MMIO_STATUS, 0));
        assert!(slot.has_parted());
        start().into_iter().for_each(|step| write(&mut slot, step));
        assert_eq!(read(&mut slot, VIRTIO_MMIO_DEVICE_ID), 0);
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 0);
        assert!(slot.remove().is_some() && !slot.has_parted());
    }

    #[test]
    fn a_driver_that_is_about_to_start_a_disk_that_is_withdrawn_gets_answers() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut slot, line) = slot_with_disk(&memory);
        let mut manager = EventManager::new().unwrap();
        let mut steps = start().into_iter();

        steps.by_ref().take(2).for_each(|step| write(&mut slot, step));
        manager.add_subscriber(withdraw(&mut slot).unwrap());
        steps.for_each(|step| write(&mut slot, step));
        write(&mut slot, (VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8));
        read_sector(&driver);
        write(&mut slot, (VIRTIO_MMIO_QUEUE_NOTIFY, QUEUE));
        manager.run_with_timeout(1000).unwrap();

        assert!(all_failed(&driver, &line, 1));
    }

    #[test]
    fn a_driver_that_gave_up_a_disk_that_is_withdrawn_is_not_served_any_more() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut slot, _line) = slot_with_disk(&memory);
        start().into_iter().for_each(|step| write(&mut slot, step));
        write(&mut slot, (VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(withdraw(&mut slot).unwrap());

        write(&mut slot, (VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8 | 128));
        read_sector(&driver);
        manager.run_with_timeout(1000).unwrap();

        assert!(slot.has_parted());
        assert_eq!(driver.used_of(QUEUE as usize), []);
    }

    #[test]
    fn a_driver_whose_requests_nobody_can_answer_does_not_keep_the_slot() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut slot, _line, disk) = slot_and_disk(&memory);
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(service(&slot, disk));
        start().into_iter().for_each(|step| write(&mut slot, step));
        write(&mut slot, (VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8));

        // More requests than the queue has room for.
        driver.claim_available(QUEUE as usize, QUEUE_SIZE + 1);
        write(&mut slot, (VIRTIO_MMIO_QUEUE_NOTIFY, QUEUE));
        manager.run_with_timeout(1000).unwrap();
        assert_eq!(read(&mut slot, VIRTIO_MMIO_STATUS), 1 | 2 | 4 | 8 | 64);

        assert!(withdraw(&mut slot).is_none() && !slot.has_parted());
        assert!(slot.remove().is_some() && !slot.is_taken());
    }

    #[test]
    fn nobody_waits_for_a_disk_without_driver_or_for_another_device() {
        let (mut disk, _line) = slot_with_disk(&memory());
        // What Linux leaves behind when it lets go of a device.
        write(&mut disk, (VIRTIO_MMIO_STATUS, 1));
        let mut other = Slot::new(RegisterPage::alone().unwrap());
        other.insert(transport(&other));
        write(&mut other, (VIRTIO_MMIO_STATUS, 1));
        write(&mut other, (VIRTIO_MMIO_STATUS, 1 | 2));

        for slot in [&mut disk, &mut other] {
            assert!(withdraw(slot).is_none() && !slot.has_parted());
            assert_ne!(read(slot, VIRTIO_MMIO_STATUS), 0);
        }
    }

    #[test]
    fn a_device_that_is_taken_out_is_reset() {
        let mut slot = Slot::new(RegisterPage::alone().unwrap());
        slot.insert(transport(&slot));
        slot.write(VIRTIO_MMIO_STATUS.into(), &1_u32.to_le_bytes());

        let mut removed = slot.remove().unwrap();

        let mut status = [0xff; 4];
        removed.read(VIRTIO_MMIO_STATUS.into(), &mut status);
        assert_eq!(status, [0; 4]);
    }
}
