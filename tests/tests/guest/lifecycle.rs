//! The OCI operations and what they report.

use serde_json::{Value, json};
use tests::{Bundle, Container, coracle, run};

use crate::{assert_nothing_left, eventually};

fn status(id: &str) -> String {
    let state: Value = serde_json::from_str(coracle(&["state", id]).text()).unwrap();
    state["status"].as_str().unwrap().to_owned()
}

#[test]
fn run_prints_what_the_container_says_on_another_kernel() {
    let bundle = Bundle::new(&["uname", "-r"]);

    let outcome = coracle(&["run", "--bundle", bundle.path().to_str().unwrap(), "t-uname"]);

    let host = run("uname", &["-r"], b"");
    assert!(!outcome.text().is_empty());
    assert_ne!(outcome.text(), host.text());
    assert_nothing_left();
}

#[test]
fn run_ends_with_the_exit_code_of_the_workload() {
    for (script, code) in [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -9 $$", 137)] {
        // PID 1 of a pid namespace ignores signals it sends itself, so a child gets it.
        let script = script.replace("kill -9 $$", "sh -c 'kill -9 $$'; exit $?");
        let bundle = Bundle::new(&["sh", "-c", &script]);

        let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-code"]);

        assert_eq!(outcome.code, code, "{script}: {outcome:?}");
    }
    assert_nothing_left();
}

#[test]
fn a_container_goes_from_created_over_running_to_stopped() {
    let container = Container::create("t-life", &["sh", "-c", "echo started; exit 3"]);
    let state: Value = serde_json::from_str(coracle(&["state", "t-life"]).text()).unwrap();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], "t-life");
    assert_eq!(state["pid"].to_string(), container.pid().trim());
    assert_eq!(container.output(), "");

    assert_eq!(coracle(&["start", "t-life"]).code, 0);

    eventually("the container's end", || (status("t-life") == "stopped").then_some(()));
    assert_eq!(container.output(), "started\n");
    assert_eq!(coracle(&["delete", "t-life"]).code, 0);
    assert_nothing_left();
}

#[test]
fn a_container_tells_what_its_start_spent_its_time_on() {
    let container = Container::create("t-phases", &["sleep", "1000"]);
    let created = coracle(&["logs", "--phases", "t-phases"]);
    assert!(created.text().contains("create the container"), "{created:?}");
    assert!(!created.text().contains("execute the program"), "{created:?}");

    assert_eq!(coracle(&["start", "t-phases"]).code, 0);

    let phases: Value =
        serde_json::from_str(coracle(&["logs", "--phases", "--json", "t-phases"]).text()).unwrap();
    let phases = phases.as_array().unwrap();
    let number = |phase: &Value, key: &str| phase[key].as_u64().unwrap();
    let ends = phases.iter().map(|phase| number(phase, "start_ns") + number(phase, "took_ns"));
    let starts = phases.iter().skip(1).map(|phase| number(phase, "start_ns"));
    assert!(ends.zip(starts).all(|(end, start)| end == start), "{phases:?}");
    assert_eq!(phases.last().unwrap()["name"], "execute the program");
    drop(container);
    assert_nothing_left();
}

#[test]
fn kill_reaches_the_workload_and_delete_refuses_while_it_runs() {
    let script = "trap 'echo got usr1' USR1; trap 'echo bye; exit 9' TERM; echo ready; \
                  while :; do sleep 0.1; done";
    let container = Container::running("t-kill", &["sh", "-c", script]);
    eventually("the traps", || container.output().contains("ready").then_some(()));

    let refused = coracle(&["delete", "t-kill"]);
    assert_eq!(coracle(&["kill", "t-kill", "USR1"]).code, 0);
    eventually("USR1", || container.output().contains("got usr1").then_some(()));
    assert_eq!(coracle(&["kill", "t-kill", "15"]).code, 0);
    eventually("the end", || (status("t-kill") == "stopped").then_some(()));

    assert_ne!(refused.code, 0);
    assert!(refused.stderr.contains("not stopped") || refused.stderr.contains("running"));
    assert!(container.output().ends_with("bye\n"));
    drop(container);
    assert_nothing_left();
}

