//! The vCPUs of a running machine: those it started with, and those that are granted to it later.
//!
//! A vCPU that is not granted costs the host next to nothing: the scheduler does not know of it, nor does
//! KVM where it takes one later ([`Arch::vcpus_to_create`]). The guest knows all of them, and finds that
//! one which is not granted does not start. Once granted, a vCPU stays: KVM takes none back. A guest that
//! takes it offline lets its thread sleep.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use arch::{Arch, ArchError, Host, Kvm, VcpuFd, VmFd};
use devices::virtio::fs::Window;
use vm_memory::GuestMemoryMmap;

use crate::confinement::Confinement;
use crate::control::Control;
use crate::metrics::{Counter, ExitCounts};
use crate::posted::PostedWrites;
use crate::vcpu::{Buses, Vcpu};

/// Why a machine did not get more vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// It has more already, or can never have so many.
    #[error(
        "must be {least} to {most}: the machine has {least} vCPUs, which it keeps, and `max_vcpus` \
         is {most}"
    )]
    Count {
        /// How many it has.
        least: u8,
        /// How many it can have.
        most: u8,
    },
    /// KVM refused to make one.
    #[error("create a vCPU")]
    Create(#[source] kvm_ioctls::Error),
    /// KVM refused its registers.
    #[error("set a vCPU's registers")]
    Reset(#[source] ArchError),
    /// The host cannot run another thread.
    #[error("start a vCPU thread")]
    Start(#[source] std::io::Error),
}

/// What every vCPU of a machine shares.
pub struct Shared {
    /// Guest RAM, for exits that refer to it.
    pub memory: GuestMemoryMmap,
    /// Where accesses go.
    pub buses: Arc<Buses>,
    /// What of it KVM still holds back.
    pub posted: Arc<PostedWrites>,
    /// Where the guest maps files.
    pub windows: Arc<[Arc<Window>]>,
    /// Run, pause or stop.
    pub control: Arc<Control>,
    /// What their threads are left with.
    pub confinement: Confinement,
}

/// The vCPUs of a running machine.
pub struct Processors {
    shared: Shared,
    most: u8,
    granted: Mutex<Granted>,
}

struct Granted {
    /// Those that exist and wait to be granted, their registers set; the one with the lowest number first.
    spare: VecDeque<Arc<Mutex<VcpuFd>>>,
    /// The next one, whose registers KVM has refused.
    unset: Option<VcpuFd>,
    threads: Vec<JoinHandle<()>>,
    /// What the threads run; free while they are out of the guest.
    fds: Vec<Arc<Mutex<VcpuFd>>>,
    counters: Vec<Arc<Mutex<Counter>>>,
}

impl Processors {
    /// None yet, of `most` in all; `spare` are those that exist but are to be granted later.
    pub fn new(shared: Shared, most: u8, spare: Vec<VcpuFd>) -> Self {
        let granted = Granted {
            spare: spare.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect(),
            unset: None,
            threads: Vec::new(),
            fds: Vec::new(),
            counters: Vec::new(),
        };
        Processors { shared, most, granted: Mutex::new(granted) }
    }

    /// Starts the thread of the next vCPU, whose registers are set.
    pub fn start(&self, fd: VcpuFd) -> std::io::Result<()> {
        self.lock().start(&self.shared, Arc::new(Mutex::new(fd)))
    }

    /// What their threads are left with.
    pub fn confinement(&self) -> &Confinement {
        &self.shared.confinement
    }

    /// How many there are.
    pub fn count(&self) -> u8 {
        self.lock().count()
    }

    /// Makes vCPUs until there are `count`, each waiting for the guest to start it. After an error there may
    /// be some of them, and the others can be granted later.
    pub fn grant(&self, kvm: &Kvm, vm: &VmFd, count: u8) -> Result<(), GrantError> {
        let mut granted = self.lock();
        let (least, most) = (granted.count(), self.most);
        if !(least..=most).contains(&count) {
            return Err(GrantError::Count { least, most });
        }
        for index in least..count {
            let fd = granted.next(kvm, vm, index, most)?;
            let control = &self.shared.control;
            control.add_vcpu(|| granted.start(&self.shared, fd)).map_err(GrantError::Start)?;
            granted.spare.pop_front();
        }
        Ok(())
    }

    /// Carries out what the guest wrote to registers so far.
    pub fn carry_out_writes(&self) {
        self.shared.posted.carry_out(&self.shared.buses.memory);
    }

    /// Says where each of them stands. All must be out of the guest.
    pub fn save(&self, kvm: &Kvm) -> Result<Vec<<Host as Arch>::VcpuState>, ArchError> {
        let granted = self.lock();
        let fds = granted.fds.iter();
        fds.map(|fd| {
            let fd = fd.lock().expect("nothing panics while it runs the guest");
            Host::save_vcpu(kvm, &fd)
        })
        .collect()
    }

    /// Adds what all of them did to `sum`.
    pub fn add_to(&self, sum: &mut ExitCounts) {
        for counter in &self.lock().counters {
            counter.lock().expect("nothing panics while it counts").add_to(sum);
        }
    }

    /// Waits until the threads of a machine that ended are gone.
    pub fn join(&self) {
        for thread in self.lock().threads.drain(..) {
            // A panic of that thread was printed by the thread.
            let _ = thread.join();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Granted> {
        self.granted.lock().expect("nothing panics while it starts a thread")
    }
}

impl Granted {
    fn count(&self) -> u8 {
        u8::try_from(self.threads.len()).expect("no more than the configuration allows")
    }

    /// The first that is to be granted, waiting for the guest to start it. It stays there: KVM makes none
    /// twice, and its thread may fail to start.
    fn next(
        &mut self,
        kvm: &Kvm,
        vm: &VmFd,
        index: u8,
        most: u8,
    ) -> Result<Arc<Mutex<VcpuFd>>, GrantError> {
        if let Some(fd) = self.spare.front() {
            let waiting = fd.lock().expect("it has no thread");
            Host::await_start(&waiting).map_err(GrantError::Reset)?;
            return Ok(fd.clone());
        }
        let made = self.unset.take().map_or_else(|| vm.create_vcpu(index.into()), Ok);
        let fd = made.map_err(GrantError::Create)?;
        if let Err(error) = Host::reset_vcpu(kvm, vm, &fd, index, most, None) {
            self.unset = Some(fd);
            return Err(GrantError::Reset(error));
        }
        let fd = Arc::new(Mutex::new(fd));
        self.spare.push_back(fd.clone());
        Ok(fd)
    }

    fn start(&mut self, shared: &Shared, fd: Arc<Mutex<VcpuFd>>) -> std::io::Result<()> {
        let counter = Arc::new(Mutex::new(Counter::default()));
        let vcpu = Vcpu {
            index: self.count(),
            fd: fd.clone(),
            memory: shared.memory.clone(),
            buses: shared.buses.clone(),
            posted: shared.posted.clone(),
            windows: shared.windows.clone(),
            control: shared.control.clone(),
            counter: counter.clone(),
        };
        self.threads.push(vcpu.start(&shared.confinement)?);
        self.fds.push(fd);
        self.counters.push(counter);
        Ok(())
    }
}
