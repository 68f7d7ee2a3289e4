//! The interrupt controller inside KVM: a GICv3, or a GICv2 where the host has nothing newer.
#![cfg(target_arch = "aarch64")]

mod registers;
mod state;

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::DeviceFd;

pub use self::state::State;
use super::layout::{self, GicVersion};
use crate::{ArchError, VmFd};

/// Interrupts of the GIC: private ones, then those of devices.
const INTERRUPTS: u32 = layout::PRIVATE_INTERRUPTS + layout::SPIS;

/// The interrupt controller of a machine.
#[derive(Debug)]
pub struct Gic {
    device: DeviceFd,
    version: GicVersion,
    vcpus: u8,
}

impl Gic {
    /// Creates the newest one that the host has.
    pub fn create(vm: &VmFd) -> Result<Self, ArchError> {
        let create =
            |type_| vm.create_device(&mut kvm_create_device { type_, ..Default::default() });
        let (device, version) = match create(kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3) {
            Err(error) if error.errno() == libc::ENODEV => {
                (create(kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2), GicVersion::V2)
            }
            result => (result, GicVersion::V3),
        };
        let device = device.map_err(ArchError::kvm("create the interrupt controller"))?;
        Ok(Gic { device, version, vcpus: 0 })
    }

    /// Which one it became.
    pub fn version(&self) -> GicVersion {
        self.version
    }

    /// Completes it, once all `vcpus` exist (Documentation/virt/kvm/devices/arm-vgic-v3.rst).
    pub fn finish(&mut self, vcpus: u8) -> Result<(), ArchError> {
        self.vcpus = vcpus;
        let count = u64::from(INTERRUPTS);
        self.set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, count)
            .map_err(ArchError::kvm("set the number of interrupts"))?;
        let places = match self.version {
            GicVersion::V3 => [
                (KVM_VGIC_V3_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR),
                (KVM_VGIC_V3_ADDR_TYPE_REDIST, layout::GIC_REDISTRIBUTORS),
            ],
            GicVersion::V2 => [
                (KVM_VGIC_V2_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR),
                (KVM_VGIC_V2_ADDR_TYPE_CPU, layout::GIC_CPU_INTERFACE),
            ],
        };
        for (what, address) in places {
            self.set(KVM_DEV_ARM_VGIC_GRP_ADDR, what.into(), address)
                .map_err(ArchError::kvm("place the interrupt controller"))?;
        }
        self.set(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), 0)
            .map_err(ArchError::kvm("initialize the interrupt controller"))
    }

    /// Sets an attribute of at most 64 bits.
    fn set(&self, group: u32, attr: u64, value: u64) -> Result<(), kvm_ioctls::Error> {
        let addr = std::ptr::from_ref(&value).expose_provenance() as u64;
        self.device.set_device_attr(&kvm_device_attr { group, attr, addr, flags: 0 })
    }

    /// Reads an attribute of at most 64 bits; a narrower one leaves the upper bits zero.
    fn get(&self, group: u32, attr: u64) -> Result<u64, kvm_ioctls::Error> {
        let mut value = 0_u64;
        let addr = std::ptr::from_mut(&mut value).expose_provenance() as u64;
        let mut request = kvm_device_attr { group, attr, addr, flags: 0 };
        // SAFETY: `value` outlives the call, and no attribute of the groups this module names has more
        // than its eight bytes.
        unsafe { self.device.get_device_attr(&mut request) }.map(|()| value)
    }
}
