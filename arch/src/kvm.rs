//! The KVM handles this build uses: the one seam for an architecture that `kvm-ioctls` lacks.

pub use kvm_ioctls::{Error, Kvm, VcpuExit, VcpuFd, VmFd};
