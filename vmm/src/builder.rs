//! From a configuration to a machine whose guest can run: the boot, top to bottom.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arch::machine::{BootFiles, Entry, Machine, MemoryMap, MmioDevice};
use arch::{Arch, ArchError, Host, Kvm, VcpuFd, VmFd};
use devices::listener::{SocketFile, folder_of};
use devices::virtio::mmio::RegisterPages;
use log::warn;
use nix::unistd::geteuid;
use vm_memory::GuestMemoryMmap;

use crate::attachment::Slots;
use crate::check::check_memory;
use crate::config::{BootConfig, MemoryBacking, VmConfig};
use crate::confinement::Confinement;
use crate::console::ConsoleLog;
use crate::control::Control;
use crate::dax;
use crate::error::Error;
use crate::handle::VmHandle;
use crate::jail::{Jail, JailError, beside};
use crate::memory::{GuestRam, MemoryError, Pluggable, SavedMemory, Store};
use crate::metrics::{Metrics, Record, now_ns};
use crate::peripherals::{self, Ends};
use crate::placement::{self, Placed, Placement};
use crate::pmem::{self, MappedFile};
use crate::posted::PostedWrites;
use crate::processors::{Processors, Shared};
use crate::seccomp::{self, Kind};
use crate::state::{MachineState, Shape};
use crate::vsock;

/// What a kernel is told whose memory can grow: to use what is plugged in without being told to, and
/// for pages that can move, as long as they are at most three quarters of all memory, so that it can
/// be unplugged again.
const PLUG_CMDLINE: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// A virtual machine that is complete but not running.
pub struct Vmm {
    control: Arc<Control>,
    vcpus: Vec<VcpuFd>,
    /// Those that had to be created, and are not granted yet.
    spare_vcpus: Vec<VcpuFd>,
    posted: PostedWrites,
    placed: Placed,
    console: ConsoleLog,
    ends: Ends,
    record: Record,
    confinement: Confinement,
    shape: Shape,
    kvm: Kvm,
    board: <Host as Arch>::Board,
    vm: Arc<VmFd>,
    ram: GuestRam,
}

impl Vmm {
    /// Opens and builds everything `config` names. The guest does not run yet.
    #[expect(clippy::needless_pass_by_value, reason = "one configuration makes one machine")]
    pub fn new(config: VmConfig) -> Result<Vmm, Error> {
        let mut memory_file = None;
        let built = Vmm::build(&config, &mut memory_file);
        // Whoever tries again wants it made again.
        if let (Err(_), Some(path)) = (&built, memory_file) {
            let _ = std::fs::remove_file(path);
        }
        built
    }

    /// Does what [`Vmm::new`] says, and says whether it made a file for the memory.
    fn build<'a>(config: &'a VmConfig, memory_file: &mut Option<&'a Path>) -> Result<Vmm, Error> {
        let started_ns = now_ns();
        config.validate()?;
        if config.seccomp && !seccomp::is_available() {
            return Err(Error::NoFilter);
        }
        check_memory(&config.memory)?;
        Confinement::check(config)?;
        let mut boot = open_boot_files(&config.boot)?;
        let load = |memory: &GuestMemoryMmap| {
            Host::load(memory, &mut boot).map_err(|source| cannot_load(&config.boot, source))
        };
        let store = || {
            let store = Store::create(&config.memory.backing)?;
            if let MemoryBacking::File(path) = &config.memory.backing {
                *memory_file = Some(path);
            }
            Ok(store)
        };
        let (mut vmm, entry) = Vmm::assemble(config, started_ns, store, load)?;

