//! The control socket of `coracle-vmm`, from a machine that waits to its exit code.

mod payload;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use payload::{HANG, Payload, TRIPLE_FAULT, print, print_for_ever};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Generous, because this machine may be busy and its KVM emulated.
const PATIENCE: Duration = Duration::from_secs(20);

struct Program {
    child: Child,
    folder: TempDir,
    _payload: Payload,
}

impl Program {
    fn start(code: &[Vec<u8>], arguments: &[&str]) -> Self {
        let payload = Payload::elf(code);
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
        Program { child, folder, _payload: payload }
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
        }
    }

    fn ended(self) -> Output {
        self.child.wait_with_output().unwrap()
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
    let program = Program::start(&[TRIPLE_FAULT.to_vec()], &["--paused"]);
    let _idle = program.connect();

    assert_eq!(program.become_state("running"), 204);

    assert_eq!(program.ended().status.code(), Some(4));
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
        "coracle_accesses_total{address=\"port 0x3f8\"} ",
        "coracle_device_chains_total{device=\"console\"} 0",
        "coracle_boot_seconds{stage=\"first_entry\"} 0.",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    assert_eq!(program.become_state("stopped"), 204);
    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_whose_output_nobody_reads_is_not_paused_but_stopped() {
    let program = Program::start(&[print_for_ever(b'x')], &["--console"]);
    program.wait_for_writes_beyond(0x1_0000);

    assert_eq!(program.become_state("paused"), 503);
    assert_eq!(program.get("/v1/vm")["state"], "running");

    assert_eq!(program.become_state("stopped"), 204);
    assert_eq!(program.ended().status.code(), Some(5));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn sockets_go_with_a_program_that_a_signal_ends() {
    let folder = TempDir::new().unwrap();
    let vsock = folder.path().join("vsock");
    let flag = format!("--vsock=cid=3,socket={}", vsock.display());
    let program = Program::start(&[HANG.to_vec()], &[&flag]);
    program.get("/v1/vm");
    assert!(vsock.exists());
    let (process, socket) = (program.child.id(), program.socket());

    // SAFETY: the process is a child that was not waited for, so its number is its own.
    assert_eq!(unsafe { libc::kill(i32::try_from(process).unwrap(), libc::SIGTERM) }, 0);

    assert_eq!(program.ended().status.code(), Some(128 + libc::SIGTERM));
    assert!(!vsock.exists() && !socket.exists());
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
    assert!(text.contains("coracle-vmm: disks[0].path: \"/nowhere/d\": No such file"), "{text}");
}

#[test]
fn a_check_of_a_right_configuration_says_nothing() {
    let payload = Payload::elf(&[HANG.to_vec()]);
    let output = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
        .args(["--check", "--memory=32", "--kernel"])
        .arg(payload.config().boot.kernel)
        .output()
        .unwrap();

    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
