//! What is killed or gone at the wrong moment: engines end with the right state, everything can be
//! removed, and nothing is left.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use tests::{Bundle, Container, coracle, docker, shell};

use crate::{assert_nothing_left, eventually};

/// A detached container of Docker's, removed by force, which has to work whatever was done to it.
struct Victim(String);

impl Victim {
    fn start(args: &[&str]) -> Self {
        Victim(docker(&[&["run", "-d", "--runtime", "coracle"], args].concat()).text().to_owned())
    }

    fn inspect(&self, format: &str) -> String {
        docker(&["inspect", "--format", format, &self.0]).text().to_owned()
    }

    fn pid(&self) -> String {
        self.inspect("{{.State.Pid}}")
    }

    fn wait_for(&self, status: &str) {
        eventually(status, || (self.inspect("{{.State.Status}}") == status).then_some(()));
    }

    fn remove(self) {
        let removed = docker(&["rm", "-f", &self.0]);
        assert_eq!(removed.code, 0, "{removed:?}");
        assert_eq!(docker(&["inspect", &self.0]).code, 1);
    }
}

#[test]
fn a_killed_sandbox_process_is_a_killed_container() {
    let victim = Victim::start(&["busybox", "sleep", "1000"]);

    shell(&format!("kill -9 {}", victim.pid()));
    victim.wait_for("exited");

    assert_eq!(victim.inspect("{{.State.ExitCode}}"), "137");
    victim.remove();
    assert_nothing_left();
}

#[test]
fn a_killed_sandbox_process_leaves_a_namespace_of_the_engine_s_as_it_was() {
    // The other end is the first one of the kernel's list, and not by its name.
    shell("ip netns add faults; ip -n faults link add eth0 type veth peer name eth1");
    shell("ip -n faults addr add 10.99.0.2/24 dev eth0; ip -n faults link set eth0 up");
    let bundle = Bundle::new(&["sleep", "1000"]);
    bundle.edit(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(serde_json::json!({ "type": "network", "path": "/run/netns/faults" }));
    });
    let container = Container::running_bundle("coracle-test-netns", bundle);
    let joined = shell("ip netns exec faults tc qdisc show dev eth0 ingress");

    shell(&format!("kill -9 {}", container.pid()));
    drop(container);

    let parted = shell("ip netns exec faults tc qdisc show dev eth0 ingress; ip netns del faults");
    assert!(joined.stdout.contains("ingress"), "{joined:?}");
    assert_eq!(parted.stdout, "", "{parted:?}");
    assert_nothing_left();
}

#[test]
fn a_container_whose_bundle_is_gone_is_killed_and_deleted() {
    let bundle = Bundle::new(&["sleep", "1000"]);
    let path = bundle.path().to_owned();
    let container = Container::running_bundle("coracle-test-bundle", bundle);

    fs::rename(&path, path.with_extension("gone")).expect("the bundle can be moved away");
    let state = coracle(&["state", "coracle-test-bundle"]);
    let killed = coracle(&["kill", "coracle-test-bundle", "KILL"]);
    let deleted = coracle(&["delete", "--force", "coracle-test-bundle"]);
    fs::rename(path.with_extension("gone"), &path).expect("and back");
    drop(container);

    assert!(state.text().contains("\"running\""), "{state:?}");
    assert_eq!((killed.code, deleted.code), (0, 0), "{killed:?} {deleted:?}");
    assert_nothing_left();
}

#[test]
fn a_killed_shim_takes_the_container_with_it() {
    let victim = Victim::start(&["busybox", "sleep", "1000"]);
    let shim = shell(&format!("awk '/^PPid/{{print $2}}' /proc/{}/status", victim.pid()));

    shell(&format!("kill -9 {}", shim.text()));
    victim.wait_for("exited");

    victim.remove();
    assert_nothing_left();
}

/// Kills Docker's daemon, and starts another one as the lab has started the first, but such that it takes
/// over what runs (live-restore is about a daemon's start, and its end that never comes here). All of its
/// output goes to the log: a pipe of this test's would never end.
fn kill_dockerd_and_start_another_one() {
    shell(
        "pid=$(cat /run/docker.pid); kill -9 $pid; \
         while grep -qs '^State:.[^ZX]' /proc/$pid/status; do sleep 0.1; done; \
         setsid dockerd --live-restore --config-file /run/lab/daemon.json \
           --containerd /run/containerd/containerd.sock \
           < /dev/null >> /run/lab/dockerd.log 2>&1 &",
    );
    eventually("the new daemon answers", || (docker(&["version"]).code == 0).then_some(()));
}

