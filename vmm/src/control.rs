//! The wish of whoever runs the VM (run, pause, stop) against what its vCPU threads do.
//!
//! A vCPU thread looks at the wish at a checkpoint only: before its first entry into the guest and
//! whenever a signal pulls it out of the guest. Whoever changes the wish sends that signal, so the
//! way in and out of the guest needs no lock. The first reason to end wins and is final.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use arch::VcpuFd;
use libc::{c_int, c_void, pid_t, siginfo_t};
use rustix::thread::gettid;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::metrics::now_ns;
use crate::state::Unsaved;

/// How a virtual machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's processor met a fault it could not report; `reboot=t` asks for a reset so.
    TripleFault,
    /// [`crate::VmHandle::stop`] was called.
    Stopped,
    /// The VM could not go on, for this reason.
    Failed(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

/// Shared by all vCPU threads and every holder of the VM.
pub struct Control {
    group: Mutex<Group>,
    changed: Condvar,
    ended: EventFd,
}

struct Group {
    wish: Wish,
    /// How many vCPU threads there are, or will be at once.
    vcpus: usize,
    /// Kernel ids of the vCPU threads that passed their first checkpoint.
    threads: Vec<pid_t>,
    /// How many of them wait at a checkpoint.
    parked: usize,
    first_entry_ns: u64,
    outcome: Option<Exit>,
}

impl Control {
    /// For a VM of `vcpus` vCPUs, which shall run as soon as their threads start.
    pub fn new(vcpus: u8) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), leave_guest)?;
        let group = Group {
            wish: Wish::Run,
            vcpus: vcpus.into(),
            threads: Vec::with_capacity(vcpus.into()),
            parked: 0,
            first_entry_ns: 0,
            outcome: None,
        };
        Ok(Control {
            group: Mutex::new(group),
            changed: Condvar::new(),
            ended: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Makes the calling thread the one that runs `vcpu`: from now on a change of wish pulls it out
    /// of the guest.
    pub fn adopt(&self, vcpu: &mut VcpuFd) -> io::Result<()> {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        unblock_signal(SIGRTMIN()).map_err(|error| io::Error::other(format!("{error:?}")))?;
        let mut group = self.lock();
        group.threads.push(gettid().as_raw_nonzero().get());
        Ok(())
    }

    /// Makes room for a vCPU whose thread is started by `start`: from now on a pause waits for it, too.
    pub fn add_vcpu<T, E>(&self, start: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.lock().vcpus += 1;
        start().inspect_err(|_| {
            self.lock().vcpus -= 1;
            self.changed.notify_all();
        })
    }

    /// Called by a vCPU thread outside the guest: waits while the VM is paused, and says whether the
    /// vCPU may enter the guest again.
    pub fn checkpoint(&self) -> bool {
        let mut group = self.lock();
        group.parked += 1;
        if group.wish == Wish::Pause {
            self.changed.notify_all();
        }
        while group.wish == Wish::Pause {
            group = self.wait(group);
        }
        group.parked -= 1;
        if group.first_entry_ns == 0 {
            group.first_entry_ns = now_ns();
        }
        group.wish == Wish::Run
    }

    /// Keeps the vCPUs that are to be started out of the guest, until [`Control::resume`].
    pub fn hold(&self) {
        let mut group = self.lock();
        if group.wish == Wish::Run {
            group.wish = Wish::Pause;
        }
    }

    /// Returns once every vCPU is out of the guest.
    pub fn pause(&self) {
        let mut group = self.lock();
        if group.wish == Wish::Run {
            group.wish = Wish::Pause;
            group.kick();
        }
        while group.wish == Wish::Pause && group.parked < group.vcpus {
            group = self.wait(group);
        }
    }

    /// Like [`Control::pause`], but gives up after `patience`, and lets the VM go on then: a vCPU may
    /// wait for whoever reads the guest's output. Returns whether every vCPU is out of the guest.
    pub fn pause_within(&self, patience: Duration) -> bool {
        let mut group = self.lock();
        if group.wish == Wish::Run {
            group.wish = Wish::Pause;
            group.kick();
        }
        let is_waiting =
            |group: &mut Group| group.wish == Wish::Pause && group.parked < group.vcpus;
        let (mut group, wait) = self
            .changed
            .wait_timeout_while(group, patience, is_waiting)
            .expect("nothing panics while it holds the group");
        if wait.timed_out() {
            group.wish = Wish::Run;
            self.changed.notify_all();
        }
        !wait.timed_out()
    }

    /// Does `act` while the VM is paused and cannot be resumed.
    pub fn while_paused<T>(&self, act: impl FnOnce() -> T) -> Result<T, Unsaved> {
        let group = self.lock();
        if group.outcome.is_some() {
            return Err(Unsaved::Ended);
        }
        if group.wish != Wish::Pause || group.parked < group.vcpus {
            return Err(Unsaved::Running);
        }
        Ok(act())
    }

    /// Lets a paused VM go on.
    pub fn resume(&self) {
        let mut group = self.lock();
        if group.wish == Wish::Pause {
            group.wish = Wish::Run;
            self.changed.notify_all();
        }
    }

    /// Ends the VM because of `exit`, unless it ended before.
    pub fn end(&self, exit: Exit) {
        let mut group = self.lock();
        if group.outcome.is_some() {
            return;
        }
        group.outcome = Some(exit);
        group.wish = Wish::Stop;
        group.kick();
        self.changed.notify_all();
        self.ended.write(1).expect("an eventfd takes a 1");
    }

    /// Whether the VM has ended.
    pub fn has_ended(&self) -> bool {
        self.lock().outcome.is_some()
    }

    /// Blocks until the VM has ended, and says how.
    pub fn outcome(&self) -> Exit {
        let mut group = self.lock();
        loop {
            match &group.outcome {
                Some(exit) => return exit.clone(),
                None => group = self.wait(group),
            }
        }
    }

    /// Readable once the VM has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd stays open for as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.ended.as_raw_fd()) }
    }

    /// When the first vCPU entered the guest, in nanoseconds of CLOCK_MONOTONIC; 0 before.
    pub fn first_entry_ns(&self) -> u64 {
        self.lock().first_entry_ns
    }

    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().expect("nothing panics while it holds the group")
    }

    fn wait<'a>(&self, group: MutexGuard<'a, Group>) -> MutexGuard<'a, Group> {
        self.changed.wait(group).expect("nothing panics while it holds the group")
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended()
    }
}

