#!/usr/bin/env bash
# The lab: a machine with real KVM, whether or not this one has it.
#
#   lab.sh prepare          fetch the lab's kernel and QEMU, build its initramfs (once per machine)
#   lab.sh run 'COMMAND'    run a shell command in the lab; its output and exit status are ours
#   lab.sh shell            open a shell in the lab
#
# Where the processor has hardware virtualization, "the lab" is a set of private namespaces on this
# machine; where it has none, QEMU emulates a processor that has it, boots Debian's kernel and shares
# this machine's root file system in, read-only under an overlay. The lab of another architecture has a
# root file system of its own, and everything of it is in a folder of the cache that has its name.
#
# LAB_ARCH                   x86_64 or aarch64; default: this machine's
# LAB_FORCE=emulated|native  choose by hand        LAB_MEMORY_MIB  memory of the emulated machine
# LAB_TIMEOUT                seconds, default 3600 LAB_ICOUNT=1    one instruction = 1 ns, one CPU
# LAB_ENGINES=0              do not start containerd and Docker    LAB_CONSOLE=1  show its kernel
# LAB_KERNEL=distro|tuned    which guest kernel Coracle uses       LAB_PROFILE=debug  which build
# LAB_OUTPUT=FOLDER          gets what the command leaves in the folder $LAB_RESULTS
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
arch=${LAB_ARCH:-$(uname -m)}
export CORACLE_CACHE=${CORACLE_CACHE:-/var/cache/coracle}
foreign=0
if [ "$arch" != "$(uname -m)" ]; then foreign=1 CORACLE_CACHE=$CORACLE_CACHE/$arch; fi
cache=$CORACLE_CACHE/lab
root=
[ "$foreign" = 0 ] || root=$CORACLE_CACHE/root
icount=${LAB_ICOUNT:-0}

fail() { echo "lab: $*" >&2; exit 2; }

[ -e "$here/arch/$arch.sh" ] || fail "no lab for $arch"
# shellcheck source=/dev/null
. "$here/arch/$arch.sh"
# shellcheck source=apt.sh
. "$here/apt.sh"

# Hardware virtualization, and a KVM that uses it: a software KVM has a /dev/kvm as well.
native_kvm() { [ "$foreign" = 0 ] && has_virtualization && [ -w /dev/kvm ]; }

mode() {
  case "${LAB_FORCE:-}" in
    emulated|native) echo "$LAB_FORCE" ;;
    "") if native_kvm && [ "$icount" = 0 ]; then echo native; else echo emulated; fi ;;
    *) fail "LAB_FORCE is 'emulated' or 'native', not '$LAB_FORCE'" ;;
  esac
}

# What the lab's kernel needs before its root is there, and what the engines need afterwards.
early_modules=(virtio_pci 9pnet_virtio 9p overlay virtio_console virtio_rng)

prepare() {
  exec 9>"$cache.lock"; flock 9
  [ "$foreign" = 0 ] || "$here/root.sh" "$arch" "$root"
  # The initramfs depends on these files alone; kernel and QEMU on what Debian's archive has.
  local stamp; stamp=$(cat "$here"/{lab,init,emulator,apt,"arch/$arch"}.sh | sha256sum | cut -c1-16)
  [ -e "$cache/stamp" ] && [ "$(cat "$cache/stamp")" = "$stamp" ] && return
  mkdir -p "$cache"; cd "$cache"
  "$here/emulator.sh" "$arch" "$cache/qemu" > emulator
  [ -e kernel/.complete ] || fetch_kernel
  local release; release=$(cat kernel/.release)
  rm -rf initramfs; mkdir -p initramfs/bin initramfs/modules
  cp "$root/bin/busybox" initramfs/bin/
  cp "$here/init.sh" initramfs/init; chmod 755 initramfs/init
  for module in "${early_modules[@]}"; do
    modprobe -d kernel -S "$release" --show-depends "$module" | awk '/^insmod/{print $2}'
  done | awk '!seen[$0]++' | while read -r file; do
    cp "$file" initramfs/modules/
    echo "${file##*/}" >> initramfs/modules/order
  done
  (cd initramfs && find . | cpio -o -H newc --quiet | zstd -q -1 -f -o ../lab.initrd)
  cp "kernel/boot/vmlinuz-$release" vmlinuz
  echo "$stamp" > stamp
}

