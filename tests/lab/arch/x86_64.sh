# What the lab must know of x86_64; sourced by its scripts.
# shellcheck shell=bash disable=SC2034
debian_architecture=amd64
kernel_package=linux-image-amd64
qemu=qemu-system-x86_64
qemu_package=qemu-system-x86
# What a QEMU that is unpacked and not installed is made of, and where its firmware is.
qemu_packages=(qemu-system-x86 qemu-system-common qemu-system-data seabios)
qemu_data=(qemu seabios)
# Mends two faults of QEMU (10.0 and 11.1 have them) in the program that is given: each loses a guest, or
# the lab itself, now and then.
#
# Every processor that loads the x87 state clears IGNNE# in the flags (hflags2) of the first processor,
# without a lock. The same word says whether that one takes interrupts and walks nested page tables. What it
# changes at that moment is undone: about once in 50,000 exits of a guest on it, the guest is reset or stands
# still, or the lab does. The one instruction, at the end of cpu_clear_ignne, becomes one that does nothing:
# only the interrupts that MS-DOS had for errors of the x87 need it.
#
# Where VMRUN injects an interrupt, it also leaves the vector behind as an exception that is pending
# (exception_index, in helper_vmrun), although it has delivered it. If QEMU's main loop asks for the processor
# before the guest's next exit, the guest gets the interrupt again, with interrupts disabled: it waits for
# ever for a lock that it holds itself. That happens to one of twenty guests that start at once where
# instructions are counted, as QEMU's main loop is asked at each timer there. The store goes.
mend_emulator() {
  perl -0777 -pi -e '
    sub missing { print STDERR "lab: $_[0] is not found in this QEMU: guests may be lost now and then\n" }
    my $ignne = s/\x81[\xa0-\xa3\xa5-\xa7]..\0\0\x7f\xff\xff\xff(?=\x48\x83\xc4)/\x66\x2e\x0f\x1f\x84\0\0\0\0\0/gs;
    missing("cpu_clear_ignne") unless $ignne == 1;
    my $vector = s/(\x0f\xb6.\x44\x89[\x80-\xbf]....)\x89[\x80-\xbf]..\xff\xff(?=\xc7[\x80-\x87]....\0{4}\x48\xc7[\x80-\x87]....\xff{4})/$1\x66\x0f\x1f\x44\0\0/gs;
    missing("the vector in helper_vmrun") unless $vector == 1;
  ' "$1"
}
# SVM with nested paging; a processor whose string instructions count as what they do.
machine=(-M q35)
machines=()
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
# Tests that cannot hold here, and such as need the tuned kernel as guest.
unfit_tests=()
tuned_tests=()
