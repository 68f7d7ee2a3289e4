//! Podman of a user who is not root, and may open /dev/kvm.

use tests::{Outcome, shell};

use crate::{assert_nothing_left, within};

/// How long the first call may take, in seconds: it makes the user's storage.
const LIMIT_S: u32 = 300;

/// Runs a script of the user's, who is made at the first call; `$image` is busybox in the user's storage,
/// and `pod` Podman with Coracle.
fn as_user(script: &str) -> Outcome {
    within(
        LIMIT_S,
        &format!(
            r#"
id boatman >/dev/null 2>&1 || {{
  useradd --create-home boatman
  grep -qs boatman /etc/subuid || echo boatman:200000:65536 | tee -a /etc/subuid >> /etc/subgid
}}
runtime=/run/user/$(id -u boatman)
install -d -m 700 -o boatman $runtime
[ -e /run/lab/busybox.tar ] || docker save -o /run/lab/busybox.tar busybox
chmod 644 /run/lab/busybox.tar
cd /; exec runuser -u boatman -- env -i HOME=/home/boatman USER=boatman XDG_RUNTIME_DIR=$runtime \
  PATH=/usr/local/bin:/usr/bin:/usr/sbin bash -c '
    pod() {{ podman --storage-driver vfs --cgroup-manager cgroupfs --runtime /usr/local/bin/coracle "$@"; }}
    image=$(pod images -q | head -n 1)
    [ -n "$image" ] || image=$(pod load -q -i /run/lab/busybox.tar | sed "s/.*: //")
{}'"#,
            script
        ),
    )
}

#[test]
#[ignore = "needs the lab: Podman and KVM"]
fn podman_without_root_runs_containers_on_coracle() {
    let first = as_user(
        r#"
    mkdir -p ~/shared; echo from home > ~/shared/in
    echo input | pod run -i --rm -v ~/shared:/shared $image sh -c "cat; id -u; cat /shared/in; echo out > /shared/out; chown 5 /shared/out; exit 7"
    echo $?; cat ~/shared/out; stat -c %u ~/shared/in; uname -r"#,
    );
    let lines: Vec<_> = first.stdout.lines().collect();

    assert_eq!(lines[..6], ["input", "0", "from home", "7", "out", &user_id()], "{first:?}");
    assert_nothing_left();
}

/// Ports by slirp4netns, and by Podman's own forwarder, which connects to the address from within the
/// network namespace.
#[test]
#[ignore = "needs the lab: Podman and KVM"]
fn podman_without_root_has_detached_containers_with_a_port() {
    let outcome = as_user(
        r#"
    pod run -d --name boat -m 64m -p 18300:80 --network slirp4netns:port_handler=slirp4netns $image sh -c "mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; trap \"exit 4\" TERM; while :; do sleep 0.2; done" >/dev/null
    pod exec boat cat /sys/fs/cgroup/memory.max
    for i in $(seq 50); do curl -sf http://127.0.0.1:18300/ && break; sleep 0.5; done
    pod stop -t 60 boat >/dev/null; pod inspect --format "{{.State.ExitCode}}" boat; pod rm boat >/dev/null
    pod run -d --name raft -p 18301:80 $image sh -c "mkdir /www; echo forwarded > /www/index.html; httpd -f -p 80 -h /www" >/dev/null
    for i in $(seq 50); do curl -sf http://127.0.0.1:18301/ && break; sleep 0.5; done; pod rm -f -t 0 raft >/dev/null
    ls $XDG_RUNTIME_DIR/coracle | wc -l"#,
    );

    assert_eq!(outcome.stdout, "67108864\nserved\n4\nforwarded\n0\n", "{outcome:?}");
    assert_nothing_left();
}

fn user_id() -> String {
    shell("id -u boatman").text().to_owned()
}