# The kernel that Debian's metapackage stands for, below the folder `kernel`.
fetch_kernel() {
  local package name=$kernel_package:$debian_architecture
  rm -rf kernel ./*.deb
  if [ "$foreign" = 1 ]; then
    private_apt "$cache/apt" "$(debian_codename)" "$debian_architecture" || exit 2
    export APT_CONFIG=$cache/apt/apt.conf
  fi
  package=$(apt-cache depends "$name" | awk '/Depends: linux-image-/{print $2; exit}')
  [ -n "$package" ] || fail "apt knows no $name: run 'apt-get update' first"
  echo "lab: fetching $package" >&2
  apt-get download -qq -o APT::Sandbox::User=root "$package" || fail "cannot download $package"
  package=${package%:*}
  dpkg -x "$package"_*.deb kernel
  rm -rf ./*.deb apt
  echo "${package#linux-image-}" > kernel/.release
  depmod -b kernel "$(cat kernel/.release)"
  touch kernel/.complete
}

# Runs the command in namespaces of its own on this machine: the engines' networks, mounts and
# processes end with it.
run_native() {
  exec unshare --mount --net --pid --fork --kill-child --mount-proc \
    env LAB_NATIVE=1 LAB_REPO="$repo" LAB_RESULTS="${LAB_OUTPUT:-/tmp}" bash "$here/inside.sh" "$@"
}

run_emulated() {
  mkdir -p "$cache"
  (prepare)
  local emulator
  mapfile -t emulator < "$cache/emulator"
  local dir; dir=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$dir'" EXIT
  # A fifo of our own: QEMU must neither truncate the caller's output nor depend on its kind.
  mkfifo "$dir/output"
  mkdir "$dir/results"
  cat "$dir/output" & local copier=$!
  printf '%s' "${1:-}" > "$dir/command"
  {
    echo "export LAB_REPO='$repo' CORACLE_CACHE='$CORACLE_CACHE' LAB_ROOT='$root' LAB_TERMINAL=$console"
    echo "export LAB_RESULTS=/lab/results"
    # Values reach the lab as the caller's shell had them, quotes and all.
    for name in LAB_ENGINES LAB_ICOUNT LAB_KERNEL LAB_PROFILE; do
      [ -n "${!name+x}" ] && printf 'export %s=%q\n' "$name" "${!name}"
    done
  } > "$dir/environment"

  local cpu=(-accel tcg,thread=multi "${processor[@]}" -smp 2)
  [ "$icount" = 1 ] && cpu=(-accel tcg -icount shift=0,sleep=off "${processor_icount[@]}" -smp 1)
  local serial=(-serial "file:$dir/console") stdout=(-chardev "file,id=out,path=$dir/output") append=quiet
  [ "${LAB_CONSOLE:-0}" = 1 ] && { serial=(-serial file:/dev/stderr); append=; }
  local input=/dev/null
  [ -z "${1:-}" ] && serial=(-serial mon:stdio) input=/dev/stdin

  local status=0
  timeout --foreground "${LAB_TIMEOUT:-3600}" "${emulator[@]}" "${machine[@]}" "${cpu[@]}" \
    -m "${LAB_MEMORY_MIB:-8192}" -kernel "$cache/vmlinuz" -initrd "$cache/lab.initrd" \
    -append "console=$console panic=-1 $cmdline $append" -nodefaults -no-user-config -display none -monitor none -no-reboot \
    -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=host,mount_tag=host \
    -fsdev "local,id=job,path=$dir,security_model=none" \
    -device virtio-9p-pci,fsdev=job,mount_tag=job \
    -device virtio-rng-pci -device virtio-serial-pci "${stdout[@]}" \
    -device virtserialport,chardev=out,name=lab.out \
    "${serial[@]}" < "$input" || status=$?
  # Nobody opened the fifo if QEMU did not start.
  [ -e "$dir/status" ] || kill "$copier" 2>/dev/null || true
  wait "$copier" || true
  [ -z "${LAB_OUTPUT:-}" ] || { mkdir -p "$LAB_OUTPUT"; cp -r "$dir/results/." "$LAB_OUTPUT/"; }
  [ "$status" = 124 ] && fail "the command did not end within ${LAB_TIMEOUT:-3600} s"
  [ -e "$dir/status" ] && return "$(cat "$dir/status")"
  tail -n 40 "$dir/console" >&2 2>/dev/null || true
  fail "the emulated machine ended without a result (qemu: $status); LAB_CONSOLE=1 shows all its kernel's messages"
}

case "${1:-}" in
  prepare) mkdir -p "$(dirname "$cache")"; [ "$(mode)" = native ] || (prepare) ;;
  run)     [ -n "${2:-}" ] || fail "run needs a command"; mkdir -p "$(dirname "$cache")"; "run_$(mode)" "$2" ;;
  shell)   mkdir -p "$(dirname "$cache")"; "run_$(mode)" ;;
  mode)    mode ;;
  *) sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
