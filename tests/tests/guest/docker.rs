//! `docker … --runtime coracle`, from an image imported locally.

use tests::{docker, run, shell};

use crate::{assert_nothing_left, eventually};

fn docker_run(args: &[&str]) -> tests::Outcome {
    docker(&[&["run", "--rm", "--runtime", "coracle"], args].concat())
}

/// A detached container, removed by force at the end of the test.
struct Detached(String);

impl Detached {
    fn start(args: &[&str]) -> Self {
        let outcome = docker(&[&["run", "-d", "--runtime", "coracle"], args].concat());
        Detached(outcome.text().to_owned())
    }

    fn logs(&self) -> String {
        docker(&["logs", &self.0]).stdout
    }

    fn inspect(&self, format: &str) -> String {
        docker(&["inspect", "--format", format, &self.0]).text().to_owned()
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        docker(&["rm", "-f", &self.0]);
    }
}

#[test]
fn run_prints_the_guest_kernels_version() {
    let outcome = docker_run(&["busybox", "uname", "-r"]);

    assert_ne!(outcome.text(), run("uname", &["-r"], b"").text());
    assert_nothing_left();
}

#[test]
fn exit_codes_are_the_workloads_and_dockers() {
    assert_eq!(docker_run(&["busybox", "sh", "-c", "exit 17"]).code, 17);
    assert_eq!(docker_run(&["busybox", "nosuchprogram"]).code, 127);
    assert_eq!(docker_run(&["busybox", "/etc/passwd"]).code, 126);
    assert_nothing_left();
}

#[test]
fn standard_input_arrives_whole() {
    let script = "head -c 10000000 /dev/urandom > /tmp/random; sha256sum < /tmp/random; \
                  docker run -i --rm --runtime coracle busybox sha256sum < /tmp/random";

    let outcome = shell(script);

    let sums: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(sums.len(), 2);
    assert_eq!(sums[0], sums[1]);
    assert_nothing_left();
}

#[test]
fn a_terminal_works() {
    let command = "docker run --rm -t --runtime coracle busybox tty";

    let outcome = run("script", &["-qec", command, "/dev/null"], b"");

    assert!(outcome.stdout.contains("/dev/pts/0"), "{outcome:?}");
    assert_nothing_left();
}

#[test]
fn environment_user_hostname_and_folder_are_dockers() {
    let outcome = docker_run(&[
        "-e",
        "COLOUR=blue",
        "-u",
        "65534",
        "-h",
        "boat",
        "-w",
        "/tmp",
        "busybox",
        "sh",
        "-c",
        "echo $COLOUR; id -u; hostname; pwd",
    ]);

    assert_eq!(outcome.text(), "blue\n65534\nboat\n/tmp");
    assert_nothing_left();
}

#[test]
fn exec_logs_stop_and_rm_work_on_a_running_container() {
    let container = Detached::start(&[
        "busybox",
        "sh",
        "-c",
        "trap 'echo stopped; exit 4' TERM; echo up; while :; do sleep 0.1; done",
    ]);
    eventually("the first line of the log", || container.logs().contains("up").then_some(()));

    let exec = docker(&["exec", "-e", "X=1", &container.0, "sh", "-c", "echo in $X; exit 6"]);
    let top = docker(&["top", &container.0]);
    let stop = docker(&["stop", &container.0]);

    assert_eq!((exec.code, exec.stdout.as_str()), (6, "in 1\n"), "{exec:?}");
    assert_eq!(top.code, 0, "{top:?}");
    assert_eq!(stop.code, 0, "{stop:?}");
    assert!(container.logs().contains("stopped"));
    assert_eq!(container.inspect("{{.State.ExitCode}}"), "4");
    drop(container);
    assert_nothing_left();
}

#[test]
fn kill_ends_the_workload_with_128_plus_the_signal() {
    let container = Detached::start(&["busybox", "sleep", "1000"]);

    assert_eq!(docker(&["kill", &container.0]).code, 0);

    assert_eq!(docker(&["wait", &container.0]).text(), "137");
    drop(container);
    assert_nothing_left();
}

#[test]
fn volumes_are_shared_both_ways() {
    let outcome = shell(
        "mkdir -p /tmp/volume && echo from host > /tmp/volume/a && docker volume create named >/dev/null && \
         docker run --rm --runtime coracle -v /tmp/volume:/bind -v named:/named --tmpfs /scratch \
           -v /tmp/volume/a:/file:ro busybox sh -c \
           'cat /bind/a /file; echo from guest > /bind/b; echo kept > /named/c; echo > /file; \
            grep -c \" /scratch tmpfs\" /proc/mounts' ; \
         cat /tmp/volume/b; docker run --rm -v named:/named busybox cat /named/c; \
         docker volume rm named >/dev/null; rm -r /tmp/volume",
    );

    assert_eq!(outcome.stdout, "from host\nfrom host\n1\nfrom guest\nkept\n", "{outcome:?}");
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    assert_nothing_left();
}

#[test]
fn a_read_only_root_refuses_writes() {
    let outcome = docker_run(&["--read-only", "busybox", "touch", "/x"]);

    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    assert_nothing_left();
}

#[test]
fn the_default_bridge_and_published_ports_work() {
    let server = Detached::start(&[
        "-p",
        "18080:80",
        "busybox",
        "sh",
        "-c",
        "mkdir -p /www && echo served > /www/index.html && httpd -f -p 80 -h /www",
    ]);
    let address = server.inspect("{{.NetworkSettings.IPAddress}}");

    let published = eventually("an answer on the published port", || {
        let outcome = run("busybox", &["wget", "-q", "-O-", "http://127.0.0.1:18080/"], b"");
        (outcome.code == 0).then_some(outcome.stdout)
    });
    let between = docker_run(&["busybox", "wget", "-q", "-O-", &format!("http://{address}/")]);
    let outward = docker(&["exec", &server.0, "ping", "-c", "1", "-W", "10", "172.17.0.1"]);

    assert_eq!(published, "served\n");
    assert_eq!(between.text(), "served");
    assert_eq!(outward.code, 0, "{outward:?}");
    drop(server);
    assert_nothing_left();
}

#[test]
fn twenty_containers_started_in_parallel_all_answer() {
    let script = "for i in $(seq 20); do \
                    docker run --rm --runtime coracle busybox echo answer-$i & \
                  done; wait";

    let outcome = shell(script);

    let answers = outcome.stdout.lines().filter(|line| line.starts_with("answer-")).count();
    assert_eq!(answers, 20, "{outcome:?}");
    assert_nothing_left();
}
