#!/bin/busybox sh
# PID 1 of the emulated lab: puts the root file system, the host's own or one from its cache, under an
# overlay, moves there and runs inside.sh; what the lab writes is gone when it ends.
b=/bin/busybox
if [ "${1:-}" = moved ]; then
  out=/dev/null
  for name in /sys/class/virtio-ports/*/name; do
    [ "$($b cat "$name")" = lab.out ] && out=/dev/$($b basename "$($b dirname "$name")")
  done
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-linux}"
  if [ -s /lab/command ]; then
    /bin/bash "$LAB_REPO/tests/lab/inside.sh" "$($b cat /lab/command)" < /dev/null > "$out" 2>&1
  else
    /usr/bin/setsid -c /bin/bash "$LAB_REPO/tests/lab/inside.sh" \
      < "/dev/$LAB_TERMINAL" > "/dev/$LAB_TERMINAL" 2>&1
  fi
  echo $? > /lab/status
  $b sync
  echo o > /proc/sysrq-trigger
  exec $b sleep 60
fi
$b mkdir -p /proc /sys /dev /root /host /rw /job
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module"; done < /modules/order
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /host
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 job /job
. /job/environment
# Sized, because Docker's data root and every image live in it.
$b mount -t tmpfs -o size=75% rw /rw
$b mkdir -p /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/host$LAB_ROOT,upperdir=/rw/upper,workdir=/rw/work lab /root
for directory in proc sys dev; do $b mount --move /$directory /root/$directory; done
$b mkdir -p /root/lab
$b mount --move /job /root/lab
$b mkdir -p /root/dev/pts /root/dev/shm /root/dev/mqueue
$b ln -s /proc/self/fd /root/dev/fd
for number in 0:stdin 1:stdout 2:stderr; do $b ln -s /proc/self/fd/${number%:*} /root/dev/${number#*:}; done
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /root/dev/pts
$b mount -t tmpfs shm /root/dev/shm
$b mount -t mqueue mqueue /root/dev/mqueue
$b mount -t tmpfs run /root/run
$b mount -t tmpfs tmp /root/tmp
# The tree and the cache may lie below a folder that is the lab's own now.
for directory in "$LAB_REPO" "$CORACLE_CACHE"; do
  [ -d "/root$directory" ] && continue
  $b mkdir -p "/root$directory"
  $b mount --bind "/host$directory" "/root$directory"
done
$b mount -t cgroup2 cgroup /root/sys/fs/cgroup
$b mkdir -p /root/lib/modules
$b mount --bind "/host$CORACLE_CACHE/lab/kernel/lib/modules" /root/lib/modules
# Who enters a container's mount namespace gets what is on top of its first root, so this must be the
# lab's root as anywhere else; and the kernel looks for modprobe where PID 1 is.
cd /root || exit
$b mount --move . /
exec $b chroot . /bin/busybox sh "$LAB_REPO/tests/lab/init.sh" moved
