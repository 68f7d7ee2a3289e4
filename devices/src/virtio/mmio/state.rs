//! The registers of a device and the device behind them, saved and built anew.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};

use super::{MmioTransport, Registers, StartError};
use crate::interrupt::Interrupt;
use crate::virtio::VirtioDevice;
use crate::virtio::state::{DeviceState, Position, RestoreError};

/// A device and its registers as the driver left them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransportState {
    device_type: u32,
    status: u32,
    /// Causes of interrupts, as the driver reads them.
    interrupts: u32,
    config_generation: u32,
    registers: Registers,
    /// Where the device stands in each queue; empty if it is idle.
    queues: Vec<Position>,
    device: DeviceState,
}

impl MmioTransport {
    /// Brings the device to a standstill and says where it stands. Nobody else may call it meanwhile;
    /// until [`MmioTransport::resume`] nothing of it touches guest memory.
    pub fn save(&mut self) -> TransportState {
        let device = self.device.clone();
        let mut device = device.lock().expect("no device panics while it holds its lock");
        let queues = self.quiesce(&mut *device);
        TransportState {
            device_type: self.device_type,
            status: self.shared.status(),
            interrupts: self.shared.page().get(VIRTIO_MMIO_INTERRUPT_STATUS),
            config_generation: self.shared.page().get(VIRTIO_MMIO_CONFIG_GENERATION),
            registers: self.registers.clone(),
            queues,
            device: device.save(),
        }
    }

    /// Brings `device`, which is the one behind the registers, to a standstill and says where it stands.
    pub(super) fn quiesce(&mut self, device: &mut dyn VirtioDevice) -> Vec<Position> {
        device.quiesce().unwrap_or_else(|error| {
            // The queue has already told the driver that the device needs a reset.
            self.complaints.add(&format_args!("stopped until it is reset: {error}"));
            device.reset();
            Vec::new()
        })
    }

    /// Lets the device go on after [`MmioTransport::save`].
    pub fn resume(&self) {
        self.lock_device().resume();
    }

    /// Goes on from `state`, in the place of the device that was saved; to be called before the guest
    /// runs.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        self.compare(state)?;
        self.registers = state.registers.clone();
        let page = self.shared.page();
        page.set(VIRTIO_MMIO_STATUS, state.status);
        page.set(VIRTIO_MMIO_CONFIG_GENERATION, state.config_generation);
        self.shared.restore(state.interrupts);
        self.show_selected();
        self.show_region();
        if state.queues.is_empty() {
            return self.lock_device().restore(&state.device);
        }
        self.activate(&state.queues).map_err(|error| match error {
            StartError::Device(error) => RestoreError::from(error),
            error => RestoreError::Start(error.to_string()),
        })?;
        self.lock_device().restore(&state.device)?;
        // What the driver kicked for, and what it was to be interrupted for, may have been on its way
        // when the machine was saved. Looking once too often costs a moment.
        self.kick_all();
        if state.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0 {
            self.shared.used_buffer();
        } else {
            self.shared.needs_reset();
        }
        Ok(())
    }

    /// Whether the driver that `state` tells of finds the device it knows.
    fn compare(&self, state: &TransportState) -> Result<(), RestoreError> {
        let same = |what, saved: u64, found: u64| {
            if saved == found { Ok(()) } else { Err(RestoreError::Other { what, saved, found }) }
        };
        same("the type", state.device_type.into(), self.device_type.into())?;
        let features = state.registers.driver_features;
        same("the set of features in use", features, features & self.device_features)?;
        let (saved, found) = (&state.registers.queues, &self.registers.queues);
        same("the number of queues", saved.len() as u64, found.len() as u64)?;
        for (saved, found) in saved.iter().zip(found) {
            same("the largest size of a queue", saved.max_size.into(), found.max_size.into())?;
        }
        if !state.queues.is_empty() {
            same("the number of queues in use", state.queues.len() as u64, found.len() as u64)?;
        }
        Ok(())
    }
}
