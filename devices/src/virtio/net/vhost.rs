//! vhost-net: the host's kernel moves the frames between a tap and the guest's queues.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use event_manager::EventSet;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::virtio::Backend;
use crate::virtio::queue::VirtQueue;

/// What a driver may negotiate that changes how frames lie in the queues. The kernel must know all
/// of it; the rest is between the driver and the tap.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why the host's kernel cannot serve a device's queues.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// There is no /dev/vhost-net, or not for us.
    #[error("open /dev/vhost-net (is the module vhost_net loaded?)")]
    Open(#[source] io::Error),
    /// The kernel refused a step of what comes before the guest runs.
    #[error("vhost-net: {step}")]
    SetUp {
        /// What was asked of it.
        step: &'static str,
        /// What it said.
        #[source]
        source: vhost::Error,
    },
    /// The kernel is too old.
    #[error("vhost-net of this kernel lacks the features {0:#x}")]
    Features(u64),
    /// The host has no descriptor left.
    #[error("create the eventfds of vhost-net (raise the limit of open files, ulimit -n)")]
    Descriptors(#[source] io::Error),
}

/// The kernel's side of a device: an instance of vhost-net, which is a kernel thread, for each pair.
pub struct Vhost {
    workers: Vec<Worker>,
    /// Signalled when a used ring moved and its driver wants to know. All queues share it, because
    /// the interrupt of a device does not tell its queues apart either.
    call: EventFd,
    /// Signalled when a queue turns out to be unusable.
    error: EventFd,
}

struct Worker {
    kernel: KernelNet,
    link: File,
    /// Which of the two queues the driver set up.
    ready: [bool; 2],
    running: bool,
    /// Whether it is to run again.
    paused: bool,
}

/// An open vhost-net. The type of the vhost crate opens the file by itself, which a thread that attaches a
/// device to a running machine may not.
struct KernelNet {
    file: File,
    memory: Arc<GuestMemoryMmap>,
}

/// What became readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Used rings moved.
    Used,
    /// A queue is unusable.
    Broken,
}

