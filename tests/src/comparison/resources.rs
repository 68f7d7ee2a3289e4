//! Limits, what they do, and what is told about them.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "Resources", groups: GROUPS };

const GROUPS: &[Group] = &[
    Group {
        name: "limits",
        before: "",
        place: Place::Container(
            "--memory 192m --memory-swap 192m --memory-reservation 64m --cpus 1.5 --cpu-shares 2048 --pids-limit 40 --ulimit nproc=500 --ulimit stack=4194304 --oom-score-adj 300 --shm-size 100m --cpuset-cpus 0-1",
        ),
        after: "",
        cases: &[
            same(
                "memory limits are the user's",
                "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.swap.max /sys/fs/cgroup/memory.low",
            ),
            same(
                "CPU limits are the user's",
                "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu.weight",
            ),
            same(
                "the processes' limit is the user's and holds",
                "cat /sys/fs/cgroup/pids.max; i=0; while [ $i -lt 60 ]; do sleep 3 & i=$((i+1)); done 2>&1 | head -c 60; wait; cat /sys/fs/cgroup/pids.events | cut -d' ' -f1",
            ),
            same(
                "resource limits are the user's",
                "ulimit -u; ulimit -s; cat /proc/self/oom_score_adj",
            ),
            same(
                "the memory is really there",
                "head -c 90000000 /dev/zero > /dev/shm/x; ls -l /dev/shm/x | awk '{print $5}'; rm /dev/shm/x",
            ),
            same("two processors are there", "nproc"),
            same(
                "own cgroup is the root of the view",
                "cat /proc/self/cgroup; ls /sys/fs/cgroup | grep -c '^memory.max$'",
            ),
        ],
    },
    Group {
        name: "nolimits",
        before: "",
        place: Place::Container(""),
        after: "",
        cases: &[
            same("without limits all processors are there", "nproc"),
            same(
                "without limits there is a lot of memory",
                "mkdir /t; head -c 200000000 /dev/zero | tail | wc -c; cat /sys/fs/cgroup/memory.max",
            ),
            same("without --ulimit the engine's own limits hold", "cat /proc/self/limits"),
        ],
    },
    Group {
        name: "memory",
        place: Place::Host,
        before: "",
        after: "docker rm -f $name >/dev/null 2>&1",
        cases: &[
            same(
                "running out of memory gives 137 and OOMKilled",
                "since=$(date +%s); run --name $name --memory 64m --memory-swap 64m --cpuset-cpus 1 busybox sh -c 'nproc; exec tail /dev/zero'; echo $?; field $name '{{.State.OOMKilled}} {{.State.ExitCode}} {{.State.Status}}'; docker events --since $since --until $(($(date +%s)+1)) --filter container=$name --format '{{.Action}}' | grep oom",
            ),
            same(
                "limits that contradict each other are refused",
                "run --rm --name $name-l --memory 64m --memory-swap 32m busybox true; run --rm --memory 1k busybox true",
            ),
        ],
    },
    Group {
        name: "update",
        place: Place::Host,
        before: r#"
dev=/dev/$(ls /sys/block | grep loop | head -n 1); run -d --name $name --memory 128m --memory-swap 128m --cpus 1 --shm-size 600m --device-read-bps $dev:1mb --device-write-iops $dev:100 busybox sh -c 'head -c 30000000 /dev/zero > /dev/shm/x; echo up; sleep 1000' >/dev/null; logged $name up"#,
        after: "docker rm -f $name >/dev/null",
        cases: &[
            same(
                "block device limits are held on the host",
                "pid=$(field $name '{{.State.Pid}}'); cat /sys/fs/cgroup$(cut -d: -f3 /proc/$pid/cgroup)/io.max | cut -d' ' -f 2-",
            ),
            same(
                "docker stats counts",
                "docker stats --no-stream --format '{{.MemUsage}} {{.PIDs}}' $name | awk '{print ($1 ~ /MiB/ && $1+0 > 28), ($4 > 0)}'",
            ),
            differs(
                "`docker stats` shows the limit",
                "docker stats --no-stream --format '{{.MemUsage}}' $name | cut -d/ -f 2",
                "224MiB",
                "96 MiB more: Docker reads the cgroup on the host, which holds the guest's kernel and the VMM as well. What the container may use is the limit itself",
            ),
            same(
                "memory and processors grow while it runs",
                "docker update --memory 512m --memory-swap 512m --cpus 2 $name; docker exec $name sh -c 'cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max'",
            ),
            same(
                "memory and processors shrink while it runs",
                "docker update --memory 100m --memory-swap 100m --cpus 0.5 --pids-limit 20 $name; docker exec $name cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; field $name '{{.State.Status}}'",
            ),
        ],
    },
];
