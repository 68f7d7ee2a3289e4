#!/usr/bin/env bash
# Makes a stock Debian to boot from a disk: its root file system as an ext4 image with systemd as
# init, and the kernel and initrd of its own that come with it. Kept until this script changes.
# Usage: debian.sh FOLDER (gets root.ext4, vmlinuz and initrd)
set -euo pipefail
folder=$1

# root without a password; what follows the prompt is a shell.
name=stock
# The network of the tests: the host's end of the tap has .1.
address=192.168.240.2/24
packages=(systemd-sysv udev dbus login iproute2 iputils-ping initramfs-tools
  "linux-image-cloud-$(dpkg --print-architecture)")

fail() { echo "debian: $*" >&2; exit 2; }

stamp=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-16)
[ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] && exit
command -v mmdebstrap >/dev/null || fail "no mmdebstrap: run 'make setup'"
# Whoever comes second waits for what the first one makes.
mkdir -p "$folder"
exec 9>"$folder/lock"; flock 9
[ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] && exit

codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' | awk -v r="$codename" '$1 == r {print $2; exit}')
[ -n "$mirror" ] || fail "no Debian archive with release $codename among this machine's apt sources"
echo "==> making a Debian root file system" >&2
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
include=$(IFS=,; echo "${packages[*]}")
# The console is a module in Debian's kernels, and an init without one gives up.
# shellcheck disable=SC2016
console='mkdir -p "$1/usr/share/initramfs-tools/modules.d"
  echo virtio_console > "$1/usr/share/initramfs-tools/modules.d/console"'
mmdebstrap --quiet --mode=root --variant=minbase --include="$include" \
  --essential-hook="$console" --aptopt='APT::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/i18n/*' \
  "$codename" "$tree/root" "$mirror" >&2
root=$tree/root
echo "$name" > "$root/etc/hostname"
echo "/dev/vda / ext4 defaults 0 1" > "$root/etc/fstab"
chroot "$root" passwd --quiet --delete root
printf '[Match]\nType=ether\n\n[Network]\nAddress=%s\n' "$address" > "$root/etc/systemd/network/lab.network"
systemctl --quiet --root="$root" enable systemd-networkd 2>/dev/null \
  || chroot "$root" systemctl --quiet enable systemd-networkd
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
cp "$root"/boot/vmlinuz-* "$folder/vmlinuz"
cp "$root"/boot/initrd.img-* "$folder/initrd"
rm -f "$folder/root.ext4"
mke2fs -q -t ext4 -d "$root" "$folder/root.ext4" 768M >/dev/null
echo "$stamp" > "$folder/stamp"
