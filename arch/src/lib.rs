//! What the VMM asks of a CPU architecture: the [`Arch`] contract and [`Host`], the one this build
//! runs on. Nothing outside this crate names an architecture.
//!
//! The methods of [`Arch`] stand in the order of a boot. `layout.rs` and `tables.rs` of every
//! architecture are pure, and tested on x86_64 hosts for all. What talks to KVM exists on its own
//! architecture only.

pub mod error;
pub mod fdt;
mod initrd;
mod kernel_file;
pub mod kvm;
pub mod machine;
mod small_pages;

pub mod aarch64;
pub mod ppc64le;
pub mod x86_64;

use std::ops::Range;
use std::sync::atomic::AtomicU32;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vm_memory::GuestMemoryMmap;

pub use error::ArchError;
pub use kvm::{Kvm, VcpuExit, VcpuFd, VmFd};

use machine::{BootFiles, Entry, Exit, Machine, MemoryMap, MmioDevice, PlatformDevice};

/// What a CPU architecture does for a virtual machine, in the order of a boot.
pub trait Arch {
    /// Where a vCPU stands: all that a new one needs to go on in its place.
    type VcpuState: Serialize + DeserializeOwned + Send;

    /// What KVM made for a machine that all vCPUs share, and that is reached in no other way.
    type Board: Send + Sync;

    /// Where the interrupt controllers, timers and clocks stand that all vCPUs share.
    type BoardState: Serialize + DeserializeOwned + Send;

    /// What every guest kernel is told first, so that the user's own parameters override it.
    /// Consoles are not named here: they are the configuration's choice.
    const DEFAULT_CMDLINE: &'static str;

    /// Whether KVM has a thread of the host's kernel raise the line of an irqfd, later. Whoever raises it
    /// by `KVM_IRQ_LINE` has it raised at once.
    const IRQFDS_WAIT: bool;

    /// Where `ram_bytes` of RAM and the device windows lie in guest-physical memory.
    fn memory_map(ram_bytes: u64) -> MemoryMap;

    /// The devices that a machine of this architecture may have beside the virtio ones.
    fn platform_devices() -> &'static [PlatformDevice];

    /// KVM interrupt lines free for virtio devices.
    fn device_gsis() -> Range<u32>;

    /// Prepares a fresh VM: what KVM must know before the first vCPU exists.
    fn before_vcpus(kvm: &Kvm, vm: &VmFd) -> Result<Self::Board, ArchError>;

    /// How many vCPUs a machine must have before it is complete, that starts with `vcpus` and can have
    /// `most`: those that are not needed yet can come later, unless KVM does not let them.
    fn vcpus_to_create(vcpus: u8, most: u8) -> u8;

    /// Finishes the interrupt controller once the `vcpus` exist that are to be created. Only then do
    /// interrupt lines exist.
    fn after_vcpus(board: &mut Self::Board, vm: &VmFd, vcpus: u8) -> Result<(), ArchError>;

    /// Copies kernel and initrd into guest memory and says where the guest starts.
    fn load(memory: &GuestMemoryMmap, boot: &mut BootFiles) -> Result<Entry, ArchError>;

    /// Writes the tables from which the guest learns its command line, memory, processors and
    /// devices. Comes after [`Arch::load`].
    fn describe(
        board: &Self::Board,
        memory: &GuestMemoryMmap,
        machine: &Machine<'_>,
    ) -> Result<(), ArchError>;

    /// Gives vCPU `index` of the `vcpus` that there can be the registers of its first instruction: that
    /// at `entry`, or none, for a vCPU that waits until the guest starts it.
    fn reset_vcpu(
        kvm: &Kvm,
        vm: &VmFd,
        vcpu: &VcpuFd,
        index: u8,
        vcpus: u8,
        entry: Option<&Entry>,
    ) -> Result<(), ArchError>;

    /// Has `vcpu`, which was not granted until now and so has no thread, wait for the guest to start it. A
    /// guest may have tried that before: it gave up meanwhile, and must find the vCPU as it was. One that
    /// tries at this very moment has to try again.
    fn await_start(vcpu: &VcpuFd) -> Result<(), ArchError>;

    /// Says where `vcpu` stands. It must be outside the guest, with no access to a device half done.
    fn save_vcpu(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self::VcpuState, ArchError>;

    /// Makes `vcpu`, a fresh one in the place of the one that was saved, go on from `state`; instead
    /// of [`Arch::reset_vcpu`].
    fn restore_vcpu(vm: &VmFd, vcpu: &VcpuFd, state: &Self::VcpuState) -> Result<(), ArchError>;

    /// Says where the machine stands apart from its vCPUs, memory and devices.
    fn save_board(board: &Self::Board, vm: &VmFd) -> Result<Self::BoardState, ArchError>;

    /// Makes a fresh machine, all of whose vCPUs exist, go on from `state`.
    fn restore_board(
        board: &Self::Board,
        vm: &VmFd,
        state: &Self::BoardState,
    ) -> Result<(), ArchError>;

    /// How the kernel's command line names `device`, for a guest that finds devices there. `None`
    /// where [`Arch::describe`] is the only way.
    fn cmdline_device(device: &MmioDevice) -> Option<String>;

    /// Which names Linux' platform bus may give `device`, which is number `number` of
    /// [`Machine::devices`]: which one depends on how the guest found it.
    fn device_names(number: usize, device: &MmioDevice) -> Vec<String>;

    /// Makes what was stored to `word`, in memory that the guest may only read, what it reads from now on,
    /// even if it takes it for a register of a device.
    fn publish(word: &AtomicU32);

    /// What a KVM exit means in terms every architecture shares. `None` for an exit that no guest
    /// can cause on a working host.
    fn translate<'a>(exit: VcpuExit<'a>, memory: &GuestMemoryMmap) -> Option<Exit<'a>>;
}

/// The architecture this build runs on.
#[cfg(target_arch = "x86_64")]
pub type Host = x86_64::X86_64;
#[cfg(all(target_arch = "x86_64", feature = "testing"))]
pub use x86_64::{expected, payload, peer, program};

/// The architecture this build runs on.
#[cfg(target_arch = "aarch64")]
pub type Host = aarch64::Aarch64;
#[cfg(all(target_arch = "aarch64", feature = "testing"))]
pub use aarch64::{expected, payload, peer, program};

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!(
    "crate `arch` has no KVM backend for this target yet: implement `Arch` in its folder \
     and select it as `Host` in arch/src/lib.rs"
);

/// How QEMU is told to be a machine like ours.
#[cfg(feature = "testing")]
pub struct Qemu {
    /// What it is called among the peers.
    pub name: &'static str,
    /// Its program.
    pub program: &'static str,
    /// Its argument `-M`.
    pub machine: &'static str,
    /// Its argument `-cpu` where the guest is of no account: what any KVM can do.
    pub bare_processor: &'static str,
    /// What Linux calls its serial port.
    pub serial_port: &'static str,
}

/// An address below 4 GiB as a payload has it in its instructions.
#[cfg(feature = "testing")]
const fn short(address: u64) -> u32 {
    assert!(address <= u32::MAX as u64);
    let [a, b, c, d, ..] = address.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
