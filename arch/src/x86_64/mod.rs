//! x86_64: one line per method of [`Arch`], pointing at the files of this folder.

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
#[cfg(target_arch = "x86_64")]
pub mod tables;

mod boot;
mod exits;
mod irqchip;
mod vcpu;
mod vm;

#[cfg(target_arch = "x86_64")]
pub use host::X86_64;

#[cfg(target_arch = "x86_64")]
mod host {
    use std::ops::Range;
    use std::sync::atomic::AtomicU32;

    use kvm_bindings::kvm_clock_data;
    use serde::{Deserialize, Serialize};
    use vm_memory::GuestMemoryMmap;

    use super::{boot, exits, irqchip, layout, tables, vcpu, vm};
    use crate::machine::{BootFiles, Entry, Exit, Machine, MemoryMap, MmioDevice, PlatformDevice};
    use crate::{Arch, ArchError, Kvm, VcpuExit, VcpuFd, VmFd};

    /// A PC without legacy: in-kernel interrupt controllers, no PCI, ACPI and MP tables.
    #[derive(Debug)]
    pub struct X86_64;

    /// Nothing: what the vCPUs share is all reached through the machine itself.
    #[derive(Debug)]
    pub struct Board;

    /// Where everything stands that the vCPUs share.
    #[derive(Debug, Serialize, Deserialize)]
    pub struct BoardState {
        irqchip: irqchip::State,
        clock: kvm_clock_data,
    }

    impl Arch for X86_64 {
        type VcpuState = vcpu::State;
        type Board = Board;
        type BoardState = BoardState;

        const DEFAULT_CMDLINE: &'static str = layout::DEFAULT_CMDLINE;

        // The lock of the I/O APIC is none that the waker of an eventfd may take (virt/kvm/eventfd.c).
        const IRQFDS_WAIT: bool = true;

        fn memory_map(ram_bytes: u64) -> MemoryMap {
            layout::memory_map(ram_bytes)
        }

        fn platform_devices() -> &'static [PlatformDevice] {
            layout::PLATFORM_DEVICES
        }

        fn device_gsis() -> Range<u32> {
            layout::DEVICE_GSIS
        }

        fn before_vcpus(_kvm: &Kvm, vm: &VmFd) -> Result<Board, ArchError> {
            vm::reserve_addresses(vm)?;
            vm::leave_out_counters(vm)?;
            irqchip::create(vm)?;
            Ok(Board)
        }

        fn vcpus_to_create(vcpus: u8, _most: u8) -> u8 {
            vcpus
        }

        fn after_vcpus(_board: &mut Board, _vm: &VmFd, _vcpus: u8) -> Result<(), ArchError> {
            Ok(()) // KVM's APICs come with the vCPUs
        }

        fn load(memory: &GuestMemoryMmap, boot: &mut BootFiles) -> Result<Entry, ArchError> {
            boot::load(memory, boot)
        }

        fn describe(
            _board: &Board,
            memory: &GuestMemoryMmap,
            machine: &Machine<'_>,
        ) -> Result<(), ArchError> {
            tables::write(memory, machine)
        }

        fn reset_vcpu(
            kvm: &Kvm,
            _vm: &VmFd,
            vcpu: &VcpuFd,
            index: u8,
            vcpus: u8,
            entry: Option<&Entry>,
        ) -> Result<(), ArchError> {
            vcpu::reset(kvm, vcpu, index, vcpus, entry)
        }

        fn await_start(_vcpu: &VcpuFd) -> Result<(), ArchError> {
            Ok(()) // all exist from when they are granted, and waited since
        }

        fn save_vcpu(kvm: &Kvm, vcpu: &VcpuFd) -> Result<vcpu::State, ArchError> {
            vcpu::State::of(kvm, vcpu)
        }

        fn restore_vcpu(_vm: &VmFd, vcpu: &VcpuFd, state: &vcpu::State) -> Result<(), ArchError> {
            state.apply(vcpu)
        }

        fn save_board(_board: &Board, vm: &VmFd) -> Result<BoardState, ArchError> {
            Ok(BoardState { irqchip: irqchip::State::of(vm)?, clock: vm::save_clock(vm)? })
        }

        fn restore_board(_board: &Board, vm: &VmFd, state: &BoardState) -> Result<(), ArchError> {
            vm::restore_clock(vm, &state.clock)?;
            state.irqchip.apply(vm)
        }

        fn cmdline_device(device: &MmioDevice) -> Option<String> {
            Some(layout::cmdline_device(device))
        }

        fn device_names(number: usize, _device: &MmioDevice) -> Vec<String> {
            layout::device_names(number).into()
        }

        /// Processors and their caches agree on memory, whatever it is taken for.
        fn publish(_word: &AtomicU32) {}

        fn translate<'a>(exit: VcpuExit<'a>, _memory: &GuestMemoryMmap) -> Option<Exit<'a>> {
            exits::translate(exit)
        }
    }
}
