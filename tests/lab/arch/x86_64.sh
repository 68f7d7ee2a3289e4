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
# QEMU (10.0 to 11.1 at least) lets every processor that loads the x87 state change the flags of the
# first one without a lock (cpu_clear_ignne: IGNNE# in hflags2). The same word says whether that one is
# in a guest with nested paging and whether it takes interrupts, so a guest on it is lost, or the lab is,
# about once in 50,000 exits. The first processor therefore stays out of the scheduler.
processors=3
cmdline_several='isolcpus=0'
# Linux does not trust the emulated time stamp counter by itself, and every other clock takes QEMU's
# global lock for each look at it.
cmdline='tsc=reliable'
console=ttyS0
kvm_module=kvm-amd
has_virtualization() { grep -qwE 'vmx|svm' /proc/cpuinfo; }
# Tests that are for other architectures.
foreign_tests=(aarch64)
foreign_filter=()