#[test]
fn every_signal_that_can_be_caught_arrives_at_the_first_process() {
    // KILL and STOP cannot be caught, CHLD comes by itself, 32 and 33 are the C library's own.
    let others = [9, 17, 19, 32, 33];
    let signals: Vec<u32> = (1..=64).filter(|signal| !others.contains(signal)).collect();
    let trap = |signal: &u32| format!("trap 'echo got {signal}' {signal}; ");
    let traps: String = signals.iter().map(trap).collect();
    let script = format!("{traps} echo ready; while :; do sleep 0.05; done");
    let container = Container::running("t-signals", &["sh", "-c", &script]);
    eventually("the traps", || container.output().contains("ready").then_some(()));

    for signal in &signals {
        assert_eq!(coracle(&["kill", "t-signals", &signal.to_string()]).code, 0);
        let told = format!("got {signal}\n");
        eventually(&told, || container.output().contains(&told).then_some(()));
    }

    drop(container);
    assert_nothing_left();
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let container =
        Container::running("t-pause", &["sh", "-c", "while :; do echo tick; sleep 0.05; done"]);
    eventually("output", || (!container.output().is_empty()).then_some(()));

    assert_eq!(coracle(&["pause", "t-pause"]).code, 0);
    assert_eq!(status("t-pause"), "paused");
    std::thread::sleep(std::time::Duration::from_secs(1));
    let before = container.output().len();
    std::thread::sleep(std::time::Duration::from_secs(2));
    let after = container.output().len();
    assert_eq!(coracle(&["resume", "t-pause"]).code, 0);

    assert_eq!(before, after);
    assert_eq!(status("t-pause"), "running");
    eventually("more output", || (container.output().len() > after).then_some(()));
    drop(container);
    assert_nothing_left();
}

#[test]
fn list_ps_and_events_know_a_running_container() {
    let container = Container::running("t-list", &["sleep", "1000"]);

    let list = coracle(&["list"]);
    let ids = coracle(&["list", "-q"]);
    let processes = coracle(&["ps", "t-list"]);
    let pids: Vec<i64> =
        serde_json::from_str(coracle(&["ps", "--format", "json", "t-list"]).text()).unwrap();
    let stats: Value =
        serde_json::from_str(coracle(&["events", "--stats", "t-list"]).text()).unwrap();

    assert!(list.text().lines().nth(1).is_some_and(|line| line.contains("running")));
    assert_eq!(ids.text(), "t-list");
    assert!(processes.text().contains("sleep 1000"), "{processes:?}");
    assert!(std::path::Path::new(&format!("/proc/{}", pids[0])).exists());
    assert_eq!(stats["type"], "stats");
    assert!(stats["data"]["memory"]["usage"]["usage"].as_u64().is_some_and(|bytes| bytes > 0));
    drop(container);
    assert_nothing_left();
}

#[test]
fn limits_of_the_bundle_and_of_update_hold_inside() {
    let bundle = Bundle::new(&[
        "sh",
        "-c",
        "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/memory.max; ulimit -n; hostname",
    ]);
    bundle.edit(|config| {
        config["linux"]["resources"]["pids"] = json!({ "limit": 33 });
        config["linux"]["resources"]["memory"] = json!({ "limit": 67_108_864 });
        config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 77 }]);
        config["hostname"] = json!("inside");
    });
    let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-limits"]);
    assert_eq!(outcome.text(), "33\n67108864\n77\ninside");

    let container = Container::running("t-update", &["sleep", "1000"]);
    assert_eq!(coracle(&["update", "--pids-limit", "44", "t-update"]).code, 0);
    let inside = coracle(&["exec", "t-update", "cat", "/sys/fs/cgroup/pids.max"]);
    assert_eq!(inside.text(), "44");
    drop(container);
    assert_nothing_left();
}

fn inside(id: &str, script: &str) -> String {
    coracle(&["exec", id, "sh", "-c", script]).text().to_owned()
}

#[test]
fn update_gives_the_machine_processors_and_takes_them_back() {
    let bundle = Bundle::new(&["sleep", "1000"]);
    bundle.edit(|config| {
        config["linux"]["resources"]["cpu"] = json!({ "quota": 100_000, "period": 100_000 });
    });
    let container = Container::running_bundle("t-cpus", bundle);
    let update =
        |quota| coracle(&["update", "--cpu-period", "100000", "--cpu-quota", quota, "t-cpus"]);
    assert_eq!(inside("t-cpus", "nproc"), "1");

    let grown = update("200000");
    assert_eq!(grown.code, 0, "{grown:?}");
    // The guest's kernel tells its cgroups of it in its own time.
    eventually("the machine's growth", || (inside("t-cpus", "nproc") == "2").then_some(()));
    assert_eq!(inside("t-cpus", "cat /sys/fs/cgroup/cpu.max"), "200000 100000");
    let shrunk = update("50000");
    assert_eq!(shrunk.code, 0, "{shrunk:?}");
    eventually("the machine's shrinking", || (inside("t-cpus", "nproc") == "1").then_some(()));
    drop(container);
    assert_nothing_left();
}