impl Group {
    /// Pulls every vCPU thread out of the guest.
    fn kick(&self) {
        for &thread in &self.threads {
            // SAFETY: the handler of this signal is installed and touches only its own thread's
            // data; a thread that is gone makes the call fail, which is as good as a kick.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

thread_local! {
    /// Where this thread's vCPU looks before it enters the guest (KVM API, `immediate_exit`); null
    /// in every other thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Makes the next entry into the guest return at once. Without this, a signal that arrives between
/// the checkpoint and the entry would be lost.
extern "C" fn leave_guest(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `adopt` set it to a byte of this thread's kvm_run, which stays mapped until
        // `release`.
        unsafe { flag.write_volatile(1) };
    }
}

/// Undoes [`Control::adopt`]: to be called before the thread drops its vCPU.
pub fn release() {
    IMMEDIATE_EXIT.set(ptr::null_mut());
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn the_first_reason_to_end_is_kept() {
        let control = Control::new(1).unwrap();

        control.end(Exit::PowerOff);
        control.end(Exit::Stopped);

        assert_eq!(control.outcome(), Exit::PowerOff);
    }

    #[test]
    fn no_vcpu_enters_the_guest_after_the_end() {
        let control = Control::new(1).unwrap();
        assert!(control.checkpoint());

        control.end(Exit::Stopped);

        assert!(!control.checkpoint());
    }

    #[test]
    fn pause_returns_once_every_vcpu_waits() {
        let control = Arc::new(Control::new(2).unwrap());
        let pausing = thread::spawn({
            let control = control.clone();
            move || control.pause()
        });
        while control.lock().wish == Wish::Run {
            thread::yield_now();
        }

        let vcpus = [(); 2].map(|()| {
            let control = control.clone();
            thread::spawn(move || control.checkpoint())
        });
        pausing.join().unwrap();
        assert_eq!(control.lock().parked, 2);
        control.resume();

        assert!(vcpus.into_iter().all(|vcpu| vcpu.join().unwrap()));
    }

    #[test]
    fn a_pause_waits_for_a_vcpu_that_came_later_and_for_none_that_did_not_come() {
        let control = Arc::new(Control::new(1).unwrap());
        let start = || {
            let control = control.clone();
            thread::spawn(move || while control.checkpoint() {})
        };
        let first = start();

        let second = control.add_vcpu(|| Ok::<_, ()>(start())).unwrap();
        assert_eq!(control.add_vcpu(|| Err::<(), _>(7)), Err(7));
        control.pause();

        assert_eq!(control.lock().parked, 2);
        control.end(Exit::Stopped);
        [first, second].into_iter().for_each(|vcpu| vcpu.join().unwrap());
    }

    #[test]
    fn nothing_is_done_while_the_vm_runs_or_after_its_end() {
        let control = Arc::new(Control::new(1).unwrap());
        assert_eq!(control.while_paused(|| ()), Err(Unsaved::Running));
        let vcpu = thread::spawn({
            let control = control.clone();
            move || while control.checkpoint() {}
        });

        control.pause();
        assert_eq!(control.while_paused(|| 7), Ok(7));
        control.end(Exit::Stopped);

        assert_eq!(control.while_paused(|| ()), Err(Unsaved::Ended));
        vcpu.join().unwrap();
    }

    #[test]
    fn a_pause_that_takes_too_long_is_given_up() {
        let control = Control::new(1).unwrap();

        assert!(!control.pause_within(Duration::from_millis(1)));

        assert!(control.checkpoint());
    }

    #[test]
    fn a_paused_vm_can_be_ended() {
        let control = Arc::new(Control::new(1).unwrap());
        let vcpu = thread::spawn({
            let control = control.clone();
            move || {
                while control.checkpoint() {
                    thread::yield_now();
                }
            }
        });
        control.pause();

        control.end(Exit::Stopped);

        vcpu.join().unwrap();
        assert_eq!(control.outcome(), Exit::Stopped);
    }

    #[test]
    fn resume_of_an_ended_vm_does_nothing() {
        let control = Control::new(1).unwrap();
        control.end(Exit::Reset);

        control.resume();

        assert!(!control.checkpoint());
    }
}
