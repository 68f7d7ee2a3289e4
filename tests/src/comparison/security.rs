//! What a container may do, and who it is.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "Security options", groups: GROUPS };

const GROUPS: &[Group] = &[
    Group {
        name: "default",
        before: "",
        place: Place::Container(""),
        after: "",
        cases: &[
            same(
                "mount, unshare and raw clocks are refused",
                "mount -t tmpfs x /mnt 2>&1 | head -n 1; mkdir -p /m; mount -t tmpfs x /m; unshare -m true; unshare -U true; date -s 2020-01-01 2>&1 | head -n 1; hostname other; echo $?",
            ),
            same(
                "chown, chroot, low ports and raw sockets are allowed",
                "touch /f; chown 5:6 /f; stat -c %u:%g /f; chroot / true; echo $?; (nc -l -p 80 >/dev/null &); sleep 0.5; echo x | nc -w 1 127.0.0.1 80; echo $?",
            ),
            same(
                "device nodes are refused to be read",
                "mknod /d b 8 0; head -c 1 /d 2>/dev/null; echo $?; mknod /k c 1 1 && head -c 1 /k 2>/dev/null; echo $?",
            ),
            same("the kernel's log is not told", "dmesg | wc -l"),
            same(
                "reboot and modules are refused",
                "reboot -f; swapoff -a; rmmod x 2>&1 | wc -l; echo $?",
            ),
        ],
    },
    Group {
        name: "caps",
        before: "",
        place: Place::Container(
            "--cap-drop ALL --cap-add NET_BIND_SERVICE --cap-add SYS_CHROOT --security-opt no-new-privileges",
        ),
        after: "",
        cases: &[
            same(
                "--cap-drop and --cap-add decide",
                "grep ^Cap /proc/self/status; grep NoNewPrivs /proc/self/status",
            ),
            same(
                "what is dropped is refused",
                "chown 1 /etc/passwd; chroot / true; kill -0 1; echo $?",
            ),
        ],
    },
    Group {
        name: "user",
        before: "",
        place: Place::Container("--user 1000:1000 --group-add 7 --group-add 8"),
        after: "",
        cases: &[
            same(
                "--user and --group-add are who it is",
                "id -u; id -g; id -G; grep ^Cap /proc/self/status; echo $HOME",
            ),
            same(
                "a user cannot write root's files",
                "touch /x; echo > /etc/passwd; touch /tmp/x && stat -c %u:%g /tmp/x; head -c 1 /etc/shadow",
            ),
        ],
    },
    Group {
        name: "privileged",
        before: "",
        place: Place::Container("--privileged"),
        after: "",
        cases: &[
            same(
                "--privileged gives every capability",
                "grep -E '^Cap(Eff|Bnd|Prm)' /proc/self/status; grep -E '^Seccomp:' /proc/self/status",
            ),
            same(
                "--privileged may mount and name",
                "mkdir -p /m; mount -t tmpfs x /m && touch /m/y && ls /m; umount /m; hostname other; hostname; echo 1 > /proc/sys/net/ipv4/ip_forward; cat /proc/sys/net/ipv4/ip_forward",
            ),
            same(
                "--privileged writes its cgroups",
                "mkdir /sys/fs/cgroup/sub && rmdir /sys/fs/cgroup/sub; echo $?",
            ),
            same(
                "--privileged makes network interfaces",
                "ip link add v0 type veth peer name v1; ls /sys/class/net | grep -c v0",
            ),
            differs(
                "`--privileged` opens the host's devices",
                "(: < /dev/kvm) 2>/dev/null && echo opened || echo none",
                "none",
                "the guest's: `--privileged` is inside the guest only, where it is safe",
            ),
        ],
    },
    Group {
        name: "unconfined",
        before: "",
        place: Place::Container(
            "--security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt label=disable",
        ),
        after: "",
        cases: &[same(
            "--security-opt seccomp=unconfined has no filter",
            "grep -E '^Seccomp:' /proc/self/status; unshare -U id -u; echo $?",
        )],
    },
    Group {
        name: "options",
        place: Place::Host,
        before: "",
        after: "",
        cases: &[
            same(
                "a seccomp profile of the user's holds",
                r#"
echo '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}, {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_KILL_PROCESS"}]}' > $folder/profile.json
run --rm --security-opt seccomp=$folder/profile.json --userns host --device /dev/null:/dev/mine --device /dev/zero:/dev/nought:r --sysctl net.ipv4.ip_local_port_range='2000 2100' --sysctl kernel.msgmax=9000 busybox sh -c '
  mkdir /x; echo $?; ln -s a b; echo $?; tr -s " " < /proc/self/uid_map; ls -l /dev/mine | cut -c 1; echo x > /dev/mine; head -c 3 /dev/nought | wc -c; cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/msgmax'"#,
            ),
            same(
                "a block device is read and written",
                r#"
truncate -s 16M $folder/disk; echo disk | dd of=$folder/disk conv=notrunc 2>/dev/null; dev=$(losetup -f --show $folder/disk)
run --rm --device $dev:/dev/xvda --device /dev/net/tun --device /dev/fuse --cap-add NET_ADMIN busybox sh -c 'ls -l /dev/xvda /dev/net/tun /dev/fuse | cut -c 1; head -c 5 /dev/xvda; blockdev --getsize64 /dev/xvda; echo back | dd of=/dev/xvda seek=1 2>/dev/null; sync; ip tuntap add t0 mode tap; ls /sys/class/net | grep t0; exec 3<>/dev/fuse; echo $?'
sync; dd if=$dev bs=1 skip=512 count=4 2>/dev/null; losetup -d $dev"#,
            ),
            differs(
                "a character device of the host is opened with --device",
                "run --rm --name $name --device /dev/kvm busybox sh -c '(: < /dev/kvm) && echo opened'",
                "cannot be passed to a virtual machine",
                "refused, but for block devices and what a kernel implements by itself, such as `/dev/net/tun`, `/dev/fuse` and `/dev/zero`: a machine cannot be given a character device of another",
            ),
            same("an unknown user is refused", "run --rm --name $name --user nosuch busybox true"),
        ],
    },
];
