# What the lab must know of x86_64; sourced by its scripts.
# shellcheck shell=bash disable=SC2034
debian_architecture=amd64
kernel_package=linux-image-amd64
qemu=qemu-system-x86_64
qemu_package=qemu-system-x86
# What a QEMU that is unpacked and not installed is made of, and where its firmware is.
qemu_packages=(qemu-system-x86 qemu-system-common qemu-system-data seabios)
qemu_data=(qemu seabios)
# SVM with nested paging; a processor whose string instructions count as what they do.
machine=(-M q35)
processor=(-cpu max)
processor_icount=(-cpu max,-erms,-fsrm)
# Linux does not trust the emulated time stamp counter by itself, and every other clock takes QEMU's
# global lock for each look at it.
cmdline='tsc=reliable'
console=ttyS0
kvm_module=kvm-amd
has_virtualization() { grep -qwE 'vmx|svm' /proc/cpuinfo; }
# Tests that are for other architectures.
foreign_tests=(aarch64)
foreign_filter=()