        vmm.describe(config, entry)?;
        for (index, vcpu) in (0..).zip(vmm.vcpus.iter().chain(&vmm.spare_vcpus)) {
            vmm.reset_vcpu(vcpu, index, (index == 0).then_some(&entry))?;
        }
        vmm.record.built_ns = now_ns();
        Ok(vmm)
    }

    /// Builds the machine of `config` anew, to go on where the one stood that `state` was saved of,
    /// with its `memory`. What `config` says of booting and of where memory is kept does not matter;
    /// all else must be as it was, but taps, disks and the like may be others that do as well. A file that
    /// the guest maps must be the same: it may have noted where things are in it.
    ///
    /// For the guest no time passes. Its connections over the socket device end, like after a reset.
    /// Files of a share that it knows are found again by their names; those that are not answer ESTALE.
    #[expect(clippy::needless_pass_by_value, reason = "one configuration makes one machine")]
    pub fn restore(
        config: VmConfig,
        state: &MachineState,
        memory: SavedMemory,
    ) -> Result<Vmm, Error> {
        let started_ns = now_ns();
        config.validate()?;
        check_memory(&config.memory)?;
        state.compare(&config)?;
        let store = || Ok(Store::of_saved(memory));
        let (mut vmm, ()) = Vmm::assemble(&config, started_ns, store, |_| Ok(()))?;

        for (vcpu, state) in vmm.vcpus.iter().zip(&state.vcpus) {
            Host::restore_vcpu(&vmm.vm, vcpu, state).map_err(step("restore a vCPU"))?;
        }
        for (index, vcpu) in (config.vcpus..).zip(&vmm.spare_vcpus) {
            vmm.reset_vcpu(vcpu, index, None)?;
        }
        Host::restore_board(&vmm.board, &vmm.vm, &state.board)
            .map_err(step("restore the machine"))?;
        // Last, because they interrupt the guest.
        vmm.placed.kept.restore(&state.devices)?;
        vmm.record.built_ns = now_ns();
        Ok(vmm)
    }

    /// A machine with memory, devices, and vCPUs without registers, and what `fill` gives, which puts
    /// into memory what the guest starts with.
    ///
    /// KVM makes a machine in some milliseconds of waiting, for grace periods of the host's kernel. So
    /// do mount namespaces. What can be done meanwhile is.
    fn assemble<T: Send>(
        config: &VmConfig,
        started_ns: u64,
        store: impl FnOnce() -> Result<Store, MemoryError>,
        fill: impl FnOnce(&GuestMemoryMmap) -> Result<T, Error> + Send,
    ) -> Result<(Vmm, T), Error> {
        let mut record = Record { started_ns, ..Record::default() };
        let kvm = open_kvm()?;
        let mut map = Host::memory_map(u64::from(config.memory.size_mib) << 20);
        let mut ram = GuestRam::allocate(&map, &config.memory, store()?)?;
        let memory = ram.memory().clone();
        let (filled, core) = beside(
            || build_jail(config).and_then(|jail| Ok((jail, fill(&memory)?, now_ns()))),
            || Core::create(&kvm, config, &mut map, &mut ram),
        )
        .map_err(|source| Error::Start { what: "a thread", source })?;
        let core = core?;
        let (jail, filled, loaded_ns) = filled?;
        record.loaded_ns = loaded_ns;
        record.machine_ns = now_ns();

        let console = peripherals::open_console(&config.console)?;
        let memory = ram.device_memory();
        let mut placement = Placement::new(&core.vm, &core.posted, memory, &core.registers)
            .map_err(|source| Error::Place { name: "(any)".to_owned(), source })?
            .with_dax_at(core.windows);
        let control = Control::new(config.vcpus)
            .map_err(|source| Error::Start { what: "the machine's control", source })?;
        let ends = peripherals::place_all(
            config,
            &console,
            jail.as_deref(),
            &core.files,
            core.pluggable,
            &mut placement,
        )?;
        let mut placed = placement.finish();
        record.devices_ns = now_ns();
        record.activities = mem::take(&mut placed.activities);
        let vmm = Vmm {
            control: Arc::new(control),
            vcpus: core.vcpus,
            spare_vcpus: core.spare_vcpus,
            posted: core.posted,
            placed,
            console,
            ends,
            record,
            confinement: Confinement::of(config, jail),
            shape: Shape::of(config),
            kvm,
            board: core.board,
            vm: core.vm,
            ram,
        };
        Ok((vmm, filled))
    }

    fn describe(&self, config: &VmConfig, entry: Entry) -> Result<(), Error> {
        let devices = &self.placed.devices;
        let cmdline = cmdline(config, devices);
        let machine = Machine { vcpus: config.most_vcpus(), cmdline: &cmdline, entry, devices };
        Host::describe(&self.board, self.ram.memory(), &machine)
            .map_err(step("describe the machine to the guest"))
    }

    fn reset_vcpu(&self, vcpu: &VcpuFd, index: u8, entry: Option<&Entry>) -> Result<(), Error> {
        Host::reset_vcpu(&self.kvm, &self.vm, vcpu, index, self.shape.most_vcpus, entry)
            .map_err(step("set a vCPU's registers"))
    }

    /// The host's end of the socket device, if the VM has one: streams may be connected and
    /// listeners opened before the guest runs.
    pub fn vsock(&self) -> Option<&vsock::Host> {
        self.ends.vsock.as_ref()
    }

    /// The sockets that the machine made, for another process to remove them when it has ended: one that
    /// called [`Vmm::start_confined`] cannot.
    pub fn take_sockets(&mut self) -> Vec<PathBuf> {
        self.placed.socket_files.drain(..).map(SocketFile::into_path).collect()
    }

    /// What it cost so far.
    pub fn metrics(&self) -> Metrics {
        self.record.metrics()
    }

    /// Starts the machine's threads, and with them the guest.
    pub fn start(self) -> Result<VmHandle, Error> {
        self.start_threads(false)
    }

    /// Starts the machine's threads, and confines the calling one, which is to control them from now on: it
    /// sees no file of the host but what is shared, becomes the machine's user, and keeps no capability and
    /// only few system calls. For a thread that has nothing else to do. The guest does not run before
    /// [`VmHandle::resume`].
    ///
    /// vCPUs can be granted as always, and devices attached that another process has [`crate::Opened`].
    pub fn start_confined(self) -> Result<VmHandle, Error> {
        self.control.hold();
        let handle = self.start_threads(true)?;
        handle.filter_this_thread().map_err(unconfined)?;
        Ok(handle)
    }

    fn start_threads(self, with_privileges_given_up: bool) -> Result<VmHandle, Error> {
        let Placed { buses, kept, vmm_loop, io_loop, spares, socket_files, dax, .. } = self.placed;
        let has_spares = !spares.is_empty();
        let names = self.record.activities.iter().map(|(name, _)| name.clone()).collect();
        let shared = Shared {
            memory: self.ram.memory().clone(),
            buses: Arc::new(buses),
            posted: Arc::new(self.posted),
            windows: dax,
            control: self.control.clone(),
            confinement: self.confinement.clone(),
        };
        let mut handle = VmHandle {
            control: self.control,
            processors: Processors::new(shared, self.shape.most_vcpus, self.spare_vcpus),
            console: self.console,
            ends: self.ends,
            record: self.record,
            slots: Slots::new(self.ram.device_memory().clone(), names, spares),
            loops: Vec::with_capacity(2),
            _socket_files: socket_files,
            devices: kept,
            shape: self.shape,
            kvm: self.kvm,
            board: self.board,
            vm: self.vm,
            ram: self.ram,
        };
        // Whoever has given something up starts no thread that keeps it.
        let keeps_some = |kind| kind == Kind::Io && self.confinement.serves_files;
        let loops = [(Kind::Io, io_loop), (Kind::Vmm, vmm_loop)].into_iter();
        let (first, later): (Vec<_>, Vec<_>) = loops
            .filter(|(_, subscribers)| !subscribers.is_empty() || has_spares)
            .partition(|(kind, _)| keeps_some(*kind));
        handle.start_loops(first)?;
        if with_privileges_given_up {
            handle.give_up_privileges().map_err(unconfined)?;
        }
        handle.start_loops(later)?;
        for vcpu in self.vcpus {
            let start = |source| Error::Start { what: "a vCPU thread", source };
            handle.processors.start(vcpu).map_err(start)?;
        }
        Ok(handle)
    }
}

