#!/usr/bin/env bash
# Runs in the lab: installs the built binaries and the guest image, starts containerd and Docker
# with Coracle registered, then runs the command given (or a shell).
set -euo pipefail

repo=${LAB_REPO:?}
cache=${CORACLE_CACHE:?}
target=$repo/target/$(uname -m)-unknown-linux-gnu/${LAB_PROFILE:-release}
# shellcheck source=/dev/null
. "$repo/tests/lab/arch/$(uname -m).sh"

say() { echo "lab: $*" >&2; }

if [ "${LAB_NATIVE:-0}" = 1 ]; then
  # Everything written below lands in file systems of this mount namespace.
  mount --make-rprivate /
  mount -t tmpfs lab /mnt
  for path in /usr/local/bin /etc /var/lib; do
    mkdir -p "/mnt/upper$path" "/mnt/work$path"
    mount -t overlay -o "lowerdir=$path,upperdir=/mnt/upper$path,workdir=/mnt/work$path" lab "$path"
  done
  mount -t tmpfs run /run
else
  # The rest is loaded on demand.
  for module in $kvm_module tun br_netfilter loop vhost_net; do modprobe "$module"; done
  # As udev would: who may open these needs no more to run containers.
  chmod 666 /dev/kvm /dev/net/tun
  mount -o remount,rw /sys 2>/dev/null || true
  # A container's processes must not sit beside controllers' inner nodes.
  mkdir -p /sys/fs/cgroup/lab
  for pid in $(cat /sys/fs/cgroup/cgroup.procs); do echo "$pid" > /sys/fs/cgroup/lab/cgroup.procs 2>/dev/null || true; done
  for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control || true
  done
fi
ip link set lo up
hostname lab 2>/dev/null || true

install_coracle() {
  local name
  mkdir -p /usr/local/bin /var/lib/coracle /etc/coracle
  # What is measured reads images and templates as on a host, where they do not lie in memory.
  if [ "${LAB_ICOUNT:-0}" = 1 ]; then
    truncate -s 4G /run/images && mkfs.ext4 -q -O ^has_journal /run/images && mount -o loop /run/images /var/lib/coracle
  fi
  mkdir -p /var/lib/coracle/guest
  # Twenty guests at once on two emulated processors take their time.
  echo '{ "boot_timeout_s": 300 }' > /etc/coracle/config.json
  for name in coracle coracle-vmm coracle-image coracle-perf coracle-perf-load containerd-shim-coracle-v2; do
    [ -x "$target/$name" ] && install "$target/$name" /usr/local/bin/
  done
  # Copied and not linked: what is timed must not wait for the shared file system.
  local kind
  for kind in distro tuned; do
    [ -d "$cache/guest-$kind" ] && cp -rL "$cache/guest-$kind" "/var/lib/coracle/guest-$kind"
  done
  kind=${LAB_KERNEL:-distro}
  [ -d "/var/lib/coracle/guest-$kind" ] && cp "/var/lib/coracle/guest-$kind"/* /var/lib/coracle/guest/
  return 0
}

start_engines() {
  command -v dockerd >/dev/null || { say "no dockerd: run 'make setup'"; return 1; }
  mkdir -p /run/lab /etc/docker /etc/containers
  local runtimes='"coracle": { "path": "/usr/local/bin/coracle" }'
  ! command -v crun >/dev/null || runtimes+=', "crun": { "path": "'$(command -v crun)'" }'
  cat > /run/lab/daemon.json <<JSON
{ "runtimes": { $runtimes },
  "data-root": "/var/lib/docker-lab", "exec-root": "/run/docker", "pidfile": "/run/docker.pid",
  "hosts": ["unix:///var/run/docker.sock"], "ip6tables": false,
  "storage-driver": "overlay2", "log-level": "warn" }
JSON
  # File systems of their own: an engine's overlays cannot lie on the lab's overlay.
  mkdir -p /var/lib/docker-lab /var/lib/containers
  mount -t tmpfs docker /var/lib/docker-lab
  mount -t tmpfs podman /var/lib/containers
  containerd > /run/lab/containerd.log 2>&1 &
  local tries=0
  until [ -S /run/containerd/containerd.sock ]; do
    tries=$((tries + 1)); [ "$tries" -lt 600 ] || { say "containerd does not start:"; tail /run/lab/containerd.log >&2; return 1; }
    sleep 0.1
  done
  dockerd --config-file /run/lab/daemon.json --containerd /run/containerd/containerd.sock \
    > /run/lab/dockerd.log 2>&1 &
  tries=0
  until docker version >/dev/null 2>&1; do
    tries=$((tries + 1)); [ "$tries" -lt 240 ] || { say "dockerd does not start:"; tail /run/lab/dockerd.log >&2; return 1; }
    sleep 0.5
  done
  # No registry is needed: the image is busybox from this machine's package.
  local tree; tree=$(mktemp -d)
  mkdir -p "$tree"/{bin,etc,tmp,root,proc,sys,dev,home,var,www}
  cp /bin/busybox "$tree/bin/"
  for applet in $(/bin/busybox --list); do [ "$applet" = busybox ] || ln -s busybox "$tree/bin/$applet"; done
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' > "$tree/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' > "$tree/etc/group"
  chmod 1777 "$tree/tmp"
  tar -C "$tree" -c . | docker import --change 'CMD ["sh"]' --change 'ENV PATH=/bin' - busybox >/dev/null
  rm -rf "$tree"
}

install_coracle
[ "${LAB_ENGINES:-1}" = 0 ] || start_engines
# A clock that counts instructions jumps to the next timer whenever the processor idles, so that
# waiting for the shared file system would cost anything up to seconds. A processor that never idles
# waits as long as it takes. Who wants to wait for a while, and for nothing else, stops this one.
if [ "${LAB_ICOUNT:-0}" = 1 ]; then
  sh -c 'while :; do :; done' &
  export LAB_IDLER=$!
  # The cgroup is idle and not the process, whose priority counts in its own cgroup only: containers,
  # in theirs, would have to share the processor.
  mkdir /sys/fs/cgroup/idler
  echo 1 > /sys/fs/cgroup/idler/cpu.idle
  echo "$LAB_IDLER" > /sys/fs/cgroup/idler/cgroup.procs
fi

cd "$repo"
status=0
if [ -n "${1:-}" ]; then
  bash -c "$1" < /dev/null || status=$?
else
  bash -i || status=$?
fi
exit "$status"
