//! File systems: images, volumes, binds, tmpfs, and what tools do to them.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "File systems", groups: GROUPS };

const GROUPS: &[Group] = &[
    Group {
        name: "files",
        before: "mkdir -p /tmp/compare/$name/dir/sub; echo one > /tmp/compare/$name/dir/a; echo file > /tmp/compare/$name/file; chmod 640 /tmp/compare/$name/file; chown 1:2 /tmp/compare/$name/file; ln -s a /tmp/compare/$name/dir/link",
        place: Place::Container(
            "-v /tmp/compare/$name/dir:/bind -v /tmp/compare/$name/file:/file -v /tmp/compare/$name/dir:/ro:ro -v $name-volume:/volume -v /anonymous --tmpfs /scratch:size=1m,mode=1700 --mount type=tmpfs,dst=/scratch2,tmpfs-size=2m --shm-size 3m",
        ),
        after: "",
        cases: &[
            same(
                "the mounts are where they are with runc",
                "cut -d' ' -f 2 /proc/mounts | grep -v ^/proc/ | sort",
            ),
            same(
                "the mounts are as writable as with runc",
                "awk '{split($4,o,\",\"); print $2, o[1]}' /proc/mounts | grep -v ^/proc/ | sort",
            ),
            same(
                "/proc, /sys, /dev and /run have their file systems",
                "awk '$2~/^.(proc$|sys|dev)/{print $2,$3}' /proc/mounts | sort",
            ),
            same(
                "the devices are Docker's",
                "ls -l /dev | grep -v kcore | awk '{print $1,$3,$4,$NF}' | sort; ls -l /dev/null /dev/tty | awk '{print $5,$6}'",
            ),
            same(
                "devices work",
                "head -c 4 /dev/zero | od -An -tx1; echo x > /dev/null; echo full > /dev/full; head -c 8 /dev/urandom | wc -c",
            ),
            same(
                "binds show the host's files with owner and mode",
                "cat /bind/a /file /bind/link; stat -c '%u:%g %a %F' /file /bind/sub; ls /bind",
            ),
            same(
                "a read-only bind refuses writes",
                "echo x > /ro/a; touch /ro/new; rm /ro/a; mkdir /ro/d; echo $?",
            ),
            same(
                "a single file can be written and not replaced",
                "echo more >> /file; cat /file; mv /file /other; rm /file; echo $?",
            ),
            same(
                "owners, modes and times are kept",
                "cd /bind; touch t; chown 12:34 t; chmod 4751 t; touch -d '2001-02-03 04:05:06' t; stat -c '%u:%g %a %Y' t; mkdir -m 2775 d; stat -c %a d; rm -r t d",
            ),
            same(
                "links, renames and removed open files",
                "cd /volume; echo x > a; ln a b; stat -c %h a; mv a c; cat c; exec 3>>c; rm c; echo y >&3; cat b; ln -s b s; readlink s; rm b s; ls",
            ),
            same(
                "directories that are not empty stay",
                "mkdir -p /volume/d/e; rmdir /volume/d; mv /volume/d /volume/f; ls /volume; rm -r /volume/f",
            ),
            same(
                "fifos and sockets work in volumes",
                "cd /volume; mkfifo f; (echo through > f &); cat f; stat -c %F f; rm f; nc -lU s > out & sleep 1; echo sent | nc -w 1 local:s 2>/dev/null; stat -c %F s; rm -f s out; kill %1 2>/dev/null; true",
            ),
            same(
                "device nodes can be made and used",
                "cd /volume; mknod n c 1 3 && echo x > n; stat -c '%F %t %T' n; rm n",
            ),
            same(
                "sparse and large files",
                "cd /volume; truncate -s 6G big; stat -c %s big; du -k big | cut -f1; echo end | dd of=big bs=1M seek=5000 conv=notrunc 2>/dev/null; tail -c 2000 big | tr -d '\\0' | wc -c; dd if=big bs=1M skip=5000 count=1 2>/dev/null | head -c 4; rm big",
            ),
            same(
                "locks exclude each other",
                "cd /volume; (flock 9; sleep 1.5) 9> lock & sleep 0.5; flock -n 9 9> /dev/null; flock -n lock true; echo $?; flock lock echo after; rm lock",
            ),
            same(
                "a tmpfs has its size and mode",
                "df -k /scratch /scratch2 /dev/shm | awk 'NR>1{print $2,$6}'; stat -c %a /scratch /scratch2 /dev/shm; head -c 2000000 /dev/zero > /scratch/x; echo $?; rm /scratch/x",
            ),
            same(
                "a full file system says so",
                "dd if=/dev/zero of=/dev/shm/x bs=1M count=10 2>&1 | head -n 1; rm /dev/shm/x",
            ),
            same(
                "masked paths are hidden",
                "ls -A /sys/firmware | wc -l; cat /proc/keys /proc/timer_list | wc -c; cat /proc/kcore 2>/dev/null | head -c 1 | wc -c",
            ),
            same(
                "/proc/sys and /sys are read-only",
                "echo x > /proc/sys/kernel/domainname; mkdir /sys/fs/cgroup/x; echo 1 > /proc/irq/default_smp_affinity; echo $?",
            ),
            same(
                "names and lengths",
                "cd /volume; n=$(printf '%0255d' 0); touch $n && ls | wc -c; touch ${n}1; touch \"sp ace\" 'new\nline' ''; ls | wc -l; rm -f *; ls -A",
            ),
            same(
                "many files",
                "cd /volume; mkdir m; i=0; while [ $i -lt 300 ]; do echo $i > m/$i; i=$((i+1)); done; ls m | wc -l; cat m/* | md5sum; rm -r m",
            ),
            same(
                "timestamps and truncation",
                "cd /volume; echo 12345 > t; a=$(stat -c %Y t); : > t; stat -c %s t; [ $(stat -c %Y t) -ge $a ]; echo $?; rm t",
            ),
            same(
                "the root file system can be written",
                "echo x > /new; mkdir -p /a/b; mv /new /a/b; cat /a/b/new; rm -r /a; ls /a",
            ),
        ],
    },
    Group {
        name: "readonly",
        before: "",
        place: Place::Container("--read-only --tmpfs /run --tmpfs /tmp"),
        after: "",
        cases: &[
            same("--read-only refuses writes", "touch /x; echo > /etc/passwd; rm -r /bin; echo $?"),
            same(
                "--read-only leaves tmpfs, devices and /dev/shm writable",
                "touch /run/x /tmp/x /dev/shm/x; echo x > /dev/null; ls /run /tmp /dev/shm",
            ),
            same(
                "--read-only leaves Docker's files as they are",
                "echo '# x' >> /etc/hosts; echo '# x' >> /etc/resolv.conf; tail -n 1 /etc/hosts | cut -f 2",
            ),
        ],
    },
    Group {
        name: "copies",
        place: Place::Host,
        before: r#"
mkdir -p $folder/bind/d $folder/in/sub; echo payload > $folder/in/sub/f; chmod 600 $folder/in/sub/f; echo one > $folder/file
mount -t tmpfs outer $folder/bind; mount --make-shared $folder/bind; mkdir $folder/bind/d $folder/bind/e; mount -t tmpfs inner $folder/bind/e; echo inner > $folder/bind/e/f
run -d --tmpfs /scratch -v $name:/volume -v $folder/bind:/bind -v $folder/bind:/slave:rslave -v $folder/file:/file --name $name busybox sh -c 'echo inside > /made; rm /bin/wget; mkdir /d; chmod 700 /tmp; echo up; sleep 1000' >/dev/null; logged $name up"#,
        after: "docker rm -f -v $name >/dev/null; docker volume rm $name; umount -R $folder/bind",
        cases: &[
            same(
                "changes of the host are seen at once, and those of the container",
                "echo from host > $folder/bind/go; docker exec $name sh -c 'cat /bind/go; echo back > /bind/back'; cat $folder/bind/back; rm $folder/bind/go; docker exec $name ls /bind",
            ),
            same(
                "a file that the host changes in place is read anew a second later",
                "docker exec $name cat /file; echo 'two, longer' > $folder/file; sleep 1; docker exec $name cat /file; docker exec $name sh -c 'echo three > /file'; cat $folder/file",
            ),
            same(
                "mounts below a bind are seen",
                "docker exec $name sh -c 'cat /bind/e/f; echo x > /bind/e/g'; cat $folder/bind/e/g",
            ),
            same(
                "mounts made later arrive in a bind with rslave",
                r#"
mkdir $folder/bind/late; mount -t tmpfs late $folder/bind/late; echo late > $folder/bind/late/f
docker exec $name sh -c 'cat /slave/late/f; ls /bind/late | wc -l; cat /slave/e/f'"#,
            ),
            differs(
                "the host unmounts what a bind with rslave has shown",
                "umount $folder/bind/late",
                "target is busy",
                "it is busy for as long as the guest remembers files of it: `umount --lazy`, or bind without `rslave`",
            ),
            same(
                "diff and commit see what the container wrote",
                "docker diff $name | sort; docker commit $name $name:image | cut -c 1-7; docker run --rm $name:image sh -c 'cat /made; stat -c %a /tmp; ls /bin/wget'; docker rmi $name:image >/dev/null",
            ),
            same(
                "cp, diff and commit work on a stopped container",
                r#"
docker exec $name sh -c 'head -c 300000 /dev/zero > /late'; docker stop -t 0 $name >/dev/null; docker cp -q $name:/late - | tar -xO | md5sum; docker cp -q $folder/in $name:/put; docker diff $name | sort
docker commit $name $name:image >/dev/null; docker create --name $name-c $name:image >/dev/null; docker cp -q $name-c:/late - | tar -xO | md5sum; docker cp -q $name-c:/put/sub/f - | tar -xO; docker rm $name-c >/dev/null; docker rmi $name:image >/dev/null
docker start $name >/dev/null; docker exec $name sh -c 'cat /put/sub/f; stat -c %a /put/sub/f; wc -c < /late'"#,
            ),
        ],
    },
    Group {
        name: "inotify",
        place: Place::Host,
        // inotify_init1 and inotify_add_watch, for writing, moves, creation and deletion. Where the lab has its
        // files the kernel cannot tell of changes.
        before: r#"
mkdir -p $folder/bind; mount -t tmpfs watched $folder/bind; run -d --name $name -v $folder/bind:/bind -v /usr:/usr:ro -v /usr/lib:/lib:ro -v /usr/lib64:/lib64:ro busybox /usr/bin/perl -e '
  $f = syscall(294, 0); $d = "/bind"; syscall(254, $f, $d, 0x3c2); $| = 1; print "ready\n"; open(I, "<&=$f");
  while (sysread(I, $b, 4096)) { while (length $b) { ($w, $m, $c, $l) = unpack("iIII", $b); print $m & 2 ? "write " : $m & 64 ? "from " : $m & 128 ? "to " : $m & 256 ? "create " : "delete ", unpack("Z*", substr($b, 16, $l)), "\n"; $b = substr($b, 16 + $l) } }' >/dev/null; logged $name ready"#,
        after: "docker rm -f $name >/dev/null; umount $folder/bind",
        cases: &[
            same(
                "inotify tells of the container's own changes",
                "docker exec $name sh -c 'echo x > /bind/own; rm /bind/own'; logged $name 'delete own'; docker logs $name",
            ),
            // mmap(), shared and writable; read() stores into the mapping.
            same(
                "mappings of files and capabilities of files work",
                r#"
docker exec $name /usr/bin/perl -e '
  open(F, "+>", "/bind/map"); truncate(F, 8192); $a = syscall(9, 0, 8192, 3, 1, fileno(F), 0); pipe(R, W); syswrite(W, "mapped"); syscall(0, fileno(R), $a + 4090, 6) == 6 or die; seek(F, 4090, 0); read(F, $b, 6); print "$b
"; syscall(11, $a, 8192); open(M, "<:mmap", "/bind/map"); seek(M, 4090, 0); read(M, $c, 6); print "$c
"'; tail -c 4102 $folder/bind/map | head -c 6
docker exec $name sh -c 'for f in /bind/map /map; do touch $f; /usr/sbin/setcap cap_net_raw+ep $f; /usr/sbin/getcap $f; done; rm /bind/map'"#,
            ),
            same(
                "inotify tells of the host's changes to a bind",
                r#"
cd $folder/bind; echo x > host; sleep 1; echo more >> host; sleep 1; mv host moved; sleep 1; echo new > moved.new; sleep 1; mv moved.new moved; sleep 1; rm moved; mkdir sub; sleep 1; rmdir sub; cp /dev/null quick; mv quick gone; rm gone
logged $name 'delete gone'; docker logs $name | grep -v -e own -e map; docker exec $name ls -A /bind"#,
            ),
        ],
    },
    Group {
        name: "volumes",
        place: Place::Host,
        before: "",
        after: "docker rm -f -v $name >/dev/null 2>&1; docker volume rm -f $name >/dev/null",
        cases: &[
            same(
                "volumes outlive containers and are filled from the image",
                "run --name $name -v $name:/etc busybox sh -c 'ls /etc; echo kept > /etc/kept'; run --rm --volumes-from $name:ro busybox sh -c 'cat /etc/kept; touch /etc/g'",
            ),
            same(
                "a missing folder of --mount is refused",
                "run --rm --name $name-m --mount type=bind,src=$folder/no,dst=/x busybox true",
            ),
        ],
    },
];
