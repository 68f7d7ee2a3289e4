#!/usr/bin/env bash
# Prints the command of a QEMU that the lab can rely on, one word a line.
#
# Before 8.1, code that one emulated processor changes while another one translates it could stay
# stale for ever ("accel/tcg: Always lock pages before translation"). Linux patches its scheduler
# whenever the first VM of a machine starts and the last one ends, so the lab hung once in a hundred
# times. Debian 12 has 7.2; its backports have a newer one. That is unpacked into the cache and never
# installed: the machine's own apt settings and packages stay as they are.
# Usage: emulator.sh FOLDER
set -euo pipefail
folder=$1

fail() { echo "lab: $*" >&2; exit 2; }

is_recent() {
  local version major minor
  version=$(qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9]*\.[0-9]*\).*/\1/p')
  major=${version%.*} minor=${version#*.}
  [ "$major" -gt 8 ] || { [ "$major" = 8 ] && [ "$minor" -ge 1 ]; }
}

# apt with the backports of this machine's release, from the mirror that the machine uses already,
# as its only source.
fetch() {
  local codename mirror
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' | awk -v r="$codename" '$1 == r {print $2; exit}')
  [ -n "$mirror" ] || fail "no Debian archive with release $codename among this machine's apt sources"
  echo "lab: fetching QEMU from $codename-backports" >&2
  rm -rf "$folder"
  mkdir -p "$folder"/apt/{lists,cache/archives}/partial "$folder/packages"
  : > "$folder/apt/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $codename-backports main" \
    > "$folder/apt/sources.list"
  {
    apt-config dump Acquire | grep -v IndexTargets
    echo "APT::Sandbox::User \"root\";"
    echo "Dir::Etc { main \"/dev/null\"; parts \"/dev/null\"; sourceparts \"/dev/null\"; };"
    echo "Dir::Etc::sourcelist \"$folder/apt/sources.list\";"
    echo "Dir::State { lists \"$folder/apt/lists\"; status \"$folder/apt/status\"; };"
    echo "Dir::Cache \"$folder/apt/cache\";"
  } > "$folder/apt/apt.conf"
  export APT_CONFIG=$folder/apt/apt.conf
  apt-get update -qq >&2 || fail "cannot read the package index of $codename-backports"
  # Their libraries are those of the release's own QEMU, which is installed.
  (cd "$folder/packages" && apt-get download -qq qemu-system-x86 qemu-system-common qemu-system-data seabios) >&2 \
    || fail "cannot download QEMU from $codename-backports"
  local package
  for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder/root"; done
  rm -r "$folder/packages" "$folder/apt"
  "$folder/root/usr/bin/qemu-system-x86_64" --version >/dev/null || fail "the fetched QEMU does not start"
  touch "$folder/.complete"
}

command -v qemu-system-x86_64 >/dev/null || fail "no qemu-system-x86_64: run 'make setup'"
if is_recent; then
  echo qemu-system-x86_64
  exit
fi
[ -e "$folder/.complete" ] || fetch
printf '%s\n' "$folder/root/usr/bin/qemu-system-x86_64" \
  -L "$folder/root/usr/share/qemu" -L "$folder/root/usr/share/seabios"
