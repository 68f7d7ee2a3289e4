//! A running virtual machine, as every thread of its process sees it.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use arch::VmFd;
use devices::virtio::balloon::Host as BalloonHost;
use devices::virtio::mem::Host as MemHost;
use devices::virtio::vsock::Host as VsockHost;

use crate::console::ConsoleLog;
use crate::control::{Control, Exit};
use crate::event_loop::EventLoop;
use crate::memory::GuestRam;
use crate::metrics::{Counter, Metrics, Record};
use crate::peripherals::Ends;

/// A running virtual machine; dropping it stops the guest and joins every thread.
///
/// The methods with `&self` may be called from any thread, in any order, also after the end.
pub struct VmHandle {
    pub(crate) control: Arc<Control>,
    pub(crate) vcpus: Vec<JoinHandle<()>>,
    pub(crate) console: ConsoleLog,
    pub(crate) ends: Ends,
    pub(crate) counters: Vec<Arc<Mutex<Counter>>>,
    pub(crate) record: Record,
    /// Stopped before guest RAM goes: devices work on it.
    pub(crate) loops: Vec<EventLoop>,
    /// Closed after the vCPU threads are gone, and before guest RAM goes.
    pub(crate) _vm: VmFd,
    pub(crate) _ram: GuestRam,
}

impl VmHandle {
    /// Stops the guest's processors; returns once none of them runs. Devices go on.
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
        self.control.resume();
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