impl Vhost {
    /// Opens vhost-net `count` times: once for each pair of queues.
    pub fn open_files(count: usize) -> Result<Vec<File>, VhostError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        (0..count).map(|_| options.open("/dev/vhost-net").map_err(VhostError::Open)).collect()
    }

    /// Has vhost-net, of which `files` are as many open ones, serve `links`, which are taps, on behalf of a
    /// guest with `memory`.
    pub fn new<L: AsFd>(
        files: Vec<File>,
        links: &[L],
        memory: &GuestMemoryMmap,
    ) -> Result<Self, VhostError> {
        let eventfd = || EventFd::new(EFD_NONBLOCK).map_err(VhostError::Descriptors);
        let memory = Arc::new(memory.clone());
        Ok(Vhost {
            workers: links
                .iter()
                .zip(files)
                .map(|(link, file)| Worker::new(file, link, &memory))
                .collect::<Result<_, _>>()?,
            call: eventfd()?,
            error: eventfd()?,
        })
    }

    /// What the event loop has to wait on, so that the kernel reaches the driver. Each is a
    /// [`Signal`].
    pub fn backends(&self) -> Vec<Backend> {
        let backend = |event: &EventFd| Backend { fd: event.as_raw_fd(), events: EventSet::IN };
        vec![backend(&self.call), backend(&self.error)]
    }

    /// What it means that backend `index` is ready.
    pub fn signal(&self, index: usize) -> Signal {
        if index == 0 { Signal::Used } else { Signal::Broken }
    }

    /// Tells the kernel where a new driver that negotiated `features` placed its queues; a pair
    /// after the other, none of them running.
    pub fn set_up(&mut self, queues: &[VirtQueue], features: u64) -> io::Result<()> {
        for (worker, pair) in self.workers.iter_mut().zip(queues.chunks_exact(2)) {
            worker.kernel.set_features(features & FEATURES).map_err(io::Error::other)?;
            for (index, queue) in pair.iter().enumerate() {
                worker.ready[index] = queue.rings().is_some();
                set_up_queue(&worker.kernel, index, queue, &self.call, &self.error)
                    .map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// Has the kernel serve `pair`, where it left off.
    pub fn start(&mut self, pair: usize) -> io::Result<()> {
        let worker = &mut self.workers[pair];
        worker.running = true;
        for index in (0..2).filter(|&index| worker.ready[index]) {
            worker.kernel.set_backend(index, Some(&worker.link)).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Has the kernel leave `pair` alone: it does not touch guest memory any more after this.
    pub fn stop(&mut self, pair: usize) {
        let worker = &mut self.workers[pair];
        for index in (0..2).filter(|&index| worker.running && worker.ready[index]) {
            // It can fail only for a queue that does not run.
            let _ = worker.kernel.set_backend(index, None);
        }
        worker.running = false;
    }

    /// Stops the pairs that run, until [`Vhost::resume`].
    pub fn pause(&mut self) {
        for pair in 0..self.workers.len() {
            let running = self.workers[pair].running;
            self.stop(pair);
            self.workers[pair].paused = running;
        }
    }

    /// Starts the pairs again that [`Vhost::pause`] stopped.
    pub fn resume(&mut self) -> io::Result<()> {
        for pair in 0..self.workers.len() {
            if std::mem::take(&mut self.workers[pair].paused) {
                self.start(pair)?;
            }
        }
        Ok(())
    }

    /// Entry of the available ring that the kernel takes next from queue number `index`, counting
    /// those of all pairs; it must have been stopped.
    pub fn next_available(&self, index: usize) -> u16 {
        let worker = &self.workers[index / 2];
        // It can fail only for a queue without rings, which the caller knows to ignore.
        let base = worker.kernel.get_vring_base(index % 2).unwrap_or(0);
        u16::try_from(base & u32::from(u16::MAX)).expect("it is masked")
    }

    /// Stops every pair.
    pub fn stop_all(&mut self) {
        (0..self.workers.len()).for_each(|pair| self.stop(pair));
    }
}

impl KernelNet {
    /// Has the kernel serve queue `index` of a pair with frames of `link`, or no longer.
    fn set_backend(&self, index: usize, link: Option<&File>) -> vhost::Result<()> {
        let index = u32::try_from(index).expect("a pair has two queues");
        let backend = vhost_vring_file { index, fd: link.map_or(-1, AsRawFd::as_raw_fd) };
        // SAFETY: the request reads one such structure.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &backend) } {
            0 => Ok(()),
            _ => Err(vhost::Error::IoctlError(io::Error::last_os_error())),
        }
    }
}

impl AsRawFd for KernelNet {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for KernelNet {
    type AS = Arc<GuestMemoryMmap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

impl Worker {
    fn new(
        file: File,
        link: &impl AsFd,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<Self, VhostError> {
        let set_up = |step| move |source| VhostError::SetUp { step, source };
        let kernel = KernelNet { file, memory: memory.clone() };
        kernel.set_owner().map_err(set_up("start its thread"))?;
        let features = kernel.get_features().map_err(set_up("read its features"))?;
        let lacking = FEATURES & !features;
        if lacking != 0 {
            return Err(VhostError::Features(lacking));
        }
        kernel.set_mem_table(&regions(memory)).map_err(set_up("show it the guest's memory"))?;
        let link = link.as_fd().try_clone_to_owned().map_err(VhostError::Descriptors)?;
        Ok(Worker { kernel, link: link.into(), ready: [false; 2], running: false, paused: false })
    }
}

/// Guest memory as vhost wants to be told of it; nothing is mapped anew.
fn regions(memory: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    let region = |region: &GuestRegionMmap| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: region.as_ptr().addr() as u64,
        mmap_offset: 0,
        mmap_handle: -1,
    };
    memory.iter().map(region).collect()
}

fn set_up_queue(
    kernel: &KernelNet,
    index: usize,
    queue: &VirtQueue,
    call: &EventFd,
    error: &EventFd,
) -> vhost::Result<()> {
    let Some(rings) = queue.rings() else { return Ok(()) };
    kernel.set_vring_num(index, rings.size)?;
    kernel.set_vring_base(index, queue.position(0).next_available)?;
    kernel.set_vring_addr(
        index,
        &VringConfigData {
            queue_max_size: rings.size,
            queue_size: rings.size,
            flags: 0,
            desc_table_addr: rings.descriptors,
            used_ring_addr: rings.used,
            avail_ring_addr: rings.available,
            log_addr: None,
        },
    )?;
    kernel.set_vring_call(index, call)?;
    kernel.set_vring_err(index, error)?;
    kernel.set_vring_kick(index, queue.kick_event())
}
