//! Podman, with the runtime of `--runtime`.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "Podman", groups: GROUPS };

const GROUPS: &[Group] = &[RUNNING, ENDING, STORAGE];

/// What is done with a container that runs.
const RUNNING: Group = Group {
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
        same(
            "podman exec of what is missing gives 127 and of no program 126",
            "for what in nosuch /etc/passwd; do podman exec $name $what 2>/dev/null; echo $?; done; podman exec -w /nosuch $name pwd 2>/dev/null; echo $?",
        ),
        same(
            "podman exec passes input, has every capability or runs on its own",
            "seq 1 20000 | podman exec -i $name md5sum; podman exec --privileged $name grep CapEff /proc/self/status; podman exec -d $name touch /made; eventually podman exec $name test -e /made && echo made",
        ),
        same(
            "podman cp works both ways",
            "mkdir -p $folder/in/sub; echo payload > $folder/in/sub/f; chmod 600 $folder/in/sub/f; podman cp $folder/in $name:/copied; podman exec $name sh -c 'cat /copied/sub/f; stat -c %a /copied/sub/f; echo changed > /copied/sub/f'; podman cp $name:/copied/sub/f - | tar -xO; podman diff $name | grep copied | sort",
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
            // Podman may miss the last line when it follows the log of what ends.
            "podman logs -f $name > $folder/log & podman stop $name 2>/dev/null; wait $!; grep up $folder/log; podman logs --tail 1 $name; podman inspect --format '{{.State.ExitCode}} {{.State.Status}}' $name",
        ),
    ],
};

/// How a container ends, and what shares it.
const ENDING: Group = Group {
    name: "podman-end",
    place: Place::Host,
    before: r#"
podman_image; podman network create $name >/dev/null
pod run -d --name $name --network $name $image sh -c 'trap "echo got USR1" USR1; echo up; while :; do sleep 0.2; done' >/dev/null; eventually sh -c "podman logs $name | grep up""#,
    after: "podman rm -f -t 0 $name >/dev/null; podman network rm -f $name >/dev/null",
    cases: &[
        same(
            "podman has networks of the user's",
            "podman exec $name sh -c 'ls /sys/class/net; ip -4 -o addr show eth0 | wc -l; ip route | grep -c default'",
        ),
        // Pods of this Podman's forbid all devices where it makes cgroups without systemd.
        differs(
            "the containers of a pod share their network",
            "podman --runtime $program pod create --share-parent=false --name $name-pod --infra-image $image --infra-command '/bin/sleep 1000' >/dev/null; pod run --rm --pod $name-pod $image hostname; podman pod rm -f -t 0 $name-pod >/dev/null",
            "--share none",
            "refused: the first container's network stack is in its guest. Make the pod with `--share none`: then each has a network of its own",
        ),
        differs(
            "a container has a user namespace of its own (`--userns=auto`, `--uidmap`)",
            "pod run --rm --uidmap 0:100000:5000 --gidmap 0:100000:5000 $image true",
            "cannot be honoured in a virtual machine",
            "refused: root of the guest is not root of the host already, and files are served under the numbers that they have. Leave the option out",
        ),
        same(
            "containers of a pod that shares nothing have networks of their own",
            "podman --runtime $program pod create --share none --name $name-pod >/dev/null; pod run --rm --pod $name-pod $image ls /sys/class/net; podman pod rm -f -t 0 $name-pod >/dev/null",
        ),
        same(
            "podman sends signals, and what is killed gives 137",
            "podman kill -s USR1 $name >/dev/null; eventually sh -c \"podman logs $name | grep USR1\"; podman kill $name >/dev/null; podman wait $name; podman start $name >/dev/null; podman inspect --format '{{.State.Status}} {{.State.ExitCode}}' $name",
        ),
    ],
};

/// Volumes and read-only roots.
const STORAGE: Group = Group {
    name: "podman-disk",
    place: Place::Host,
    before: "podman_image",
    after: "podman volume rm -f $name >/dev/null",
    cases: &[
        same(
            "podman's volumes outlive containers and are filled from the image",
            "pod run --rm -v $name:/etc $image sh -c 'ls /etc; echo kept > /etc/kept'; pod run --rm -v $name:/v:ro $image sh -c 'cat /v/kept; touch /v/x'",
        ),
        same(
            "podman has read-only roots, tmpfs, users and limits",
            "pod run --rm --read-only --tmpfs /scratch:size=1m -u 7:8 --ulimit nofile=99:100 --cap-drop all --shm-size 2m $image sh -c 'touch /x; df -k /scratch | awk \"NR>1{print \\$2,\\$6}\"; stat -f -c \"%S %b\" /dev/shm; id -u; id -g; ulimit -n; grep CapBnd /proc/self/status'",
        ),
    ],
};
