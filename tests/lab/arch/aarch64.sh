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
# What kinds of it there are beside the usual one.
machines=(LAB_GIC=2)
processor=(-cpu neoverse-n1)
processor_icount=(-cpu neoverse-n1)
cmdline=
console=ttyAMA0
kvm_module= # built in
has_virtualization() { [ -e /dev/kvm ]; }
# What compiles for it on machines of another architecture.
cross_prefix=aarch64-linux-gnu
cross_packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
# Tests that are for other architectures: those of one's own parts; on another machine the login, whose
# disk is made of that machine's packages.
foreign_tests=(x86_64)
[ "$(uname -m)" = aarch64 ] || foreign_tests+=(debian)
# Tests that cannot hold here. The processor says nothing of a store of several registers to memory that
# may not be written (ESR_ELx.ISV is clear), so KVM cannot drop it, and the guest's machine ends.
unfit_tests=(pmem::a_guest_that_writes_to_a_read_only_file_goes_on_without_effect)
# Tests that need the tuned kernel as guest: Debian 12's has no CONFIG_ZONE_DEVICE for this architecture,
# without which Linux maps no file of a share, nor of an image, straight from the host (DAX).
tuned_tests=(
  pmem::the_guest_mounts_an_image_without_copying_it
  a_file_that_the_host_truncates_is_zeros_to_a_guest_that_has_it_mapped
  the_checklist_holds_through_a_window
  what_is_read_through_a_window_is_not_in_the_guests_memory
)