#[test]
fn update_gives_the_machine_memory_and_takes_it_back() {
    let bundle = Bundle::new(&["sleep", "1000"]);
    bundle.edit(|config| {
        config["linux"]["resources"]["memory"] = json!({ "limit": 134_217_728 });
    });
    let container = Container::running_bundle("t-memory", bundle);
    let total_kib = || -> u64 {
        inside("t-memory", "grep MemTotal /proc/meminfo | tr -dc 0-9").parse().unwrap()
    };
    let before = total_kib();

    let grown = coracle(&["update", "--memory", "256m", "t-memory"]);
    assert_eq!(grown.code, 0, "{grown:?}");
    eventually("the machine's growth", || (total_kib() > before + (100 << 10)).then_some(()));
    let shrunk = coracle(&["update", "--memory", "128m", "t-memory"]);
    assert_eq!(shrunk.code, 0, "{shrunk:?}");
    eventually("the machine's shrinking", || (total_kib() < before + (10 << 10)).then_some(()));

    let refused = coracle(&["update", "--memory", "8192g", "t-memory"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("is more than the virtual machine can have"), "{refused:?}");
    drop(container);
    assert_nothing_left();
}

#[test]
fn user_capabilities_and_read_only_paths_are_as_the_bundle_says() {
    let script = "id -u; id -g; grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status; \
                  touch /x 2>&1; touch /proc/sys/kernel/x 2>&1; cat /proc/cpuinfo 2>&1 | wc -c; pwd";
    let bundle = Bundle::new(&["sh", "-c", script]);
    bundle.edit(|config| {
        config["root"]["readonly"] = json!(true);
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1001 });
        config["process"]["cwd"] = json!("/tmp");
        config["process"]["capabilities"] = json!({});
        config["process"]["noNewPrivileges"] = json!(true);
        config["linux"]["maskedPaths"] = json!(["/proc/cpuinfo"]);
    });

    let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-user"]);

    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(lines[..2], ["1000", "1001"]);
    assert_eq!(lines[2], "CapEff:\t0000000000000000");
    assert_eq!(lines[3], "NoNewPrivs:\t1");
    assert!(lines[4].contains("Read-only file system"), "{lines:?}");
    assert!(lines[5].contains("/proc/sys/kernel/x"), "{lines:?}");
    assert_eq!(lines[6..], ["0", "/tmp"]);
    assert_nothing_left();
}

#[test]
fn seccomp_of_the_bundle_is_in_force() {
    let bundle = Bundle::new(&["sh", "-c", "mkdir /tmp/d; echo $?"]);
    bundle.edit(|config| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 121 }],
        });
    });

    let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-seccomp"]);

    assert!(outcome.stderr.contains("Remote I/O error"), "{outcome:?}");
    assert_eq!(outcome.text(), "1");
    assert_nothing_left();
}

#[test]
fn hooks_run_at_their_points_with_the_state_on_stdin() {
    let bundle = Bundle::new(&["true"]);
    let log = bundle.path().join("hooks");
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat | tr -d '\\n ') >> {}", log.display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
    };
    bundle.edit(|config| {
        let names = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
        for name in names {
            config["hooks"][name] = hook(name);
        }
    });

    let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-hooks"]);

    assert_eq!(outcome.code, 0, "{outcome:?}");
    let log = std::fs::read_to_string(log).unwrap();
    let order: Vec<&str> = log.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(order, ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]);
    assert!(log.lines().all(|line| line.contains(r#""id":"t-hooks""#)), "{log}");
    assert_nothing_left();
}

#[test]
fn a_container_is_served_while_a_poststart_hook_waits_for_it_though_one_failed() {
    let bundle = Bundle::new(&["sh", "-c", "until [ -e /go ]; do sleep 0.1; done; exit 3"]);
    let script = "exec coracle exec t-waits touch /go";
    let path = std::env::var("PATH").unwrap();
    bundle.edit(|config| {
        config["hooks"]["poststart"] = json!([{ "path": "/bin/false" }, {
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": [format!("PATH={path}")],
            "timeout": 60,
        }]);
    });

    let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-waits"]);

    assert_eq!(outcome.code, 3, "{outcome:?}");
    assert_nothing_left();
}

#[test]
fn every_virtual_cpu_the_settings_ask_for_is_online() {
    let bundle = Bundle::new(&["sh", "-c", "grep -c ^processor /proc/cpuinfo"]);
    bundle.edit(|config| config["annotations"] = json!({ "io.coracle.vcpus": "2" }));

    let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-smp"]);

    assert_eq!(outcome.text(), "2");
    assert_nothing_left();
}
