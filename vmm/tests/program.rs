//! `coracle-vmm` as whoever starts it sees it: what it says, and how it ends.

mod payload;

use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use payload::{HANG, Payload, TRIPLE_FAULT, print, print_for_ever};

/// Generous, because this machine may be busy and its KVM emulated.
const PATIENCE: Duration = Duration::from_secs(20);

/// Least room a pipe can have, in bytes.
const PIPE_BYTES: i32 = 4096;

fn start(payload: &Payload) -> Child {
    let kernel = payload.config().boot.kernel;
    Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
        .args(["--memory=32", "--console", "--serial", "--kernel"])
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn send(program: &Child, signal: i32) {
    let process = i32::try_from(program.id()).unwrap();
    // SAFETY: the process is a child that was not waited for, so its number is its own.
    assert_eq!(unsafe { libc::kill(process, signal) }, 0);
}

/// Waits for the end, and gives the exit code.
fn ended(mut program: Child) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = program.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > deadline {
            program.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::yield_now();
    }
}

fn wait_for_output(program: &Child, bytes: i32) {
    let (pipe, mut there) = (program.stdout.as_ref().unwrap().as_raw_fd(), 0);
    let deadline = Instant::now() + PATIENCE;
    while there < bytes {
        assert!(Instant::now() < deadline, "only {there} bytes were printed");
        // SAFETY: the descriptor is open, and this request fills in an int.
        assert_eq!(unsafe { libc::ioctl(pipe, libc::FIONREAD, &raw mut there) }, 0);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_triple_fault_has_a_code_of_its_own() {
    let payload = Payload::elf(&[print("hello"), TRIPLE_FAULT.to_vec()]);

    let output = start(&payload).wait_with_output().unwrap();

    assert_eq!(output.status.code(), Some(4));
    assert_eq!(output.stdout, b"hello");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_signal_ends_the_machine() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let payload = Payload::elf(&[print("up"), HANG.to_vec()]);
        let program = start(&payload);
        wait_for_output(&program, 2);

        send(&program, signal);

        assert_eq!(ended(program), Some(128 + signal));
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_signal_ends_a_machine_whose_output_nobody_reads() {
    let payload = Payload::elf(&[print_for_ever(b'x')]);
    let program = start(&payload);
    let pipe = program.stdout.as_ref().unwrap().as_raw_fd();
    // SAFETY: the descriptor is open, and no memory is involved.
    assert_eq!(unsafe { libc::fcntl(pipe, libc::F_SETPIPE_SZ, PIPE_BYTES) }, PIPE_BYTES);
    wait_for_output(&program, PIPE_BYTES);

    send(&program, libc::SIGTERM);

    assert_eq!(ended(program), Some(128 + libc::SIGTERM));
}