fn unconfined(source: io::Error) -> Error {
    Error::Start { what: "the guest, as privileges cannot be given up", source }
}

/// What KVM has of a machine.
struct Core {
    posted: PostedWrites,
    vcpus: Vec<VcpuFd>,
    spare_vcpus: Vec<VcpuFd>,
    board: <Host as Arch>::Board,
    /// The memory that can be plugged in.
    pluggable: Option<Pluggable>,
    /// Where the windows of the shares are.
    windows: Range<u64>,
    files: Vec<MappedFile>,
    registers: RegisterPages,
    vm: Arc<VmFd>,
}

impl Core {
    /// Makes one with the memory `ram`, to which all is added that extends it, at addresses out of `map`.
    fn create(
        kvm: &Kvm,
        config: &VmConfig,
        map: &mut MemoryMap,
        ram: &mut GuestRam,
    ) -> Result<Self, Error> {
        let vm = Arc::new(create_vm(kvm)?);
        ram.register(&vm)?;
        let pluggable = ram.add_pluggable(&vm, &mut map.extension_window, &config.memory)?;
        let windows = dax::take_addresses(&config.shares, &mut map.extension_window)
            .map_err(peripherals::device("shares"))?;
        let files = pmem::map_all(&config.pmem, &map.extension_window, ram, &vm)?;
        let registers = ram.add_registers(&vm, placement::registers(&map.device_window))?;
        let mut board =
            Host::before_vcpus(kvm, &vm).map_err(step("prepare the machine for vCPUs"))?;
        // Before the devices, because there are no interrupt lines yet.
        let mut vcpus = create_vcpus(config, &vm, &mut board)?;
        let spare_vcpus = vcpus.split_off(config.vcpus.into());
        let posted = open_posted(&vm, &vcpus)?;
        Ok(Core { posted, vcpus, spare_vcpus, board, pluggable, windows, files, registers, vm })
    }
}

