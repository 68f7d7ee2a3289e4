#!/bin/busybox sh
# PID 1 of the emulated lab: puts the root file system, the host's own or one from its cache, under an
# overlay and hands over to inside.sh; what the lab writes is gone when it ends.
b=/bin/busybox
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
out=/dev/null
# The kernel loads modules on demand by /sbin/modprobe of its first root, which is this one.
$b mkdir -p /sbin
printf '#!/bin/busybox sh\nexec /bin/busybox chroot /root /sbin/modprobe "$@"\n' > /sbin/modprobe
$b chmod 755 /sbin/modprobe
for name in /root/sys/class/virtio-ports/*/name; do
  [ "$($b cat "$name")" = lab.out ] && out=/dev/$($b basename "$($b dirname "$name")")
done
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-linux}"
if [ -s /root/lab/command ]; then
  $b chroot /root /bin/bash "$LAB_REPO/tests/lab/inside.sh" "$($b cat /root/lab/command)" \
    < /root/dev/null > "/root$out" 2>&1
else
  $b chroot /root /usr/bin/setsid -c /bin/bash "$LAB_REPO/tests/lab/inside.sh" \
    < "/root/dev/$LAB_TERMINAL" > "/root/dev/$LAB_TERMINAL" 2>&1
fi
echo $? > /root/lab/status
$b sync
echo o > /root/proc/sysrq-trigger
$b sleep 60
