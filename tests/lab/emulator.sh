#!/usr/bin/env bash
# Prints the command of a QEMU that the lab can rely on, one word a line.
#
# Before 8.1, code that one emulated processor changes while another one translates it could stay
# stale for ever ("accel/tcg: Always lock pages before translation"). Linux patches its scheduler
# whenever the first VM of a machine starts and the last one ends, so the lab hung once in a hundred
# times. Debian 12 has 7.2; its backports have a newer one. That is unpacked into the cache and never
# installed: the machine's own apt settings and packages stay as they are. What is still wrong with it
# is mended in the cache's copy (`mend_emulator` of arch/).
# Usage: emulator.sh ARCHITECTURE FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
. "$here/arch/$1.sh"
# shellcheck source=apt.sh
. "$here/apt.sh"
folder=$2

fail() { echo "lab: $*" >&2; exit 2; }

is_recent() {
  local version major minor
  version=$("$qemu" --version | sed -n 's/^QEMU emulator version \([0-9]*\.[0-9]*\).*/\1/p')
  major=${version%.*} minor=${version#*.}
  [ "$major" -gt 8 ] || { [ "$major" = 8 ] && [ "$minor" -ge 1 ]; }
}

# A copy of the machine's own, with its data where they are.
copy() {
  mkdir -p "$folder/root/usr/bin"
  cp "$(command -v "$qemu")" "$folder/root/usr/bin/"
  ln -sfn /usr/share "$folder/root/usr/share"
}

fetch() {
  local suite own; suite=$(debian_codename)-backports; own=$(dpkg --print-architecture)
  echo "lab: fetching QEMU from $suite" >&2
  # Their libraries are those of the release's own QEMU, which is installed.
  unpack_debian "$folder" "$suite" "${qemu_packages[@]/%/:$own}" || exit 2
  "$folder/root/usr/bin/$qemu" --version >/dev/null || fail "the fetched QEMU does not start"
}

command -v "$qemu" >/dev/null || fail "no $qemu: run 'make setup'"
mending=$(declare -f mend_emulator)
if [ "$(cat "$folder/.mended" 2>/dev/null)" != "$mending" ]; then
  rm -rf "$folder"
  if is_recent; then copy; else fetch; fi
  mend_emulator "$folder/root/usr/bin/$qemu"
  printf '%s\n' "$mending" > "$folder/.mended"
fi
echo "$folder/root/usr/bin/$qemu"
for directory in "${qemu_data[@]}"; do printf '%s\n' -L "$folder/root/usr/share/$directory"; done
