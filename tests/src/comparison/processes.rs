//! Processes: how they start, what they are given, how they are reached and how they end.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "Processes", groups: GROUPS };

const GROUPS: &[Group] = &[Group {
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
}];