/// Where KVM notes writes that nobody waits for: the vCPUs share the ring of the first one.
fn open_posted(vm: &VmFd, vcpus: &[VcpuFd]) -> Result<PostedWrites, Error> {
    PostedWrites::open(vm, vcpus.first())
        .map_err(|source| Error::Start { what: "the ring of posted writes", source })
}

fn step(step: &'static str) -> impl FnOnce(ArchError) -> Error {
    move |source| Error::Arch { step, source }
}

/// Whoever has not all that it takes goes without, and is told.
fn build_jail(config: &VmConfig) -> Result<Option<Arc<Jail>>, Error> {
    let refused = |reason: &dyn Display| {
        warn!("the machine's threads go on seeing the host's files, as this user cannot {reason}");
        Ok(None)
    };
    if !Jail::is_allowed() {
        return refused(&"have a mount namespace (CAP_SYS_ADMIN, CAP_SYS_CHROOT)");
    }
    let shares = config.shares.iter().map(|share| share.path.as_path());
    let socket = config.vsock.as_ref().and_then(|vsock| vsock.socket.as_deref());
    match Jail::build_around_this_thread(shares, socket.map(folder_of)) {
        // In a user namespace, where some hosts let nobody do anything.
        Err(JailError::Build { step, source }) if !geteuid().is_root() => {
            refused(&format!("{step}: {source}"))
        }
        built => Ok(Some(Arc::new(built?))),
    }
}

/// What is wrong with the kernel or the initrd of `boot`.
pub(crate) fn cannot_load(boot: &BootConfig, source: ArchError) -> Error {
    match (&source, &boot.initrd) {
        (ArchError::InitrdTooBig { .. } | ArchError::Read { what: "initrd", .. }, Some(initrd)) => {
            Error::Load { what: "initrd", path: initrd.clone(), source }
        }
        _ => Error::Load { what: "kernel", path: boot.kernel.clone(), source },
    }
}

pub(crate) fn open_boot_files(boot: &BootConfig) -> Result<BootFiles, Error> {
    Ok(BootFiles {
        kernel: open_file("kernel", &boot.kernel)?,
        initrd: boot.initrd.as_deref().map(|path| open_file("initrd", path)).transpose()?,
        protocol: boot.protocol.into(),
    })
}

/// Opens a regular file that is not empty for reading.
pub(crate) fn open_file(what: &'static str, path: &Path) -> Result<File, Error> {
    let open = |source| Error::Open { what, path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(open)?;
    // Opening a FIFO would wait for a writer, for ever.
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a directory" } else { "a special file" };
        return Err(Error::NotAFile { what, path: path.to_owned(), found });
    }
    if metadata.len() == 0 {
        return Err(Error::EmptyFile { what, path: path.to_owned() });
    }
    File::open(path).map_err(open)
}

fn open_kvm() -> Result<Kvm, Error> {
    Kvm::new().map_err(|source| Error::OpenKvm { remedy: remedy(source.errno()), source })
}

/// What to do about a /dev/kvm that cannot be opened for reason `errno`.
fn remedy(errno: i32) -> &'static str {
    match errno {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => {
            "this host offers no virtualization: load the module (modprobe kvm_intel or kvm_amd), \
             enable virtualization in the firmware, or nested virtualization if the host is itself \
             a virtual machine"
        }
        libc::EACCES => "no permission: run as root, or join the group kvm (usermod -aG kvm USER)",
        libc::EPERM => {
            "forbidden: the device cgroup or a security module of this host must allow /dev/kvm \
             (character device 10:232)"
        }
        libc::EMFILE | libc::ENFILE => "too many open files: raise the limit (ulimit -n)",
        _ => "it cannot be used",
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    loop {
        match kvm.create_vm() {
            // Making a VM takes so long that a signal may come first.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(|source| cannot_create("create a machine", source)),
        }
    }
}

