//! Podman, with the runtime of `--runtime`.

use super::case::{Chapter, Group, Place, same};

pub const CHAPTER: Chapter = Chapter { title: "Podman", groups: GROUPS };

const GROUPS: &[Group] = &[Group {
    name: "podman",
    place: Place::Host,
    before: r#"
podman_image; pod run -d --name $name --health-cmd 'test -e /etc/passwd' -p $port:80 -v $folder:/x -e A=b -w /tmp --hostname boat --memory 128m $image sh -c 'mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; trap "echo bye; exit 3" TERM; echo up; while :; do sleep 0.2; done' >/dev/null; eventually sh -c "podman logs $name | grep up""#,
    after: "podman rm -f -t 0 $name >/dev/null",
    cases: &[
        same(
            "podman run gives output, input and exit code",
            "echo in | pod run -i --rm $image sh -c 'cat; echo out; echo err >&2; exit 9'",
        ),
        same(
            "podman tells what is missing",
            "pod run --rm $image nosuch 2> $folder/err; echo $?; grep -c 'executable file not found in .PATH' $folder/err",
        ),
        same(
            "podman executes with user and environment",
            "podman exec -u 7 -e B=c $name sh -c 'id -u; echo $A$B; pwd; hostname; cat /sys/fs/cgroup/memory.max; touch /x/f; exit 4'; echo $?; ls $folder",
        ),
        same("podman has a terminal", "terminal \"podman exec -it $name sh -c 'tty; exit 5'\""),
        same(
            "podman publishes ports",
            "eventually curl -sf http://127.0.0.1:$port/; curl -s http://127.0.0.1:$port/",
        ),
        same("podman makes health checks", "podman healthcheck run $name; echo $?"),
        same(
            "podman pauses",
            "podman pause $name; podman inspect --format '{{.State.Status}}' $name; podman unpause $name",
        ),
        same(
            "podman stops",
            "podman stop $name 2>/dev/null; podman logs $name; podman inspect --format '{{.State.ExitCode}} {{.State.Status}}' $name",
        ),
    ],
}];
