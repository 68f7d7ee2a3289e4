//! Docker in Coracle.

use tests::shell;

use crate::{System, assert_nothing_left, within};

/// The lab's programs, where they are in the lab; busybox's image has none of these folders but `/bin`.
const PROGRAMS: &str = "-v /usr:/usr:ro -v /usr/bin:/bin:ro -v /usr/sbin:/sbin:ro -v /usr/lib:/lib:ro \
                        -v /usr/lib64:/lib64:ro -v /etc/alternatives:/etc/alternatives:ro";

/// What images with Docker do at their start: a cgroup that has processes cannot be divided. containerd is
/// started first, as dockerd waits for its own no longer than a slow machine takes.
const START: &str = r#"
export PATH=/usr/sbin:/usr/bin
mkdir -p /sys/fs/cgroup/init
for pid in $(cat /sys/fs/cgroup/cgroup.procs); do echo $pid > /sys/fs/cgroup/init/cgroup.procs; done 2>/dev/null
sed -e "s/ / +/g" -e "s/^/+/" /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
containerd > /tmp/containerd.log 2>&1 &
until [ -S /run/containerd/containerd.sock ]; do sleep 0.2; done
exec dockerd --host unix:///run/docker.sock --containerd /run/containerd/containerd.sock --ip6tables=false"#;

/// How long the inner daemon may take to answer, and then its container, in seconds.
const LIMIT_S: u32 = 600;

#[test]
#[ignore = "needs the lab: Docker and KVM"]
fn docker_runs_a_container_inside_a_container_which_reaches_the_network() {
    shell(&format!("cat > /run/lab/start.sh <<'END'\n{START}\nEND"));
    let system = System::start(
        "outer",
        &format!(
            "--tmpfs /var/lib/docker --tmpfs /run --tmpfs /tmp:exec {PROGRAMS} \
             -v /run/lab/start.sh:/start.sh:ro busybox sh /start.sh"
        ),
    );

    let inner = within(
        LIMIT_S,
        "inner='docker exec -i outer /usr/bin/docker --host unix:///run/docker.sock'; \
         until docker logs outer 2>&1 | grep -q 'API listen'; do sleep 1; done; \
         docker save busybox | $inner load -q >&2; \
         $inner run --rm busybox sh -c \
           'echo hello; ping -c 1 -W 20 172.17.0.1 | grep -c \"1 packets received\"; \
            awk \"\\$2 == \\\"/\\\" {print \\$3}\" /proc/mounts; cat /sys/class/net/eth0/operstate'",
    );

    assert_eq!(inner.stdout, "hello\n1\noverlay\nup\n", "{inner:?}");
    drop(system);
    assert_nothing_left();
}
