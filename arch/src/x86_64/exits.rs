//! KVM's exits in terms every architecture shares, and the few legacy ports that hold no state.
#![cfg(target_arch = "x86_64")]

use super::layout::power;
use crate::VcpuExit;
use crate::machine::{Exit, Space};

/// Data port of the keyboard controller.
const I8042_DATA: u16 = 0x60;
/// Status port when read, command port when written.
const I8042_COMMAND: u16 = 0x64;
/// The command that pulses the processor's reset line.
const I8042_RESET: u8 = 0xfe;
/// Output buffer full, input buffer empty. The first makes a probing driver find at once that this
/// is no controller, because its buffer can't be emptied; the second lets a kernel that wants to
/// reset the machine write its command without a wait.
const I8042_STATUS: u8 = 0x01;
/// Data port of the CMOS clock.
const CMOS_DATA: u16 = 0x71;

/// What `exit` means, or `None` if it is none that a guest can cause.
pub fn translate(exit: VcpuExit<'_>) -> Option<Exit<'_>> {
    Some(match exit {
        VcpuExit::MmioRead(address, data) => Exit::Read { space: Space::Memory, address, data },
        VcpuExit::MmioWrite(address, data) => Exit::Write { space: Space::Memory, address, data },
        VcpuExit::IoIn(port, data) => read_port(port, data),
        VcpuExit::IoOut(port, data) => write_port(port, data),
        VcpuExit::Shutdown => Exit::TripleFault,
        VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Handled,
        _ => return None,
    })
}

fn read_port(port: u16, data: &mut [u8]) -> Exit<'_> {
    let answer = match port {
        I8042_COMMAND => I8042_STATUS,
        // No clock: all zeroes is no valid date, and says that no update is in progress. All ones
        // would make a driver wait for the end of the update, for seconds.
        CMOS_DATA | I8042_DATA | power::STATUS_PORT | power::CONTROL_PORT | power::RESET_PORT => 0,
        _ => return Exit::Read { space: Space::Port, address: port.into(), data },
    };
    data.fill(answer);
    Exit::Handled
}

fn write_port(port: u16, data: &[u8]) -> Exit<'_> {
    match (port, data) {
        (power::CONTROL_PORT, [power::POWER_OFF]) => Exit::Shutdown,
        (power::RESET_PORT, [power::RESET]) | (I8042_COMMAND, [I8042_RESET]) => Exit::Reset,
        (power::CONTROL_PORT..=power::RESET_PORT | I8042_DATA | I8042_COMMAND, _) => Exit::Handled,
        _ => Exit::Write { space: Space::Port, address: port.into(), data },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(port: u16, value: u8) -> Exit<'static> {
        let data: &'static [u8] = Box::leak(Box::new([value]));
        translate(VcpuExit::IoOut(port, data)).expect("every port access has a meaning")
    }

    fn read(port: u16) -> u8 {
        let mut data = [0xaa];
        assert!(matches!(translate(VcpuExit::IoIn(port, &mut data)), Some(Exit::Handled)));
        data[0]
    }

    #[test]
    fn sleep_state_five_powers_off() {
        assert!(matches!(out(power::CONTROL_PORT, 0x34), Exit::Shutdown));
    }

    #[test]
    fn another_sleep_state_is_ignored() {
        assert!(matches!(out(power::CONTROL_PORT, 1 << 5 | 3 << 2), Exit::Handled));
    }

    #[test]
    fn s5_without_sleep_enable_is_ignored() {
        assert!(matches!(out(power::CONTROL_PORT, power::S5 << 2), Exit::Handled));
    }

    #[test]
    fn the_reset_register_resets() {
        assert!(matches!(out(power::RESET_PORT, power::RESET), Exit::Reset));
    }

    #[test]
    fn the_keyboard_controller_resets() {
        assert!(matches!(out(I8042_COMMAND, I8042_RESET), Exit::Reset));
    }

    #[test]
    fn a_triple_fault_is_not_a_reset() {
        assert!(matches!(translate(VcpuExit::Shutdown), Some(Exit::TripleFault)));
    }

    #[test]
    fn a_kernel_never_waits_for_the_keyboard_controller_to_take_a_command() {
        const INPUT_BUFFER_FULL: u8 = 0x02;

        assert_eq!(read(I8042_COMMAND) & INPUT_BUFFER_FULL, 0);
    }

    #[test]
    fn the_missing_clock_is_never_in_an_update() {
        assert_eq!(read(CMOS_DATA), 0);
    }

    #[test]
    fn other_ports_go_to_the_bus() {
        let exit = out(0x3f8, b'x');

        assert!(matches!(exit, Exit::Write { space: Space::Port, address: 0x3f8, data: b"x" }));
    }

    #[test]
    fn a_wide_access_to_a_known_port_is_answered_whole() {
        let mut data = [0xaa; 4];

        translate(VcpuExit::IoIn(CMOS_DATA, &mut data));

        assert_eq!(data, [0; 4]);
    }
}
