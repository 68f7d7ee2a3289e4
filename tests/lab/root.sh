#!/usr/bin/env bash
# Makes the root file system of a lab of another architecture than this machine's: what the lab and its
# engines need of Debian, unpacked. Nothing in it can run here, so no package is configured; what their
# scripts would have done, and is needed, is done by hand. Kept until this script changes.
# Usage: root.sh ARCHITECTURE FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
. "$here/arch/$1.sh"
# shellcheck source=apt.sh
. "$here/apt.sh"
folder=$2

packages=(
  # a shell and its commands
  base-files bash bsdutils busybox-static coreutils dash findutils gawk grep hostname libc-bin mount procps sed tar util-linux
  # what the lab's start and the tests call
  cpio e2fsprogs iproute2 iptables kmod
  # the engines
  conmon containerd crun docker.io netavark podman runc uidmap
  # who is measured beside Coracle
  "$qemu_package"
)

stamp=$(cat "${BASH_SOURCE[0]}" - <<< "${packages[*]}" | sha256sum | cut -c1-16)
[ "$(cat "$folder.stamp" 2>/dev/null)" = "$stamp" ] && exit
command -v mmdebstrap >/dev/null || { echo "lab: no mmdebstrap: run 'make setup'" >&2; exit 2; }
codename=$(debian_codename)
mirror=$(debian_mirror "$codename")
[ -n "$mirror" ] || { echo "lab: no Debian archive with release $codename among this machine's apt sources" >&2; exit 2; }
echo "lab: unpacking Debian for $1" >&2
rm -rf "$folder"
# shellcheck disable=SC2016
merged='for directory in bin sbin lib; do mkdir -p "$1/usr/$directory"; ln -s "usr/$directory" "$1/$directory"; done'
mmdebstrap --quiet --mode=root --variant=extract --architectures="$debian_architecture" \
  --include="$(IFS=,; echo "${packages[*]}")" --setup-hook="$merged" \
  --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  "$codename" "$folder" "$mirror" >&2
rm -rf "$folder"/var/lib/apt/lists/* "$folder"/var/cache/apt/*
# By base-files, base-passwd and the alternatives system.
mkdir -p "$folder/mnt"
printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n' > "$folder/etc/passwd"
printf 'root:x:0:\ndocker:x:999:\nnogroup:x:65534:\n' > "$folder/etc/group"
for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
  ln -sf "$(sed 's/tables/tables-nft/' <<< "$name")" "$folder/usr/sbin/$name"
done
ln -sf gawk "$folder/usr/bin/awk"
echo "$stamp" > "$folder.stamp"
