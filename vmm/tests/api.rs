//! The control socket of `coracle-vmm`, from a machine that waits to its exit code.

mod payload;
#[path = "payload/program.rs"]
mod program;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use arch::{Arch, Host};
use nix::fcntl::{FcntlArg, fcntl};
use payload::{END, HANG, Payload, print, print_for_ever};
use program::end_code;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Generous, because this machine may be busy and its KVM emulated.
const PATIENCE: Duration = Duration::from_secs(60);

struct Program {
    /// There until somebody waits for it.
    child: Option<Child>,
    folder: TempDir,
    _payload: Payload,
}

impl Program {
    fn start(code: &[Vec<u8>], arguments: &[&str]) -> Self {
        let payload = Payload::of(code);
        let folder = TempDir::new().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
            .args(["--memory=32", "--serial", "--kernel"])
            .arg(payload.config().boot.kernel)
            .arg("--api-socket")
            .arg(folder.path().join("api"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Program { child: Some(child), folder, _payload: payload }
    }

    fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// The process that serves clients.
    fn server(&self) -> u32 {
        let process = self.id();
        let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
        children.unwrap().trim().parse().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    fn connect(&self) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(self.socket()) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::yield_now();
        }
    }

    /// Status and body of the answer.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = self.connect();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: vm\r\nContent-Length: {length}\r\n");
        stream.write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, "");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    fn become_state(&self, state: &str) -> u16 {
        self.ask("PUT", "/v1/vm/state", &json!({ "state": state }).to_string()).0
    }

    fn writes(&self) -> u64 {
        self.get("/v1/metrics")["exits"]["writes"].as_u64().unwrap()
    }