/// Creates the vCPUs that the machine cannot do without, and so completes its interrupt controller.
fn create_vcpus(
    config: &VmConfig,
    vm: &VmFd,
    board: &mut <Host as Arch>::Board,
) -> Result<Vec<VcpuFd>, Error> {
    let count = Host::vcpus_to_create(config.vcpus, config.most_vcpus());
    let vcpus = (0..count)
        .map(|index| vm.create_vcpu(index.into()))
        .collect::<Result<_, _>>()
        .map_err(|source| cannot_create("create a vCPU", source))?;
    Host::after_vcpus(board, vm, count).map_err(step("finish the interrupt controller"))?;
    Ok(vcpus)
}

/// KVM takes hold of the processors with the first machine, not when it is opened.
fn cannot_create(step: &'static str, source: kvm_ioctls::Error) -> Error {
    match source.errno() {
        libc::EBUSY => Error::KvmBusy { source },
        _ => Error::Kvm { step, source },
    }
}

/// The kernel's parameters: what the machine needs first, so that the user's can override it.
fn cmdline(config: &VmConfig, devices: &[MmioDevice]) -> String {
    // Each character on a UART is an exit, so only who asks for it gets the early messages.
    let console = if config.console.serial { "console=ttyS0" } else { "console=hvc0 quiet" };
    let mut words = vec![Host::DEFAULT_CMDLINE.to_owned(), console.to_owned()];
    if config.memory.pluggable_mib != 0 {
        words.push(PLUG_CMDLINE.to_owned());
    }
    if config.most_vcpus() > config.vcpus {
        // It would wait ten seconds for each of the others.
        words.push(format!("maxcpus={}", config.vcpus));
    }
    words.extend(devices.iter().filter_map(Host::cmdline_device));
    words.extend(Some(config.boot.cmdline.trim().to_owned()).filter(|own| !own.is_empty()));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(config: VmConfig) -> String {
        let error = anyhow::Error::from(Vmm::new(config).err().unwrap());
        format!("{error:#}")
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = error(VmConfig::new("/nonexistent/vmlinux".into()));

        assert!(error.starts_with("open kernel \"/nonexistent/vmlinux\": No such file"), "{error}");
    }

    #[test]
    fn a_directory_is_no_kernel() {
        let error = error(VmConfig::new("/".into()));

        assert_eq!(error, "kernel \"/\" is a directory, not a file");
    }

    #[test]
    fn an_empty_initrd_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();

        let error = open_file("initrd", file.path()).unwrap_err().to_string();

        assert_eq!(error, format!("initrd {:?} is empty", file.path()));
    }

    #[test]
    fn a_wrong_value_is_refused_before_anything_is_opened() {
        let mut config = VmConfig::new("/nonexistent".into());
        config.vcpus = 0;

        let error = error(config);

        assert_eq!(error, "invalid machine configuration: vcpus: must be 1 to 64, not 0");
    }

    #[test]
    fn a_user_outside_the_group_is_told_about_it() {
        assert!(remedy(libc::EACCES).contains("usermod -aG kvm"));
        assert!(remedy(libc::ENOENT).contains("modprobe kvm_intel"));
    }

    #[test]
    fn a_processor_in_use_by_another_hypervisor_is_told_so() {
        let busy = kvm_ioctls::Error::new(libc::EBUSY);

        let error = cannot_create("create a machine", busy).to_string();

        assert!(error.contains("another hypervisor"), "{error}");
    }

    #[test]
    fn the_users_parameters_come_last() {
        let mut config = VmConfig::new("/k".into());
        config.boot.cmdline = " loglevel=7 ".into();

        let cmdline = cmdline(&config, &[]);

        assert_eq!(cmdline, format!("{} console=hvc0 quiet loglevel=7", Host::DEFAULT_CMDLINE));
    }

    #[test]
    fn a_kernel_that_can_grow_is_told_to_use_what_it_gets() {
        let mut config = VmConfig::new("/k".into());
        config.memory.pluggable_mib = 128;

        assert!(cmdline(&config, &[]).contains(" memhp_default_state=online "));
    }

    #[test]
    fn a_kernel_starts_no_more_vcpus_than_there_are() {
        let mut config = VmConfig::new("/k".into());
        assert!(!cmdline(&config, &[]).contains("maxcpus"));
        config.vcpus = 2;
        config.max_vcpus = Some(4);

        assert!(cmdline(&config, &[]).ends_with(" maxcpus=2"));
    }

    #[test]
    fn a_serial_console_is_not_quiet() {
        let mut config = VmConfig::new("/k".into());
        config.console.serial = true;

        assert_eq!(cmdline(&config, &[]), format!("{} console=ttyS0", Host::DEFAULT_CMDLINE));
    }
}