#[test]
fn a_container_outlives_its_killed_dockerd_and_is_the_next_one_s() {
    let ending = "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.2; done";
    let victim = Victim::start(&["busybox", "sh", "-c", ending]);
    let pid = victim.pid();

    kill_dockerd_and_start_another_one();
    let restored = (victim.inspect("{{.State.Status}}"), victim.pid());
    let exec = docker(&["exec", &victim.0, "sh", "-c", "echo inside; exit 3"]);
    let stopped = docker(&["stop", &victim.0]);

    assert_eq!(restored, ("running".into(), pid));
    assert_eq!((exec.code, exec.stdout.trim()), (3, "inside"), "{exec:?}");
    assert_eq!(stopped.code, 0, "{stopped:?}");
    assert_eq!(victim.inspect("{{.State.ExitCode}}"), "9");
    assert_eq!(docker(&["logs", &victim.0]).text(), "up\nbye");
    victim.remove();
    assert_nothing_left();
}

#[test]
fn a_container_that_ends_without_a_dockerd_has_its_exit_code_in_the_next_one() {
    let victim = Victim::start(&["busybox", "sh", "-c", "sleep 3; exit 5"]);

    kill_dockerd_and_start_another_one();
    victim.wait_for("exited");

    assert_eq!(victim.inspect("{{.State.ExitCode}}"), "5");
    victim.remove();
    assert_nothing_left();
}

#[test]
fn a_create_that_is_killed_on_its_way_leaves_nothing() {
    for delay_ms in [20, 100, 300, 400, 1500] {
        let bundle = Bundle::new(&["sleep", "1000"]);
        let mut create = Command::new("coracle")
            .args(["create", "--bundle"])
            .arg(bundle.path())
            .arg("coracle-test-killed")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("coracle is installed");

        sleep(Duration::from_millis(delay_ms));
        // It may be done already.
        let _ = create.kill();
        create.wait().expect("a child can be waited for");

        let deleted = coracle(&["delete", "--force", "coracle-test-killed"]);
        assert_eq!(deleted.code, 0, "after {delay_ms} ms: {deleted:?}");
        assert_nothing_left();
    }
}

#[test]
fn a_volume_whose_folder_is_removed_is_empty_and_hurts_nobody() {
    shell("mkdir -p /tmp/faults/volume; echo x > /tmp/faults/volume/file");
    let victim = Victim::start(&["-v", "/tmp/faults/volume:/volume", "busybox", "sleep", "1000"]);
    assert_eq!(docker(&["exec", &victim.0, "cat", "/volume/file"]).text(), "x");

    fs::remove_dir_all("/tmp/faults").expect("the folder is there");
    let listing = docker(&[
        "exec",
        &victim.0,
        "sh",
        "-c",
        "ls /volume | wc -l; echo y > /volume/new; echo $?",
    ]);

    assert_eq!(listing.text().lines().next(), Some("0"), "{listing:?}");
    assert_eq!(docker(&["exec", &victim.0, "echo", "alive"]).text(), "alive");
    victim.remove();
    assert_nothing_left();
}

#[test]
fn a_volume_on_a_full_disk_says_so_and_hurts_nobody() {
    shell("mkdir -p /tmp/faults && mount -t tmpfs -o size=1m full /tmp/faults");
    let victim = Victim::start(&["-v", "/tmp/faults:/volume", "busybox", "sleep", "1000"]);

    let full = docker(&["exec", &victim.0, "dd", "if=/dev/zero", "of=/volume/file", "bs=64k"]);
    let freed = docker(&[
        "exec",
        &victim.0,
        "sh",
        "-c",
        "stat -c %s /volume/file; rm /volume/file; echo x > /volume/new; cat /volume/new",
    ]);
    victim.remove();
    shell("umount /tmp/faults && rmdir /tmp/faults");

    assert_eq!(full.code, 1, "{full:?}");
    assert!(full.stderr.contains("No space left on device"), "{full:?}");
    assert_eq!(freed.text(), "1048576\nx");
    assert_nothing_left();
}
