//! `coracle-vmm` as whoever starts it sees it: what it says, and how it ends.

mod payload;
#[path = "payload/program.rs"]
mod program;

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use payload::{DEVICES, END, HALT, HANG, Payload, print, print_for_ever, reach_devices, store};
use program::end_code;
use tempfile::TempDir;
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
fn a_machine_that_is_to_die_with_its_parent_does() {
    let payload = Payload::of(&[print("up"), HANG.to_vec()]);
    // Whoever is root becomes another user on the way, which ends such wishes.
    let script = "setpriv --pdeathsig TERM \"$@\" & wait";
    let mut parent = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_coracle-vmm")])
        .args(["--memory=32", "--console", "--serial", "--kernel"])
        .arg(payload.config().boot.kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_output(&parent, 2);

    parent.kill().unwrap();

    // It ends when the machine has, too.
    let mut output = String::new();
    parent.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, "up");
    parent.wait().unwrap();
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
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let payload = Payload::of(&[print("up"), HANG.to_vec()]);
        let program = start(&payload);
        wait_for_output(&program, 2);

        send(&program, signal);

        assert_eq!(ended(program), Some(128 + signal));
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_hang_up_that_is_ignored_ends_nothing() {
    let payload = Payload::of(&[print("up"), HANG.to_vec()]);
    let program = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" --memory=32 --console --serial --kernel \"$1\""])
        .arg(env!("CARGO_BIN_EXE_coracle-vmm"))
        .arg(payload.config().boot.kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_output(&program, 2);

    // Whichever of the two it heeds ends it, and of several the lowest number is read first.
    send(&program, libc::SIGHUP);
    send(&program, libc::SIGTERM);

    assert_eq!(ended(program), Some(128 + libc::SIGTERM));
}

/// What a program says that does not start with `arguments`.
fn refusal(arguments: &[String]) -> String {
    let payload = Payload::of(&[HANG.to_vec()]);
    let mut program = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
        .args(["--memory=32", "--kernel"])
        .arg(payload.config().boot.kernel)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut errors = program.stderr.take().unwrap();
    assert_eq!(ended(program), Some(1));
    let mut said = String::new();
    errors.read_to_string(&mut said).unwrap();
    said
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_fifo_that_nobody_reads_is_no_console() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("fifo");
    mkfifo(&path, Mode::S_IRWXU).unwrap();

    let message = refusal(&[format!("--console-file={}", path.display())]);

    let reason = "no process reads this FIFO: start its reader first";
    assert_eq!(message, format!("coracle-vmm: open console.output.file {path:?}: {reason}\n"));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn what_a_machine_cost_is_kept_until_the_next_one_is_built() {
    let folder = TempDir::new().unwrap();
    let (metrics, folder) = (folder.path().join("metrics"), folder.path());
    fs::write(&metrics, "kept").unwrap();
    let report = format!("--metrics={}", metrics.display());
    let console = format!("--console-file={}", folder.display());

    let message = refusal(&[report.clone(), console]);

    assert!(message.contains("Is a directory"), "{message}");
    assert_eq!(fs::read_to_string(&metrics).unwrap(), "kept");
    let payload = Payload::of(&[END.to_vec()]);
    let mut program = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"));
    program.args(["--memory=32", "--kernel"]).arg(payload.config().boot.kernel).arg(report);
    assert_eq!(program.status().unwrap().code(), end_code());
    assert!(fs::read_to_string(&metrics).unwrap().starts_with('{'));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn sockets_go_with_a_killed_machine_and_what_another_one_left_behind_makes_room() {
    let folder = TempDir::new().unwrap();
    let (api, vsock) = (folder.path().join("api"), folder.path().join("vsock"));
    let arguments = [
        format!("--api-socket={}", api.display()),
        format!("--vsock=cid=3,socket={}", vsock.display()),
    ];
    let start = |payload: &Payload| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"));
        program.args(["--memory=32", "--console", "--serial", "--kernel"]);
        program.arg(payload.config().boot.kernel).args(&arguments);
        program.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let payload = Payload::of(&[print("up"), HANG.to_vec()]);
    let mut first = start(&payload);
    wait_for_output(&first, 2);

    let message = refusal(&arguments);
    let reason = "another process listens there already";
    assert_eq!(message, format!("coracle-vmm: --api-socket: listen on {api:?}: {reason}\n"));
    let message = refusal(&arguments[1..]);
    assert_eq!(message, format!("coracle-vmm: vsock.socket: listen on {vsock:?}: {reason}\n"));
    first.kill().unwrap();
    first.wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while api.exists() || vsock.exists() {
        assert!(Instant::now() < deadline, "the sockets are still there");
        thread::yield_now();
    }

    // Nobody removes the files of these.
    for path in [&api, &vsock] {
        drop(UnixListener::bind(path).unwrap());
    }
    assert_eq!(ended(start(&Payload::of(&[END.to_vec()]))), end_code());
    assert!(!api.exists() && !vsock.exists());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn too_few_descriptors_are_an_error_with_a_remedy() {
    let message = refusal(&["--resource-limit=no-file=7".to_owned()]);

    assert!(message.contains("(raise the limit: --resource-limit no-file=N"), "{message}");
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