    fn wait_for_writes_beyond(&self, writes: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.writes() <= writes {
            assert!(Instant::now() < deadline, "the guest does nothing");
            // Whoever asks all the time takes a processor from the guest.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn ended(mut self) -> Output {
        self.child.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Program {
    /// A test that failed leaves no guest behind that runs for ever, and says what the program said.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            if let Ok(output) = child.wait_with_output() {
                eprintln!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
            }
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_is_started_paused_resumed_and_stopped() {
    let program = Program::start(&[print("up"), print_for_ever(b'x')], &["--paused", "--vcpus=2"]);

    let vm = program.get("/v1/vm");
    assert_eq!((&vm["state"], &vm["config"]["vcpus"]), (&json!("created"), &json!(2)));
    assert_eq!(program.get("/v1/metrics")["first_entry_ns"], 0);

    assert_eq!(program.become_state("running"), 204);
    program.wait_for_writes_beyond(0);

    assert_eq!(program.become_state("paused"), 204);
    assert_eq!(program.get("/v1/vm")["state"], "paused");
    let writes = program.writes();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(program.writes(), writes);

    assert_eq!(program.become_state("running"), 204);
    program.wait_for_writes_beyond(writes);

    let socket = program.socket();
    assert_eq!(program.become_state("stopped"), 204);
    let output = program.ended();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(!socket.exists());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_that_never_ran_can_be_stopped() {
    let program = Program::start(&[HANG.to_vec()], &["--paused"]);

    assert_eq!(program.become_state("stopped"), 204);

    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_that_ends_ends_the_program_whoever_listens() {
    let program = Program::start(&[END.to_vec()], &["--paused"]);
    let _idle = program.connect();

    assert_eq!(program.become_state("running"), 204);

    assert_eq!(program.ended().status.code(), end_code());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn what_cannot_be_is_refused_with_field_and_rule() {
    let program = Program::start(&[HANG.to_vec()], &["--paused"]);
    let refused = |method, path, body| {
        let (status, answer) = program.ask(method, path, body);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["error"]["rule"].as_str().unwrap().len() > 5, "{answer}");
        (status, answer["error"]["field"].as_str().unwrap().to_owned())
    };

    let put = |body| refused("PUT", "/v1/vm/state", body);
    assert_eq!(put(r#"{"state": "paused"}"#), (409, "state".to_owned()));
    assert_eq!(put(r#"{"stat": "running"}"#), (400, "stat".to_owned()));
    assert_eq!(put(r#"{"state": "flying"}"#), (400, "state".to_owned()));
    assert_eq!(put("{}"), (400, "(document)".to_owned()));
    assert_eq!(put("nonsense"), (400, "(document)".to_owned()));
    assert_eq!(refused("GET", "/v2/vm", ""), (404, "path".to_owned()));
    assert_eq!(refused("DELETE", "/v1/vm", ""), (405, "method".to_owned()));
    assert_eq!(program.get("/v1/vm")["state"], "created");

    assert_eq!(program.become_state("stopped"), 204);
    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn metrics_come_as_prometheus_text() {
    let program = Program::start(&[print_for_ever(b'x')], &[]);
    program.wait_for_writes_beyond(0);

    let (status, text) = program.ask("GET", "/metrics", "");

    assert_eq!(status, 200);
    for line in [
        "coracle_exits_total{reason=\"write\"} ",
        &format!("coracle_accesses_total{{address=\"{}\"}} ", payload::UART),
        "coracle_device_chains_total{device=\"console\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    let first_entry = text.split("coracle_boot_seconds{stage=\"first_entry\"} ").nth(1);
    let seconds: f64 = first_entry.unwrap().lines().next().unwrap().parse().unwrap();
    assert!(seconds > 0.0, "{text}");
    assert_eq!(program.become_state("stopped"), 204);
    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_whose_output_nobody_reads_is_not_paused_but_stopped() {
    let mut program = Program::start(&[print_for_ever(b'x')], &["--paused", "--console"]);
    // Each byte is an exit: a small pipe is full before a slow machine runs out of patience.
    let pipe = program.child.as_mut().unwrap().stdout.as_ref().unwrap();
    let size = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(0x1000)).unwrap();
    assert_eq!(program.become_state("running"), 204);
    program.wait_for_writes_beyond(u64::try_from(size).unwrap());

    assert_eq!(program.become_state("paused"), 503);
    assert_eq!(program.get("/v1/vm")["state"], "running");

    assert_eq!(program.become_state("stopped"), 204);
    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn sockets_go_with_a_program_that_a_signal_ends() {
    for signal in [libc::SIGTERM, libc::SIGHUP] {
        let folder = TempDir::new().unwrap();
        let vsock = folder.path().join("vsock");
        let flag = format!("--vsock=cid=3,socket={}", vsock.display());
        let program = Program::start(&[HANG.to_vec()], &[&flag]);
        program.get("/v1/vm");
        assert!(vsock.exists());
        let (process, socket) = (program.id(), program.socket());

        kill(process, signal);

        assert_eq!(program.ended().status.code(), Some(128 + signal));
        assert!(!vsock.exists() && !socket.exists());
    }
}

#[test]
fn the_documented_configuration_is_one() {
    let text = include_str!("../API.md");
    let example = text.split("```json").nth(1).and_then(|rest| rest.split("```").next()).unwrap();

    let config: vmm::VmConfig = vmm::from_json(example).unwrap();

    assert_eq!(config.validate(), Ok(()));
    assert_eq!(config.disks.len() + config.nets.len() + config.shares.len(), 3);
}

#[test]
fn a_check_names_every_fault_and_needs_no_kvm() {
    let output = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
        .args(["--check", "--kernel=/nowhere/k", "--disk=id=a,path=/nowhere/d"])
        .output()
        .unwrap();

    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("coracle-vmm: boot.kernel: open kernel \"/nowhere/k\""), "{text}");
    assert!(
        text.contains("coracle-vmm: disks[0].path: open disk /nowhere/d: No such file"),
        "{text}"
    );
}

#[test]
fn a_check_of_a_right_configuration_says_nothing() {
    let payload = Payload::of(&[HANG.to_vec()]);
    let output = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
        .args(["--check", "--memory=32", "--kernel"])
        .arg(payload.config().boot.kernel)
        .output()
        .unwrap();

    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// `(status, field, rule)` of the refusal.
fn refusal(program: &Program, method: &str, path: &str, body: &Value) -> (u16, String, String) {
    let (status, answer) = program.ask(method, path, &body.to_string());
    let answer: Value =
        serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{status}: {answer}"));
    let text = |name| answer["error"][name].as_str().unwrap().to_owned();
    (status, text("field"), text("rule"))
}

fn assert_refused(program: &Program, request: (&str, &str, Value), expected: (u16, &str, &str)) {
    let (method, path, body) = request;
    let (status, field, rule) = refusal(program, method, path, &body);
    assert_eq!((status, &*field), (expected.0, expected.1), "{path} {body}: {rule}");
    assert!(rule.contains(expected.2), "{path} {body}: {rule}");
}

fn kill(process: u32, signal: i32) {
    // SAFETY: the process is our child's, or our child, and nobody has waited for it.
    assert_eq!(unsafe { libc::kill(i32::try_from(process).unwrap(), signal) }, 0);
}

/// How many vCPU threads a process has.
fn threads(process: u32) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
    names.filter(|name| name.as_ref().is_ok_and(|name| name.starts_with("vcpu"))).count()
}

#[test]
#[ignore = "needs /dev/kvm"]
fn vcpus_are_granted_up_to_the_limit_and_stop_with_the_machine() {
    let program = Program::start(&[print_for_ever(b'x')], &["--max-vcpus=4"]);
    program.wait_for_writes_beyond(0);
    // A thread gives itself its name.
    let await_threads = |count: usize| {
        let deadline = Instant::now() + PATIENCE;
        while threads(program.id()) != count {
            assert!(Instant::now() < deadline, "there are not {count} vCPU threads");
        }
    };
    assert_eq!(program.get("/v1/vm/vcpus"), json!({"count": 1, "max_vcpus": 4}));
    await_threads(1);

    let put = |count: u8| ("PUT", "/v1/vm/vcpus", json!({ "count": count }));
    let (status, answer) = program.ask("PUT", "/v1/vm/vcpus", r#"{"count": 3}"#);
    assert_eq!((status, answer), (200, r#"{"count":3,"max_vcpus":4}"#.to_owned()));
    await_threads(3);
    assert_refused(&program, put(2), (400, "count", "must be 3 to 4"));
    assert_refused(&program, put(5), (400, "count", "must be 3 to 4"));

    assert_eq!(program.get("/v1/vm")["config"]["vcpus"], 3);

    // Those that came later take part in everything.
    assert_eq!(program.become_state("paused"), 204);
    assert_eq!(program.ask("PUT", "/v1/vm/vcpus", r#"{"count": 4}"#).0, 200);
    assert_eq!(program.become_state("running"), 204);
    assert_eq!(program.become_state("paused"), 204);
    assert_eq!(program.become_state("stopped"), 204);
    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_runs_on_when_the_process_that_serves_clients_is_killed() {
    let mut program = Program::start(&[print_for_ever(b'x')], &["--console"]);
    let pipe = program.child.as_mut().unwrap().stdout.take().unwrap();
    let size = fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(0x1000)).unwrap();
    assert_eq!(program.get("/v1/vm")["state"], "running");
    let server = program.server();
    let mut stream = program.connect();

    kill(server, libc::SIGKILL);
    // Its end is that of its clients.
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    // More than the pipe had room for before.
    let mut pipe = pipe.take(u64::try_from(size).unwrap() + 1);
    let read = pipe.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(u64::try_from(read).unwrap(), u64::try_from(size).unwrap() + 1);
    kill(program.id(), libc::SIGTERM);

    assert_eq!(program.ended().status.code(), Some(128 + libc::SIGTERM));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_process_that_serves_clients_and_does_not_answer_keeps_no_machine_from_its_end() {
    let mut program = Program::start(&[HANG.to_vec()], &[]);
    program.get("/v1/vm");
    let server = program.server();
    kill(server, libc::SIGSTOP);

    kill(program.id(), libc::SIGTERM);

    assert_eq!(program.child.as_mut().unwrap().wait().unwrap().code(), Some(128 + libc::SIGTERM));
    kill(server, libc::SIGCONT);
    let deadline = Instant::now() + PATIENCE;
    while program.socket().exists() {
        assert!(Instant::now() < deadline, "the socket is still there");
        std::thread::yield_now();
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn memory_is_asked_for_as_far_as_there_is_any() {
    let program = Program::start(
        &[print_for_ever(b'x')],
        &["--pluggable-memory=256", "--balloon=statistics"],
    );
    program.wait_for_writes_beyond(0);
    let memory = |pluggable: u32| {
        json!({"size_mib": 32, "max_pluggable_mib": 256, "pluggable_mib": pluggable,
               "plugged_mib": 0})
    };
    assert_eq!(program.get("/v1/vm/memory"), memory(0));

    let (status, answer) = program.ask("PUT", "/v1/vm/memory", r#"{"pluggable_mib": 128}"#);
    assert_eq!((status, serde_json::from_str(&answer).unwrap()), (200, memory(128)));
    let put = |mib: u32| ("PUT", "/v1/vm/memory", json!({ "pluggable_mib": mib }));
    assert_refused(&program, put(127), (400, "pluggable_mib", "multiple of 2"));
    assert_refused(&program, put(258), (400, "pluggable_mib", "up to 256"));
    assert_eq!(program.get("/v1/vm/memory"), memory(128));

    assert_eq!(program.ask("PUT", "/v1/vm/balloon", r#"{"target_mib": 8}"#).0, 204);
    let put = |mib: u32| ("PUT", "/v1/vm/balloon", json!({ "target_mib": mib }));
    assert_refused(&program, put(32), (400, "target_mib", "must be 0 to 31, not 32"));
    let balloon = program.get("/v1/vm/balloon");
    // This guest has no driver.
    assert_eq!((&balloon["target_mib"], &balloon["size_mib"]), (&json!(8), &json!(0)));
    assert_eq!(balloon["statistics"], Value::Null);
    assert_eq!(program.become_state("stopped"), 204);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn what_the_machine_was_built_without_is_refused() {
    let program = Program::start(&[print_for_ever(b'x')], &["--paused"]);
    let disk = json!({"id": "a", "path": "/dev/null"});
    let requests = [
        ("PUT", "/v1/vm/memory", json!({"pluggable_mib": 128}), "pluggable_mib"),
        ("PUT", "/v1/vm/balloon", json!({"target_mib": 1}), "balloon"),
        ("GET", "/v1/vm/balloon", Value::Null, "balloon"),
        ("POST", "/v1/vm/disks", disk, "spare_slots"),
    ];

    for (method, path, body, _) in requests.clone() {
        assert_refused(&program, (method, path, body), (409, "state", "is created"));
    }
    assert_eq!(program.become_state("running"), 204);
    for (method, path, body, field) in requests {
        assert_refused(&program, (method, path, body), (409, field, "built with"));
    }
    for path in ["/v1/vm/vcpus", "/v1/vm/disks", "/v1/vm/disks/a", "/v1/vm/nets/t"] {
        assert_refused(&program, ("PATCH", path, Value::Null), (405, "method", "must be"));
    }
    assert_eq!(program.become_state("stopped"), 204);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn disks_come_and_go_and_a_wrong_one_changes_nothing() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let boot = format!("--disk=id=boot,path={},read_only", image.path().display());
    let program = Program::start(&[print_for_ever(b'x')], &["--spare-slots=2", &boot]);
    program.wait_for_writes_beyond(0);
    let disk = |id: &str| json!({"id": id, "path": image.path(), "read_only": true});
    let post = |body: Value| ("POST", "/v1/vm/disks", body);
    let delete = |id: &str| ("DELETE", format!("/v1/vm/disks/{id}"));
    let open = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", program.id())).unwrap();
        let files = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        files.filter(|file| file == image.path()).count()
    };

    // Console, entropy and the disk of the start are devices 0 to 2.
    let (status, answer) = program.ask("POST", "/v1/vm/disks", &disk("one").to_string());
    assert_eq!(status, 201, "{answer}");
    let place: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(place, json!({"number": 3, "names": arch::expected::DEVICE_3}));
    assert_eq!(open(), 2);
    assert_refused(&program, post(disk("one")), (400, "id", "disk one is there already"));
    assert_refused(&program, post(disk("boot")), (400, "id", "disk boot is there already"));
    assert_refused(&program, post(json!({"id": "x"})), (400, "(document)", "path"));
    let queues = json!({"id": "x", "path": image.path(), "queues": 0});
    assert_refused(&program, post(queues), (400, "queues", "must be 1 to"));
    let missing = json!({"id": "x", "path": "/nowhere/disk"});
    assert_refused(&program, post(missing), (400, "path", "No such file"));
    let writer = json!({"id": "x", "path": image.path()});
    assert_refused(&program, post(writer), (400, "path", "is in use by another"));

    assert_eq!(program.ask("POST", "/v1/vm/disks", &disk("two").to_string()).0, 201);
    assert_refused(&program, post(disk("three")), (409, "spare_slots", "spare_slots = 2"));
    let (method, path) = delete("boot");
    assert_refused(&program, (method, &path, Value::Null), (409, "id", "was there when"));
    let (method, path) = delete("three");
    assert_refused(&program, (method, &path, Value::Null), (404, "id", "no disk three"));
    assert_eq!(program.get("/v1/vm")["config"]["disks"].as_array().unwrap().len(), 3);
    assert!(program.get("/v1/metrics")["devices"]["disk two"].is_object());

    let (method, path) = delete("one");
    assert_eq!(program.ask(method, &path, "").0, 204);
    assert_eq!(open(), 2);
    let (_, answer) = program.ask("POST", "/v1/vm/disks", &disk("three").to_string());
    assert_eq!(serde_json::from_str::<Value>(&answer).unwrap()["number"], 3, "{answer}");

    program.wait_for_writes_beyond(program.writes());
    assert_eq!(program.become_state("paused"), 204);
    assert_refused(&program, post(disk("four")), (409, "state", "is paused"));
    assert_eq!(program.become_state("stopped"), 204);
    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm and CAP_NET_ADMIN"]
fn interfaces_come_and_go_and_a_wrong_one_changes_nothing() {
    let program = Program::start(&[print_for_ever(b'x')], &["--spare-slots=1"]);
    program.wait_for_writes_beyond(0);
    let net = |tap: &str, create: bool| json!({"tap": tap, "create": create, "vhost": "off", "mac": "02:00:00:00:00:01"});
    let post = |body: Value| ("POST", "/v1/vm/nets", body);
    let exists = || std::path::Path::new("/sys/class/net/vmmapi0").exists();

    assert_refused(&program, post(net("vmmapi0", false)), (400, "tap", "must name a tap"));
    assert_refused(&program, post(json!({"tap": "t", "mac": "x"})), (400, "mac", "address of one"));
    // With the host's kernel serving its queues, too, if that is to be had.
    for vhost in ["auto", "off"] {
        let mut body = net("vmmapi0", true);
        body["vhost"] = json!(vhost);
        body["receive_limit"] =
            if vhost == "off" { json!({"bytes_per_second": 1000}) } else { json!({}) };
        let (status, answer) = program.ask("POST", "/v1/vm/nets", &body.to_string());
        assert_eq!(status, 201, "{answer}");
        assert!(exists());
        assert_refused(&program, post(net("vmmapi0", true)), (400, "tap", "is there already"));
        if vhost == "auto" {
            assert_eq!(program.ask("DELETE", "/v1/vm/nets/vmmapi0", "").0, 204);
        }
    }

    assert_refused(&program, post(net("other", false)), (400, "mac", "must be another one"));

    assert_eq!(program.ask("DELETE", "/v1/vm/nets/vmmapi0", "").0, 204);
    assert!(!exists());
    let again = ("DELETE", "/v1/vm/nets/vmmapi0", Value::Null);
    assert_refused(&program, again, (404, "tap", "no net vmmapi0"));
    program.wait_for_writes_beyond(program.writes());
    assert_eq!(program.become_state("stopped"), 204);
}

#[test]
#[ignore = "needs /dev/kvm and CAP_NET_ADMIN"]
fn there_is_room_for_all_that_a_machine_may_get() {
    let program = Program::start(&[print_for_ever(b'x')], &["--spare-slots=8", "--max-vcpus=16"]);
    program.wait_for_writes_beyond(0);

    for number in 0..8 {
        let (tap, mac) = (format!("vmmroom{number}"), format!("02:00:00:00:01:{number:02}"));
        let net = json!({"tap": tap, "mac": mac, "create": true, "queue_pairs": 16});
        let (status, answer) = program.ask("POST", "/v1/vm/nets", &net.to_string());
        assert_eq!(status, 201, "{answer}");
    }
    let (status, answer) = program.ask("PUT", "/v1/vm/vcpus", r#"{"count": 16}"#);

    assert_eq!(status, 200, "{answer}");
}

#[test]
#[ignore = "needs /dev/kvm and CAP_NET_ADMIN"]
fn a_device_that_there_are_no_descriptors_for_is_refused_and_all_goes_on() {
    let arguments = ["--spare-slots=1", "--resource-limit=no-file=30"];
    let program = Program::start(&[print_for_ever(b'x')], &arguments);
    program.wait_for_writes_beyond(0);
    let mac = "02:00:00:00:02:01";
    let net =
        json!({"tap": "vmmfew0", "mac": mac, "create": true, "queue_pairs": 16, "vhost": "off"});

    let request = ("POST", "/v1/vm/nets", net);
    assert_refused(&program, request, (400, "(document)", "--resource-limit no-file"));

    program.wait_for_writes_beyond(program.writes());
    assert_eq!(program.become_state("stopped"), 204);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn vcpus_that_there_are_no_descriptors_for_are_not_granted_and_those_before_them_are() {
    // Those that are there from the start need no more.
    let made = Host::vcpus_to_create(1, 64);
    let limit = format!("--resource-limit=no-file={}", 30 + made);
    let program = Program::start(&[print_for_ever(b'x')], &["--max-vcpus=64", &limit]);
    program.wait_for_writes_beyond(0);

    let (status, answer) = program.ask("PUT", "/v1/vm/vcpus", r#"{"count": 64}"#);

    assert_eq!(status, if made == 64 { 200 } else { 500 }, "{answer}");
    assert_eq!(answer.contains("Too many open files"), made != 64, "{answer}");
    let granted = program.get("/v1/vm/vcpus")["count"].as_u64().unwrap();
    assert!(granted > 1 && (granted == 64) == (made == 64), "{granted}");
    assert_eq!(program.get("/v1/vm")["config"]["vcpus"], granted);
    program.wait_for_writes_beyond(program.writes());
    assert_eq!(program.become_state("stopped"), 204);
}
