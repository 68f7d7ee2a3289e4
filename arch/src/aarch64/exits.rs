//! KVM's exits in terms every architecture shares; what a guest asks of PSCI ends as an event.
#![cfg(target_arch = "aarch64")]

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

use crate::VcpuExit;
use crate::machine::{Exit, Space};

/// What `exit` means, or `None` if it is none that a guest can cause.
pub fn translate(exit: VcpuExit<'_>) -> Option<Exit<'_>> {
    Some(match exit {
        VcpuExit::MmioRead(address, data) => Exit::Read { space: Space::Memory, address, data },
        VcpuExit::MmioWrite(address, data) => Exit::Write { space: Space::Memory, address, data },
        // SYSTEM_OFF, SYSTEM_RESET and SYSTEM_RESET2 (PSCI 1.1, sections 5.13 to 5.15).
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Exit::Shutdown,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Reset,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Exit::TripleFault,
        VcpuExit::Intr => Exit::Handled,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_off_powers_off() {
        let exit = translate(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, &[]));

        assert!(matches!(exit, Some(Exit::Shutdown)));
    }

    #[test]
    fn system_reset_resets() {
        let exit = translate(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, &[0]));

        assert!(matches!(exit, Some(Exit::Reset)));
    }

    #[test]
    fn an_access_goes_to_the_bus() {
        let exit = translate(VcpuExit::MmioWrite(0x1000_0050, &[1, 0, 0, 0]));

        let Some(Exit::Write { space: Space::Memory, address, data }) = exit else { panic!() };
        assert_eq!((address, data), (0x1000_0050, &[1, 0, 0, 0][..]));
    }

    #[test]
    fn nobody_knows_what_a_hypercall_exit_would_mean() {
        assert!(translate(VcpuExit::Unknown).is_none());
    }
}
