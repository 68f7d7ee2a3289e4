//! Limits, what they do, and what is told about them.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "Resources", groups: GROUPS };

const GROUPS: &[Group] = &[
    Group {
        name: "nolimits",
        before: "",
        place: Place::Container(""),
        after: "",
        cases: &[same("without limits all processors are there", "nproc")],
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
        name: "statistics",
        place: Place::Host,
        before: r#"
run -d --name $name --memory 128m --memory-swap 128m --cpus 1 busybox sh -c 'echo up; sleep 1000' >/dev/null; logged $name up"#,
        after: "docker rm -f $name >/dev/null",
        cases: &[differs(
            "`docker stats` shows the limit",
            "docker stats --no-stream --format '{{.MemUsage}}' $name | cut -d/ -f 2",
            "224MiB",
            "96 MiB more: Docker reads the cgroup on the host, which holds the guest's kernel and the VMM as well. What the container may use is the limit itself",
        )],
    },
];
