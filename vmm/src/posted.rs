//! Register writes that wait: KVM notes those that no driver expects an answer to, and they are carried
//! out before the next access that leaves the guest (Documentation/virt/kvm/api.rst, section 4.116,
//! KVM_REGISTER_COALESCED_MMIO). Most writes of a driver that starts its device are of this kind, so
//! that they cost no way out of the guest.
//!
//! A write is carried out with the lock of the ring held and stays in the ring until then: who finds
//! the ring empty knows that all that was written before has had its effect.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use arch::machine::MmioDevice;
use arch::{VcpuFd, VmFd};
use devices::bus::Bus;
use devices::virtio::posted::{IDLE_WRITE, POSTED_REGISTERS};
use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{Cap, IoEventAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The writes of a machine that are noted and not carried out yet.
pub struct PostedWrites {
    /// None where KVM notes none.
    ring: Option<Ring>,
    /// Signalled by writes that nothing comes of. Nobody listens: KVM has done with them.
    idle: EventFd,
}

/// A page that KVM shares with this process.
struct Ring {
    page: NonNull<kvm_coalesced_mmio_ring>,
    bytes: usize,
    /// Held while writes are carried out. Locked before any device.
    consumer: Mutex<()>,
}

// SAFETY: the page is mapped as long as the ring lives, whatever thread it is in; the indices are
// accessed as atomics, and an entry only by who holds `consumer` while KVM leaves it alone.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl PostedWrites {
    /// Those of `vm`; all its vCPUs share what `vcpu`, one of them, shows.
    pub fn open(vm: &VmFd, vcpu: Option<&VcpuFd>) -> io::Result<Self> {
        // The extension's value is where the ring is, in pages.
        let pages = usize::try_from(vm.check_extension_int(Cap::CoalescedMmio)).unwrap_or(0);
        let vcpu = vcpu.filter(|_| pages != 0);
        let ring = vcpu.map(|vcpu| Ring::map(vcpu, pages)).transpose()?;
        Ok(PostedWrites { ring, idle: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Has KVM note what the guest writes to those registers of a virtio device at `place` that can wait,
    /// and forget what nothing comes of.
    pub fn expect_at(&self, vm: &VmFd, place: &MmioDevice) -> Result<(), kvm_ioctls::Error> {
        let (register, value) = IDLE_WRITE;
        let idle = IoEventAddress::Mmio(place.base.0 + u64::from(register));
        vm.register_ioevent(&self.idle, &idle, value)?;
        if self.ring.is_none() {
            return Ok(());
        }
        POSTED_REGISTERS.iter().try_for_each(|registers| {
            let start = IoEventAddress::Mmio(place.base.0 + u64::from(registers.start));
            vm.register_coalesced_mmio(start, registers.end - registers.start)
        })
    }

    /// Carries out all writes that were noted, in their order.
    pub fn carry_out(&self, bus: &Bus) {
        if let Some(ring) = self.ring.as_ref().filter(|ring| !ring.is_empty()) {
            ring.carry_out(bus);
        }
    }
}

impl Ring {
    fn map(vcpu: &VcpuFd, offset_pages: usize) -> io::Result<Self> {
        // SAFETY: sysconf has no preconditions.
        let bytes = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) })
            .expect("the size of a page is known");
        let offset = libc::off_t::try_from(offset_pages * bytes).expect("a few pages");
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = vcpu.as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let page =
            unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, offset) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).expect("nothing is mapped at address 0");
        Ok(Ring { page, bytes, consumer: Mutex::new(()) })
    }

    /// How many entries the ring has (include/uapi/linux/kvm.h, KVM_COALESCED_MMIO_MAX).
    fn size(&self) -> u32 {
        let entries = self.bytes - size_of::<kvm_coalesced_mmio_ring>();
        u32::try_from(entries / size_of::<kvm_coalesced_mmio>()).expect("they fit a page")
    }

    /// The oldest entry; this process moves it on.
    fn first(&self) -> &AtomicU32 {
        self.index(offset_of!(kvm_coalesced_mmio_ring, first))
    }

    /// The entry behind the newest one; KVM moves it on.
    fn last(&self) -> &AtomicU32 {
        self.index(offset_of!(kvm_coalesced_mmio_ring, last))
    }

    fn index(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: both offsets are those of aligned numbers in the page, which is mapped as long as
        // `self` lives; from here on this process accesses them as atomics only.
        unsafe { AtomicU32::from_ptr(self.page.byte_add(offset).cast().as_ptr()) }
    }

    fn is_empty(&self) -> bool {
        self.first().load(Ordering::Acquire) == self.last().load(Ordering::Acquire)
    }

    /// Carries out what is there when it starts, and what comes meanwhile, but no more than the ring
    /// has room for: other vCPUs may write on and on.
    fn carry_out(&self, bus: &Bus) {
        let _consumer = self.consumer.lock().expect("no device panics while it is written to");
        let size = self.size();
        for _ in 0..size {
            let first = self.first().load(Ordering::Acquire);
            if first >= size || first == self.last().load(Ordering::Acquire) {
                return;
            }
            let entry = self.entry(first);
            let length = usize::try_from(entry.len).unwrap_or(usize::MAX);
            bus.write(entry.phys_addr, entry.data.get(..length).unwrap_or(&entry.data));
            self.first().store((first + 1) % size, Ordering::Release);
        }
    }

    /// Entry number `index`, between the first and the last one.
    fn entry(&self, index: u32) -> kvm_coalesced_mmio {
        let entries = offset_of!(kvm_coalesced_mmio_ring, coalesced_mmio);
        let offset = entries + index as usize * size_of::<kvm_coalesced_mmio>();
        // SAFETY: the caller holds `consumer` and checked that the index is less than the size, so the
        // entry is in the page; KVM does not touch it before `first` has moved on.
        unsafe { self.page.byte_add(offset).cast().read() }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the page was mapped with this size, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.bytes) };
    }
}
