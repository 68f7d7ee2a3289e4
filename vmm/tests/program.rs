//! `coracle-vmm` as whoever starts it sees it: what it says, and how it ends.

mod payload;
#[path = "payload/program.rs"]
mod program;

use std::fs::{self, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use payload::{DEVICES, END, HALT, HANG, Payload, print, print_for_ever, reach_devices, store};
use program::end_code;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

/// Generous, because this machine may be busy and its KVM emulated.
const PATIENCE: Duration = Duration::from_secs(20);

/// Least room a pipe can have, in bytes.
const PIPE_BYTES: i32 = 4096;

fn start(payload: &Payload) -> Child {
    start_with_input(payload, Stdio::null())
}

fn start_with_input(payload: &Payload, input: Stdio) -> Child {
    let kernel = payload.config().boot.kernel;
    Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
        .args(["--memory=32", "--console", "--serial", "--kernel"])
        .arg(kernel)
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Code that writes each of `values` to the status register of the first virtio device.
fn set_status(values: &[u32]) -> Vec<u8> {
    let status = DEVICES + VIRTIO_MMIO_STATUS;
    let writes = values.iter().map(|&value| store(status, value));
    reach_devices().into_iter().chain(writes.flatten()).collect()
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
        thread::yield_now();
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
fn the_way_a_guest_ends_has_a_code_of_its_own() {
    let payload = Payload::of(&[print("hello"), END.to_vec()]);

    let output = start(&payload).wait_with_output().unwrap();

    assert_eq!(output.status.code(), end_code());
    assert_eq!(output.stdout, b"hello");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_driver_that_misbehaves_is_complained_about() {
    let payload = Payload::of(&[set_status(&[1, 2]), END.to_vec()]);

    let output = start(&payload).wait_with_output().unwrap();

    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(message, "coracle-vmm: virtio device type 3: driver cleared a status bit\n");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn too_few_descriptors_are_an_error_that_says_so() {
    let payload = Payload::of(&[END.to_vec()]);
    let kernel = payload.config().boot.kernel;
    let run = |descriptors: u64| {
        let limit = libc::rlimit { rlim_cur: descriptors, rlim_max: descriptors };
        let mut program = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"));
        program.args(["--memory=32", "--kernel"]).arg(&kernel).stdin(Stdio::null());
        // SAFETY: between fork and execution this makes one system call, on a value of its own.
        unsafe {
            program.pre_exec(move || {
                match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        program.output().unwrap()
    };

    // From enough for the program itself to enough for the whole machine.
    for output in (4..).map(run).take_while(|output| output.status.code() != end_code()) {
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("Too many open files"), "{message}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn no_file_takes_the_place_of_a_standard_stream_that_is_closed() {
    let payload = Payload::of(&[HALT.to_vec()]);
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "exec \"$0\" --kernel \"$1\" 0<&- 1>&- 2>&-",
        env!("CARGO_BIN_EXE_coracle-vmm"),
    ]);
    command.arg(payload.config().boot.kernel);
    // None of the shell's own is what is looked for.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut program = command.spawn().unwrap();
    let wanted = [0, 1, 2].map(|_| Some(PathBuf::from("/dev/null")));
    let stream = |number| fs::read_link(format!("/proc/{}/fd/{number}", program.id())).ok();
    let streams = || [0, 1, 2].map(stream);
    let deadline = Instant::now() + PATIENCE;
    // At first it is the shell that has them.
    while streams() != wanted && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }

    let found = streams();

    program.kill().unwrap();
    program.wait().unwrap();
    assert_eq!(found, wanted);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_signal_ends_the_machine() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let payload = Payload::of(&[print("up"), HANG.to_vec()]);
        let program = start(&payload);
        wait_for_output(&program, 2);

        send(&program, signal);

        assert_eq!(ended(program), Some(128 + signal));
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_signal_ends_a_machine_whose_output_nobody_reads() {
    let payload = Payload::of(&[print_for_ever(b'x')]);
    let program = start(&payload);
    let pipe = program.stdout.as_ref().unwrap().as_raw_fd();
    // SAFETY: the descriptor is open, and no memory is involved.
    assert_eq!(unsafe { libc::fcntl(pipe, libc::F_SETPIPE_SZ, PIPE_BYTES) }, PIPE_BYTES);
    wait_for_output(&program, PIPE_BYTES);

    send(&program, libc::SIGTERM);

    assert_eq!(ended(program), Some(128 + libc::SIGTERM));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn keys_send_signals_while_the_console_takes_none() {
    let payload = Payload::of(&[print("up"), HANG.to_vec()]);
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap();
    let (master, unlocked) = (terminal.as_raw_fd(), 0);
    // SAFETY: the descriptor is open; the first request reads an int, the second takes flags.
    let keyboard = unsafe {
        assert_eq!(libc::ioctl(master, libc::TIOCSPTLCK, &raw const unlocked), 0);
        libc::ioctl(master, libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY)
    };
    assert!(keyboard >= 0);
    // SAFETY: the kernel has just given us this descriptor.
    let keyboard = unsafe { OwnedFd::from_raw_fd(keyboard) };

    let program = start_with_input(&payload, keyboard.into());
    wait_for_output(&program, 2);

    // SAFETY: settings are plain numbers, which the call fills in.
    let settings = unsafe {
        let mut settings: libc::termios = mem::zeroed();
        assert_eq!(libc::tcgetattr(master, &raw mut settings), 0);
        settings
    };
    send(&program, libc::SIGTERM);
    assert_ne!(settings.c_lflag & libc::ISIG, 0);
    assert_eq!(ended(program), Some(128 + libc::SIGTERM));
}
