//! A virtual processor: one thread that enters the guest and serves its exits.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use arch::machine::{Exit as GuestExit, Space};
use arch::{Arch, Host, VcpuFd};
use devices::bus::Bus;
use devices::virtio::fs::Window;
use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, kvm_run,
};
use vm_memory::GuestMemoryMmap;

use crate::confinement::Confinement;
use crate::control::{self, Control, Exit};
use crate::metrics::Counter;
use crate::posted::PostedWrites;
use crate::seccomp::Kind;

/// Address space of a vCPU thread's stack, in bytes; only what is used of it becomes memory.
const STACK_BYTES: usize = 256 << 10;

/// What the guest reaches by address. Nothing moves once the guest runs.
pub struct Buses {
    /// Device windows in guest-physical memory.
    pub memory: Bus,
    /// I/O ports, on architectures that have them.
    pub ports: Bus,
}

/// A virtual processor that has not started yet.
pub struct Vcpu {
    /// Number of the vCPU, from 0.
    pub index: u8,
    /// Its KVM handle, with all registers set; the thread holds it while it is in the guest.
    pub fd: Arc<Mutex<VcpuFd>>,
    /// Guest RAM, for exits that refer to it.
    pub memory: GuestMemoryMmap,
    /// Where its accesses go.
    pub buses: Arc<Buses>,
    /// Writes that have to be carried out before the next access.
    pub posted: Arc<PostedWrites>,
    /// Where the guest maps files, which may be truncated meanwhile.
    pub windows: Arc<[Arc<Window>]>,
    /// Run, pause or stop.
    pub control: Arc<Control>,
    /// Counts its exits.
    pub counter: Arc<Mutex<Counter>>,
}

impl Vcpu {
    /// Starts the vCPU's thread; it ends with the VM.
    pub fn start(self, confinement: &Confinement) -> io::Result<JoinHandle<()>> {
        let name = format!("{} {}", Kind::Vcpu.name(), self.index);
        let builder = thread::Builder::new().name(name).stack_size(STACK_BYTES);
        confinement.spawn(builder, Kind::Vcpu, move || self.run())
    }

    fn run(&self) {
        if let Err(error) = self.control.adopt(&mut lock(&self.fd)) {
            self.fail(&format!("prepare its thread: {error}"));
        }
        while self.control.checkpoint() {
            self.run_guest();
        }
        control::release();
    }

    /// Runs the guest until there is a reason to look at the wish again.
    fn run_guest(&self) {
        let mut fd = lock(&self.fd);
        let mut tried_after = None;
        loop {
            let exit = match fd.run() {
                Ok(exit) => {
                    tried_after = None;
                    exit
                }
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        fd.set_kvm_immediate_exit(0);
                        lock(&self.counter).signal();
                        return;
                    }
                    // The guest accessed memory that cannot be had. If there is nothing to do about it,
                    // another thread may have done it, or the file has grown: it is tried again, and as
                    // long as others have found something to do since.
                    libc::EFAULT
                        if self.patch_windows() || {
                            let patches = self.patches();
                            tried_after.replace(patches) != Some(patches)
                        } =>
                    {
                        continue;
                    }
                    // KVM had something else to do first.
                    libc::EAGAIN => continue,
                    // The guest stored to where no memory is to be written, and the processor did not
                    // tell what.
                    libc::ENOSYS => return self.fail("KVM could not emulate an instruction"),
                    _ => return self.fail(&format!("run the guest: {error}")),
                },
            };
            match Host::translate(exit, &self.memory) {
                Some(GuestExit::Read { space, address, data }) => {
                    lock(&self.counter).read(space, address);
                    self.posted.carry_out(&self.buses.memory);
                    self.buses.of(space).read(address, data);
                }
                Some(GuestExit::Write { space, address, data }) => {
                    lock(&self.counter).write(space, address);
                    self.posted.carry_out(&self.buses.memory);
                    self.buses.of(space).write(address, data);
                }
                Some(GuestExit::Handled) => lock(&self.counter).handled(),
                Some(GuestExit::Shutdown) => return self.control.end(Exit::PowerOff),
                Some(GuestExit::Reset) => return self.control.end(Exit::Reset),
                Some(GuestExit::TripleFault) => return self.control.end(Exit::TripleFault),
                // Nobody knows how to go on after it.
                None => return self.fail(&explain(fd.get_kvm_run())),
            }
        }
    }

    /// Puts zeros where the guest's windows reach beyond the ends of files. Returns whether there was
    /// anything to do, so that what failed may work now.
    fn patch_windows(&self) -> bool {
        self.windows.iter().filter(|window| window.patch()).count() != 0
    }

    /// How often anybody had something to do about them.
    fn patches(&self) -> u64 {
        self.windows.iter().map(|window| window.patches()).sum()
    }

    fn fail(&self, message: &str) {
        self.control.end(Exit::Failed(format!("vCPU {}: {message}", self.index)));
    }
}

impl Buses {
    fn of(&self, space: Space) -> &Bus {
        match space {
            Space::Memory => &self.memory,
            Space::Port => &self.ports,
        }
    }
}

/// What KVM says about an exit after which there is no way to go on.
fn explain(run: &kvm_run) -> String {
    let exit = run.exit_reason;
    match exit {
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: with this reason KVM fills in this member, and plain numbers are always valid.
            let error = unsafe { run.__bindgen_anon_1.internal.suberror };
            let what = match error {
                KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate an instruction",
                KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an event to the guest",
                _ => "KVM met an exit it does not know",
            };
            format!("{what} (KVM exit reason {exit}, internal error {error})")
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: with this reason KVM fills in this member, and plain numbers are always valid.
            let code = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
            format!(
                "the processor refused the guest's state (KVM exit reason {exit}, failure {code:#x})"
            )
        }
        _ => format!("unexpected exit (KVM exit reason {exit})"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it counts or runs the guest")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(exit_reason: u32, first_words: u64) -> String {
        let mut run = kvm_run { exit_reason, ..Default::default() };
        run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason = first_words;
        explain(&run)
    }

    #[test]
    fn what_kvm_could_not_do_is_told_apart() {
        let emulation = explained(KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION.into());
        let delivery = explained(KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV.into());

        assert!(emulation.starts_with("KVM could not emulate an instruction"), "{emulation}");
        assert!(delivery.starts_with("KVM could not deliver an event"), "{delivery}");
        assert!(delivery.ends_with("internal error 3)"), "{delivery}");
    }

    #[test]
    fn a_refused_entry_comes_with_the_processors_reason() {
        let refused = explained(KVM_EXIT_FAIL_ENTRY, 0x8000_0021);

        assert!(refused.ends_with("failure 0x80000021)"), "{refused}");
    }

    #[test]
    fn an_exit_nobody_knows_is_told_by_its_number() {
        assert_eq!(explained(4711, 0), "unexpected exit (KVM exit reason 4711)");
    }
}
