#!/usr/bin/env bash
# Installs what building, the lab and the tests need on Debian 12, and says so while it works; LAB_ARCH
# names another architecture than this machine's.
# Does nothing when everything is there already.
set -euo pipefail

packages=(
  # build: C compiler for build scripts, C++ for libFuzzer, static libseccomp for container profiles
  gcc g++ libc6-dev libseccomp-dev make pkg-config
  # guest image: unpacking a Debian kernel, compiling our own
  bc bison busybox-static cpio dpkg-dev erofs-utils flex kmod libelf-dev libssl-dev xz-utils zstd
  # benchmarks: what runs in their guests
  fio iperf3
  # lab: an emulated machine with hardware virtualization, and the engines that run in it
  conmon containerd crun docker.io iproute2 iptables mmdebstrap podman runc slirp4netns uidmap
)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
arch=${LAB_ARCH:-$(uname -m)}
# shellcheck source=/dev/null
. "$here/arch/$arch.sh"
packages+=("$qemu_package")
[ "$arch" = "$(uname -m)" ] || packages+=("${cross_packages[@]}")

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "setup: run as root to install: ${missing[*]}" >&2; exit 1; }
  echo "==> installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # The engines are started by the tests, in the lab; nothing shall run on this machine itself.
  RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

command -v cargo >/dev/null || {
  echo "setup: no cargo on PATH: install Rust with rustup (https://rustup.rs) and try again" >&2
  exit 1
}
# The lab's kernel comes from the archive, and so does the guest's.
apt-cache show "linux-image-$(dpkg --print-architecture)" >/dev/null 2>&1 || { echo "==> apt-get update"; apt-get update -qq; }
