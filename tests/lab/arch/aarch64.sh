# What the lab must know of aarch64; sourced by its scripts.
# shellcheck shell=bash disable=SC2034
debian_architecture=arm64
kernel_package=linux-image-arm64
qemu=qemu-system-aarch64
qemu_package=qemu-system-arm
# What a QEMU that is unpacked and not installed is made of, and where its firmware is.
qemu_packages=(qemu-system-arm qemu-system-common qemu-system-data)
qemu_data=(qemu)
mend_emulator() { :; }
# LAB_GIC=2 is a machine whose KVM has no newer interrupt controller to offer. The processor is not
# `max`, which is twice as slow.
machine=(-M "virt,virtualization=on,gic-version=${LAB_GIC:-3}")
processor=(-cpu neoverse-n1)
processor_icount=(-cpu neoverse-n1)
cmdline=
console=ttyAMA0
kvm_module= # built in
has_virtualization() { [ -e /dev/kvm ]; }
# What compiles for it on machines of another architecture.
cross_prefix=aarch64-linux-gnu
cross_packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
# Tests that are for other architectures: those of one's own parts, and the login on a disk of packages
# for this machine.
foreign_tests=(x86_64 debian)
