//! A running virtual machine, as every thread of its process sees it.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use arch::{Arch, Host, Kvm, VcpuFd, VmFd};
use devices::listener::SocketFile;
use devices::virtio::balloon::Host as BalloonHost;
use devices::virtio::mem::Host as MemHost;
use devices::virtio::vsock::Host as VsockHost;

use crate::console::ConsoleLog;
use crate::control::{Control, Exit};
use crate::error::Error;
use crate::event_loop::EventLoop;
use crate::memory::GuestRam;
use crate::metrics::{Counter, Metrics, Record};
use crate::peripherals::Ends;
use crate::state::{Devices, MachineState, Shape};

/// A running virtual machine; dropping it stops the guest and joins every thread.
///
/// The methods with `&self` may be called from any thread, in any order, also after the end.
pub struct VmHandle {
    pub(crate) control: Arc<Control>,
    pub(crate) vcpus: Vec<JoinHandle<()>>,
    /// What the vCPU threads run; free while they are out of the guest.
    pub(crate) vcpu_fds: Vec<Arc<Mutex<VcpuFd>>>,
    pub(crate) console: ConsoleLog,
    pub(crate) ends: Ends,
    pub(crate) counters: Vec<Arc<Mutex<Counter>>>,
    pub(crate) record: Record,
    /// Stopped before guest RAM goes: devices work on it.
    pub(crate) loops: Vec<EventLoop>,
    /// The threads that serve the sockets cannot reach their files.
    pub(crate) _socket_files: Vec<SocketFile>,
    pub(crate) devices: Devices,
    pub(crate) shape: Shape,
    pub(crate) kvm: Kvm,
    /// Closed after the vCPU threads are gone, and before guest RAM goes.
    pub(crate) vm: VmFd,
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
        if self.shape.has_private_pmem {
            return no_file(("what it writes to persistent memory", "pmem.read_only"));
        }
        if self.shape.has_window {
            return no_file(("what it has mapped through a window", "shares.dax_mib"));
        }
        self.control.while_paused(|| self.save_paused()).map_err(Error::Save)?
    }

    fn save_paused(&self) -> Result<MachineState, Error> {
        // First, because what they finish now interrupts the guest.
        let devices = self.devices.save(&self.loops);
        let vcpus = self.vcpu_fds.iter().map(|fd| {
            let fd = fd.lock().expect("nothing panics while it runs the guest");
            Host::save_vcpu(&self.kvm, &fd)
        });
        let failed = |step| move |source| Error::Arch { step, source };
        let vcpus = vcpus.collect::<Result<_, _>>().map_err(failed("save a vCPU"))?;
        let board = Host::save_board(&self.vm).map_err(failed("save the machine"))?;
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

    /// The last lines the guest printed on its consoles: at most 8 KiB, without control characters.
    pub fn console_tail(&self) -> String {
        self.console.tail()
    }

    /// The host's end of the socket device, if the VM has one.
    pub fn vsock(&self) -> Option<&VsockHost> {
        self.ends.vsock.as_ref()
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
        for counter in &self.counters {
            counter.lock().expect("nothing panics while it counts").add_to(&mut metrics.exits);
        }
        metrics
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        self.control.end(Exit::Stopped);
        for vcpu in self.vcpus.drain(..) {
            // A panic of that thread was printed by the thread.
            let _ = vcpu.join();
        }
        self.loops.clear();
    }
}
