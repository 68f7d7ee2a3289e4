#!/usr/bin/env bash
# Boots a stock Debian from a disk, with a network interface, to its login prompt: with the kernel of
# containers, whose console takes input (root has no password, and `reboot` ends the machine), or with
# Debian's own kernel and initrd. That one has the virtio console as a module, so its init needs the
# serial port, which only shows: Ctrl-C ends it. To be run in a shell of the lab, or wherever KVM is.
# Usage: login.sh [stock]
set -euo pipefail
cache=${CORACLE_CACHE:-/var/cache/coracle}
debian=$cache/debian
boot=(--kernel "$cache/guest-tuned/kernel")
[ "${1:-}" = stock ] && boot=(--kernel "$debian/vmlinuz" --initrd "$debian/initrd" --serial)
[ -e "$debian/root.ext4" ] || { echo "login: no Debian: run 'make debian'" >&2; exit 2; }

disk=$(mktemp)
trap 'rm -f "$disk"; ip link delete login0 2>/dev/null || true' EXIT
cp --sparse=always "$debian/root.ext4" "$disk"
ip tuntap add login0 mode tap vnet_hdr
ip address add 192.168.240.1/24 dev login0
ip link set login0 up
status=0
coracle-vmm "${boot[@]}" --memory 512 --console --cmdline 'root=/dev/vda rw' \
  --disk "id=root,path=$disk" --net tap=login0,mac=02:00:00:00:24:01 || status=$?
# 3: the guest restarted.
[ "$status" = 3 ] || exit "$status"
