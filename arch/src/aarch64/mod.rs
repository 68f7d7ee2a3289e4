//! aarch64: one line per method of [`Arch`](crate::Arch), pointing at the files of this folder.

#[cfg(feature = "testing")]
#[path = "testing/expected.rs"]
pub mod expected;
pub mod layout;
#[cfg(feature = "testing")]
#[path = "testing/payload.rs"]
pub mod payload;
#[cfg(feature = "testing")]
#[path = "testing/peer.rs"]
pub mod peer;
#[cfg(feature = "testing")]
#[path = "testing/program.rs"]
pub mod program;
pub mod tables;

mod boot;
mod exits;
mod irqchip;
mod vcpu;
mod vm;

#[cfg(target_arch = "aarch64")]
pub use host::Aarch64;

#[cfg(target_arch = "aarch64")]
mod host {
    use std::ops::Range;
    use std::sync::atomic::AtomicU32;

    use vm_memory::GuestMemoryMmap;

    use super::irqchip::{self, Gic};
    use super::{boot, exits, layout, tables, vcpu, vm};
    use crate::machine::{BootFiles, Entry, Exit, Machine, MemoryMap, MmioDevice, PlatformDevice};
    use crate::{Arch, ArchError, Kvm, VcpuExit, VcpuFd, VmFd};

    /// A machine that its device tree describes: interrupt controller and PSCI inside KVM, no firmware.
    #[derive(Debug)]
    pub struct Aarch64;

    impl Arch for Aarch64 {
        type VcpuState = vcpu::State;
        type Board = Gic;
        type BoardState = irqchip::State;

        const DEFAULT_CMDLINE: &'static str = layout::DEFAULT_CMDLINE;

        const IRQFDS_WAIT: bool = false;

        fn memory_map(ram_bytes: u64) -> MemoryMap {
            layout::memory_map(ram_bytes)
        }

        fn platform_devices() -> &'static [PlatformDevice] {
            layout::PLATFORM_DEVICES
        }

        fn device_gsis() -> Range<u32> {
            layout::DEVICE_GSIS
        }

        fn before_vcpus(_kvm: &Kvm, vm: &VmFd) -> Result<Gic, ArchError> {
            Gic::create(vm)
        }

        fn vcpus_to_create(_vcpus: u8, most: u8) -> u8 {
            most // KVM makes none once the interrupt controller is complete
        }

        fn after_vcpus(gic: &mut Gic, _vm: &VmFd, vcpus: u8) -> Result<(), ArchError> {
            gic.finish(vcpus)
        }

        fn load(memory: &GuestMemoryMmap, boot: &mut BootFiles) -> Result<Entry, ArchError> {
            boot::load(memory, boot)
        }

        fn describe(
            gic: &Gic,
            memory: &GuestMemoryMmap,
            machine: &Machine<'_>,
        ) -> Result<(), ArchError> {
            tables::write(gic.version(), memory, machine)
        }

        fn reset_vcpu(
            _kvm: &Kvm,
            vm: &VmFd,
            vcpu: &VcpuFd,
            _index: u8,
            _vcpus: u8,
            entry: Option<&Entry>,
        ) -> Result<(), ArchError> {
            vcpu::reset(vm, vcpu, entry)
        }

        fn await_start(vcpu: &VcpuFd) -> Result<(), ArchError> {
            vcpu::await_start(vcpu)
        }

        fn save_vcpu(_kvm: &Kvm, vcpu: &VcpuFd) -> Result<vcpu::State, ArchError> {
            vcpu::State::of(vcpu)
        }

        fn restore_vcpu(vm: &VmFd, vcpu: &VcpuFd, state: &vcpu::State) -> Result<(), ArchError> {
            state.apply(vm, vcpu)
        }

        fn save_board(gic: &Gic, _vm: &VmFd) -> Result<irqchip::State, ArchError> {
            irqchip::State::of(gic)
        }

        fn restore_board(gic: &Gic, _vm: &VmFd, state: &irqchip::State) -> Result<(), ArchError> {
            state.apply(gic)
        }

        fn cmdline_device(_device: &MmioDevice) -> Option<String> {
            None // the device tree has them all
        }

        fn device_names(_number: usize, device: &MmioDevice) -> Vec<String> {
            vec![layout::device_name(device)]
        }

        fn publish(word: &AtomicU32) {
            vm::clean(word);
        }

        fn translate<'a>(exit: VcpuExit<'a>, _memory: &GuestMemoryMmap) -> Option<Exit<'a>> {
            exits::translate(exit)
        }
    }
}
