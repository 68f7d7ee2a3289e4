//! Processes: how they start, what they are given, how they are reached and how they end.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "Processes", groups: GROUPS };

const GROUPS: &[Group] = &[
    Group {
        name: "process",
        before: "",
        place: Place::Container(
            "-h boat -e COLOUR=blue -w /tmp --ulimit core=0 --ulimit nofile=2048:4096 -i",
        ),
        after: "",
        cases: &[
            same("the environment is the image's and the user's", "env | sort"),
            same("the working directory is -w", "pwd"),
            same("the program is the first process", "echo $$; tr '\\0' ' ' < /proc/1/comm"),
            same(
                "the user is root in no other group",
                "id; grep -E '^(Uid|Gid|Groups)' /proc/self/status",
            ),
            same("the umask is 022", "umask"),
            same(
                "no signal is blocked or ignored",
                "exec grep -E '^(SigBlk|SigIgn)' /proc/self/status",
            ),
            same(
                "no descriptors but stdio are open",
                "ls /proc/$$/fd | sort -n | head -n 3; ls -l /proc/1/fd | grep -c -v -E 'pipe|/dev/null|total'",
            ),
            same(
                "the limits are Docker's and --ulimit's",
                "grep -E 'core|open files|stack|address space|locked' /proc/self/limits",
            ),
            same("the score for running out of memory is 0", "cat /proc/self/oom_score_adj"),
            same("the capabilities are Docker's", "grep ^Cap /proc/self/status"),
            same(
                "seccomp and no-new-privileges are Docker's",
                "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status",
            ),
            same(
                "the program leads a session",
                "ps -o pid,ppid,pgid,sid 2>/dev/null | head -n 2; cut -d' ' -f 5-6 /proc/1/stat",
            ),
            same("the host name is -h", "hostname; uname -n; cat /etc/hostname"),
            same("the machine's name is the host's", "uname -s -m"),
            differs(
                "`uname -r` says the host's kernel",
                "test \"$(uname -r)\" = \"$(cat /proc/sys/kernel/osrelease)\" && case $(uname -v) in *) grep -q kvm-clock /sys/devices/system/clocksource/clocksource0/* && echo guest; esac",
                "guest",
                "the guest's own kernel: that is what Coracle is for",
            ),
            same(
                "orphans become children of the first process",
                "sh -c '(sleep 0.5; grep PPid /proc/self/status > /orphan) &'; until [ -s /orphan ]; do sleep 0.1; done; cat /orphan",
            ),
            same(
                "background processes and pipes work",
                "seq 1 1000 | grep 7 | wc -l; (exit 3) & wait $!; echo $?",
            ),
            same(
                "signals between processes work",
                "sh -c 'trap \"echo caught; exit 9\" USR1; while :; do sleep 0.1; done' & sleep 1; kill -USR1 $!; wait $!; echo $?",
            ),
            same(
                "a real-time signal is delivered",
                "sh -c 'trap \"echo real; exit 4\" 40; while :; do sleep 0.1; done' & sleep 1; kill -40 $!; wait $!; echo $?",
            ),
            same("kernel threads are not seen", "ps -o comm | grep -c kthread"),
        ],
    },
    Group {
        name: "life",
        place: Place::Host,
        before: r#"
run -d --name $name --health-cmd 'test -e /healthy' --health-interval 2s --health-retries 1 --health-timeout 60s busybox sh -c '
  for signal in HUP USR1 USR2 QUIT WINCH ALRM 37; do trap "echo got $signal" $signal; done
  trap "echo bye; exit 5" TERM; touch /healthy; echo up; while :; do sleep 0.2; done' >/dev/null
logged $name up"#,
        after: "docker rm -f $name >/dev/null",
        cases: &[
            same(
                "signals arrive at the first process",
                r#"
for signal in HUP USR1 USR2 QUIT WINCH ALRM 37; do docker kill -s $signal $name >/dev/null; logged $name "got $signal"; done; docker logs $name"#,
            ),
            same(
                "exec takes user, folder, environment and exit code",
                "docker exec -u 65534:7 -w /tmp -e A=b $name sh -c 'id -u; id -g; pwd; echo $A; exit 7'",
            ),
            same(
                "exec with a terminal has one",
                "terminal \"docker exec -it $name sh -c 'tty | tr 0-9 N; exit 3'\"",
            ),
            same(
                "exec --privileged has every capability",
                "docker exec --privileged $name grep CapEff /proc/self/status; docker exec $name grep CapEff /proc/self/status",
            ),
            same(
                "exec of what is missing gives 127 and of no program 126",
                "docker exec $name nosuchprogram; echo $?; docker exec $name /etc/passwd; echo $?; docker exec -w /nosuch $name pwd; echo $?",
            ),
            same(
                "exec of what is killed gives 128 and the signal",
                "docker exec $name sh -c 'kill -9 $$'",
            ),
            same(
                "exec -d runs on its own",
                "docker exec -d $name touch /made; eventually docker exec $name test -e /made && echo made",
            ),
            same(
                "exec output and input arrive whole",
                "docker exec $name sh -c 'seq 1 200000; echo end >&2' | md5sum; head -c 3000000 /dev/zero | docker exec -i $name md5sum",
            ),
            same(
                "100 MB of output arrive without loss",
                "docker exec $name head -c 100000000 /dev/zero | md5sum",
            ),
            same(
                "pause stops everything and unpause goes on",
                "docker pause $name; field $name '{{.State.Status}}'; docker exec $name true; echo $?; docker unpause $name; field $name '{{.State.Status}}'",
            ),
            same(
                "health checks are made",
                r#"
eventually sh -c "docker inspect --format '{{.State.Health.Status}}' $name | grep -q '^healthy'"; docker exec $name rm /healthy
eventually sh -c "docker inspect --format '{{.State.Health.Status}}' $name | grep -q unhealthy"; field $name '{{.State.Health.Status}}'"#,
            ),
            same(
                "docker cp works both ways",
                r#"
mkdir -p $folder/in/sub; echo payload > $folder/in/sub/f; chmod 600 $folder/in/sub/f
docker cp -q $folder/in $name:/copied; docker exec $name sh -c 'cat /copied/sub/f; stat -c %a /copied/sub/f; echo changed > /copied/sub/f'
docker cp -q $name:/copied/sub/f - | tar -xO; docker cp -q $name:/nosuch -"#,
            ),
            differs(
                "`docker top` lists the processes",
                "docker top $name -o pid,comm | awk 'NR==2{print $2}'",
                "coracle",
                "the process that holds the virtual machine: `docker top` asks the host's `ps`, which does not know the guest's; `docker exec NAME ps` does",
            ),
            same(
                "logs -f, --tail and stop",
                "docker logs -f $name > $folder/log & sleep 1; docker stop $name; wait $!; tail -n 2 $folder/log; docker logs --tail 1 $name; docker wait $name; field $name '{{.State.ExitCode}} {{.State.Status}}'",
            ),
            same(
                "a stopped container can be started and killed",
                "docker start $name; sleep 1; field $name '{{.State.Status}}'; docker kill $name; docker wait $name; docker top $name; field $name '{{.State.ExitCode}} {{.State.OOMKilled}}'",
            ),
        ],
    },
    Group {
        name: "start",
        place: Place::Host,
        before: "",
        after: "docker rm -f $name >/dev/null 2>&1",
        cases: &[
            same(
                "input arrives whole, outputs stay apart, the exit code is the program's",
                "seq 1 400000 | gzip -n | tee >(md5sum >&2) | run -i --rm busybox sh -c 'md5sum; echo error >&2; exit 255'",
            ),
            same("a missing program gives 127", "run --rm --name $name busybox nosuchprogram"),
            same(
                "a program that is not executable gives 126",
                "run --rm --name $name busybox /etc/passwd",
            ),
            same(
                "a restart policy starts it again",
                r#"
run -d --restart on-failure:1 --name $name busybox sh -c 'echo turn; exit 3' >/dev/null
eventually sh -c "docker inspect --format '{{.RestartCount}} {{.State.Status}}' $name | grep -q '1 exited'"
docker logs $name; field $name '{{.State.ExitCode}} {{.RestartCount}}'; docker rm $name"#,
            ),
            same(
                "--init reaps orphans and passes --stop-signal on",
                r#"
run -d --init --stop-signal USR1 --name $name busybox sh -c '(sleep 0.3 & exec sleep 0.1) & trap "echo bye; exit 6" USR1; sleep 2; ps -o stat | grep -c Z; cat /proc/1/comm; echo up; while :; do sleep 0.2; done' >/dev/null
logged $name up; docker stop $name; docker logs $name; field $name '{{.State.ExitCode}}'; docker rm $name"#,
            ),
            same(
                "--restart always starts it again, and events tell of it",
                r#"
since=$(date +%s.%N); run -d --restart always --name $name busybox sh -c 'echo turn; [ -e /turn ] || { touch /turn; exit 0; }; exec sleep 1000' >/dev/null
eventually sh -c "docker logs $name | grep -c turn | grep -x 2"; docker kill -s TERM $name; docker exec $name echo 'a first process without handlers ignores signals'
docker stop -t 1 $name; field $name '{{.State.ExitCode}} {{.RestartCount}} {{.State.Status}}'; docker rm $name
docker events --since $since --until $(($(date +%s)+1)) --filter container=$name --format '{{.Type}} {{.Action}} {{.Actor.Attributes.exitCode}} {{.Actor.Attributes.signal}}'"#,
            ),
            same(
                "--restart unless-stopped starts it again unless it is stopped",
                r#"
run -d --restart unless-stopped --name $name busybox sh -c 'echo turn; [ -e /turn ] || { touch /turn; exit 4; }; exec sleep 1000' >/dev/null
eventually sh -c "docker logs $name | grep -c turn | grep -x 2"; docker stop -t 0 $name; sleep 2; field $name '{{.State.ExitCode}} {{.RestartCount}} {{.State.Status}}'; docker rm $name"#,
            ),
        ],
    },
    Group {
        name: "tty",
        place: Place::Host,
        before: r#"run -dit --name $name busybox sh -c 'trap "stty size; echo resized" WINCH; echo up; while read line; do echo "heard $line"; done; while :; do read line && echo "heard $line"; sleep 0.2; done' >/dev/null; logged $name up"#,
        after: "docker rm -f $name >/dev/null",
        cases: &[
            same(
                "run with a terminal has one",
                "terminal \"docker run --rm -it --runtime $runtime --name $name-it busybox sh -c 'tty; exit 3'\"",
            ),
            same(
                "a terminal's size changes while it runs",
                r#"
size() { curl -s --unix-socket /var/run/docker.sock -X POST "http://docker/containers/$name/resize?h=$1&w=$2"; }
size 33 77; sleep 1; size 44 99; docker exec $name stty -F /proc/1/fd/0 size"#,
            ),
            same(
                "attach hears what is typed, and detach keys leave it running",
                r#"
(sleep 4; echo one; sleep 4; printf '\001') | timeout 100 script -qec "docker attach --detach-keys ctrl-a $name" /dev/null | tr -d '\r' | grep -o 'heard one'; field $name '{{.State.Status}}'"#,
            ),
            same(
                "detach keys leave what exec has started",
                // Into a file, as each command of a pipeline is another sh for a moment.
                r#"
(sleep 4; echo 'echo typed >/typed'; sleep 4; printf '\001'; sleep 4) | timeout 100 script -qec "docker exec -it --detach-keys ctrl-a $name sh -c 'cat /proc/\$\$/comm; exec sh'" /dev/null | tr -d '\r' | grep -x sh; docker exec $name sh -c 'cat /typed; ps -o comm >/list; grep -c sh /list'"#,
            ),
        ],
    },
];
