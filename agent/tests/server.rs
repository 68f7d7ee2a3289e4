//! The real agent with real containers, on this machine: everything but the virtual machine.

#[path = "host/mod.rs"]
mod host;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::symlink;

use agent_protocol::{
    ExitStatus, Hook, INIT_PROCESS, Request, Response, Sandbox, Stdio, StdioStream, WindowSize,
};
use host::{Host, bind, exec, feed, file_system, noise, process, read_until};
use nix::mount::MsFlags;

const LARGE: usize = 10 << 20;

fn shell(host: &mut Host, script: &str) -> (String, ExitStatus) {
    let container = host.container(&["sh", "-c", script]);
    host.run(&container)
}

#[test]
#[ignore = "needs root"]
fn output_and_exit_code_arrive() {
    let mut host = Host::start();

    let (output, status) = shell(&mut host, "echo hello; exit 7");

    assert_eq!(output, "hello\n");
    assert_eq!(status, ExitStatus::Code(7));
}

#[test]
#[ignore = "needs root"]
fn a_container_can_be_removed_and_made_again() {
    let mut host = Host::start();
    shell(&mut host, "true");

    assert_eq!(host.ask(&Request::RemoveContainer { container: "box".into() }), Response::Done);

    assert!(host.cgroup_names().is_empty());
    assert_eq!(shell(&mut host, "echo again").0, "again\n");
}

#[test]
#[ignore = "needs root"]
fn death_by_signal_is_told() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    host.start_box();

    let (container, process) = ("box".to_owned(), INIT_PROCESS.to_owned());
    let kill = Request::Signal { container, process, signal: libc::SIGKILL, all: false };

    assert_eq!(host.ask(&kill), Response::Done);
    assert_eq!(host.exit_of("box", INIT_PROCESS), ExitStatus::Signal(libc::SIGKILL));
    let Response::Failed(failed) = host.ask(&kill) else { panic!("it is dead") };
    assert_eq!(failed.message, "container not running");
}

#[test]
#[ignore = "needs root"]
fn a_missing_program_fails_at_create_and_leaves_nothing() {
    let mut host = Host::start();
    fs::write(host.rootfs().join("bin/plain"), "").unwrap();

    let missing = host.container(&["nosuch"]);
    let absent = host.container(&["/no/such"]);
    let plain = host.container(&["/bin/plain"]);

    let expected = "exec: \"nosuch\": executable file not found in $PATH";
    assert_eq!(host.refusal(missing), expected);
    let expected = "exec: \"/no/such\": stat /no/such: no such file or directory";
    assert_eq!(host.refusal(absent), expected);
    assert_eq!(host.refusal(plain), "exec: \"/bin/plain\": permission denied");
    assert!(host.cgroup_names().is_empty());
    assert_eq!(shell(&mut host, "echo still here").0, "still here\n");
}

#[test]
#[ignore = "needs root"]
fn a_program_that_cannot_be_executed_fails_at_start() {
    let mut host = Host::start();
    let script = host.rootfs().join("bin/script");
    fs::copy("/bin/busybox", &script).unwrap();
    fs::write(&script, "#!/no/interpreter\n").unwrap();
    let container = host.container(&["script"]);
    host.create(&container);

    let Response::Failed(failed) = host.ask(&Request::StartContainer { container: "box".into() })
    else {
        panic!("there is no such interpreter")
    };

    assert_eq!(failed.message, "exec /bin/script: no such file or directory");
    assert_eq!(host.exit_of("box", INIT_PROCESS), ExitStatus::Code(1));
}

#[test]
#[ignore = "needs root"]
fn end_of_stdin_reaches_the_process_after_all_its_bytes() {
    let mut host = Host::start();
    let mut container = host.container(&["cat"]);
    container.process.stdio = Stdio { stdin: true, stdout: true, stderr: false };
    let stdin = host.stream("box", INIT_PROCESS, StdioStream::Stdin);
    let mut stdout = host.stream("box", INIT_PROCESS, StdioStream::Stdout);
    host.create(&container);
    host.start_box();
    let bytes = noise(LARGE);

    let feeder = feed(&stdin, bytes.clone());
    let mut echoed = Vec::new();
    stdout.read_to_end(&mut echoed).unwrap();

    feeder.join().unwrap();
    assert!(echoed == bytes, "{} bytes came back", echoed.len());
    assert_eq!(host.exit_of("box", INIT_PROCESS), ExitStatus::Code(0));
}

#[test]
#[ignore = "needs root"]
fn all_output_is_sent_before_the_end_is_told() {
    let mut host = Host::start();
    let container = host.container(&["sh", "-c", "seq 1 5000; sleep 1000 & exit 0"]);
    let mut stdout = host.stream("box", INIT_PROCESS, StdioStream::Stdout);
    host.create(&container);
    host.start_box();

    assert_eq!(host.exit_of("box", INIT_PROCESS), ExitStatus::Code(0));

    stdout.set_nonblocking(true).unwrap();
    let mut output = Vec::new();
    // Ends with an error once nothing is left, or with the end of the stream.
    let _ = stdout.read_to_end(&mut output);
    assert!(output.ends_with(b"\n5000\n"));
}

#[test]
#[ignore = "needs root"]
fn closing_stdout_breaks_the_pipe_of_the_writer() {
    let mut host = Host::start();
    let container = host.container(&["sh", "-c", "while echo y; do :; done"]);
    let stdout = host.stream("box", INIT_PROCESS, StdioStream::Stdout);
    host.create(&container);
    host.start_box();

    drop(stdout);

    // PID 1 of a pid namespace is not killed by SIGPIPE, so the shell sees the error instead.
    assert_eq!(host.exit_of("box", INIT_PROCESS), ExitStatus::Code(0));
}

#[test]
#[ignore = "needs root"]
fn a_terminal_has_its_size_and_a_name() {
    let mut host = Host::start();
    let mut container =
        host.container(&["sh", "-c", "tty; stty size; read x; stty size; ls /dev/console"]);
    container.process.terminal = Some(WindowSize { rows: 33, columns: 101 });
    let mut terminal = host.stream("box", INIT_PROCESS, StdioStream::Terminal);
    host.create(&container);
    host.start_box();

    let before = read_until(&mut terminal, "33 101\r\n");
    let size = WindowSize { rows: 44, columns: 99 };
    let (container, process) = ("box".to_owned(), INIT_PROCESS.to_owned());
    assert_eq!(host.ask(&Request::Resize { container, process, size }), Response::Done);
    terminal.write_all(b"\n").unwrap();
    let after = read_until(&mut terminal, "/dev/console\r\n");

    assert!(before.starts_with("/dev/pts/0\r\n"), "{before:?}");
    assert!(after.contains("44 99\r\n"), "{after:?}");
    assert_eq!(host.exit_of("box", INIT_PROCESS), ExitStatus::Code(0));
}

#[test]
#[ignore = "needs root"]
fn half_closing_a_terminal_is_end_of_file() {
    let mut host = Host::start();
    let mut container = host.container(&["sh", "-c", "cat; echo end"]);
    container.process.terminal = Some(WindowSize { rows: 24, columns: 80 });
    let mut terminal = host.stream("box", INIT_PROCESS, StdioStream::Terminal);
    host.create(&container);
    host.start_box();

    terminal.shutdown(Shutdown::Write).unwrap();

    let mut output = String::new();
    terminal.read_to_string(&mut output).unwrap();
    assert!(output.contains("end\r\n"), "{output:?}");
}

#[test]
#[ignore = "needs root"]
fn closing_a_terminal_hangs_up() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    host.start_box();
    let mut inside = process(&["sleep", "1000"]);
    inside.terminal = Some(WindowSize { rows: 24, columns: 80 });
    let terminal = host.stream("box", "shell", StdioStream::Terminal);
    host.exec("shell", inside);

    drop(terminal);

    assert_eq!(host.exit_of("box", "shell"), ExitStatus::Signal(libc::SIGHUP));
}

#[test]
#[ignore = "needs root"]
fn a_process_is_who_and_where_it_was_told() {
    let mut host = Host::start();
    let script = "id -u; id -G; pwd; echo $HOME $WORD; ulimit -n; umask; hostname; \
                  grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status; cat /proc/self/oom_score_adj";
    let mut container = host.container(&["sh", "-c", script]);
    let process = &mut container.process;
    process.uid = 1000;
    process.gid = 1000;
    process.additional_gids = vec![7, 8];
    process.cwd = "/made/here".into();
    process.env.push("WORD=yes".into());
    process.rlimits = vec![(libc::RLIMIT_NOFILE, 123, 456)];
    process.umask = Some(0o027);
    process.capabilities.bounding = 1 << 10;
    process.capabilities.permitted = 1 << 10;
    process.capabilities.inheritable = 1 << 10;
    process.capabilities.ambient = 1 << 10;
    process.no_new_privs = true;
    process.oom_score_adj = Some(500);

    let (output, status) = host.run(&container);

    assert_eq!(status, ExitStatus::Code(0));
    let expected = "1000\n1000 7 8\n/made/here\n/home/me yes\n123\n0027\nboxed\n\
                    CapEff:\t0000000000000400\nCapBnd:\t0000000000000400\nNoNewPrivs:\t1\n500\n";
    assert_eq!(output, expected);
}

#[test]
#[ignore = "needs root"]
fn a_variable_has_its_last_value() {
    let mut host = Host::start();
    let mut container = host.container(&["/bin/env"]);
    container.process.env = ["A=1", "HOME=/", "A=2"].map(str::to_owned).to_vec();

    assert_eq!(host.run(&container).0, "A=2\nHOME=/\n");
}

#[test]
#[ignore = "needs root"]
fn a_user_may_reopen_its_stdout() {
    let mut host = Host::start();
    let mut container = host.container(&["sh", "-c", "echo direct > /dev/stdout"]);
    container.process.uid = 1000;

    assert_eq!(host.run(&container).0, "direct\n");
}

#[test]
#[ignore = "needs root"]
fn an_exec_joins_the_container() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    host.start_box();
    let mut stdout = host.stream("box", "tool", StdioStream::Stdout);

    let script = "hostname; cat /proc/1/comm; cat /proc/self/cgroup; exit 3";
    host.exec("tool", process(&["sh", "-c", script]));

    let mut output = String::new();
    stdout.read_to_string(&mut output).unwrap();
    assert_eq!(host.exit_of("box", "tool"), ExitStatus::Code(3));
    assert!(output.starts_with("boxed\nsleep\n"), "{output}");
    assert!(output.ends_with("0::/\n"), "{output}");
    let Response::Failed(failed) = host.ask(&exec("bad", process(&["nosuch"]))) else {
        panic!("there is no such program")
    };
    assert_eq!(failed.message, "exec: \"nosuch\": executable file not found in $PATH");
}

#[test]
#[ignore = "needs root"]
fn a_container_that_stops_an_exec_on_its_way_keeps_no_request_waiting() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    host.start_box();
    // As good as `kill -STOP -1` without end inside, and certain to come in time.
    fs::write(host.cgroup().join("cgroup.freeze"), "1").unwrap();

    let Response::Failed(failed) = host.ask(&exec("stopped", process(&["true"]))) else {
        panic!("it was stopped")
    };
    let (container, process) = ("box".to_owned(), INIT_PROCESS.to_owned());
    let kill = Request::Signal { container, process, signal: libc::SIGKILL, all: false };

    assert_eq!(failed.message, "the process does not get to its program: it was killed");
    assert_eq!(host.ask(&kill), Response::Done);
    assert_eq!(host.exit_of("box", INIT_PROCESS), ExitStatus::Signal(libc::SIGKILL));
}

#[test]
#[ignore = "needs root"]
fn an_exec_joins_a_container_that_has_cgroups_of_its_own() {
    let mut host = Host::start();
    // What systemd and the image of Docker do. Any controller but a threaded one will do.
    let script = "cd /cgroups && mkdir init && echo 1 > init/cgroup.procs && \
                  sed 's/\\w*/+&/g' cgroup.controllers > cgroup.subtree_control && \
                  echo moved; sleep 1000";
    let mut container = host.container(&["sh", "-c", script]);
    container.mounts.push(file_system("cgroup", "/cgroups", MsFlags::empty(), ""));
    let mut init = host.stream("box", INIT_PROCESS, StdioStream::Stdout);
    host.create(&container);
    host.start_box();
    read_until(&mut init, "moved\n");
    let mut stdout = host.stream("box", "tool", StdioStream::Stdout);

    host.exec("tool", process(&["cat", "/proc/self/cgroup"]));

    let mut output = String::new();
    stdout.read_to_string(&mut output).unwrap();
    assert!(output.ends_with("0::/init\n"), "{output}");
}

#[test]
#[ignore = "needs root"]
fn the_end_of_a_short_process_is_told_after_the_answer_to_its_exec() {
    let mut host = Host::start();
    // Orphans without end keep the agent collecting the dead.
    let mut container = host.container(&["sh", "-c", "while :; do (true &); done"]);
    container.namespaces &= !u64::try_from(libc::CLONE_NEWPID).unwrap();
    host.create(&container);
    host.start_box();

    for round in 0..200 {
        let name = format!("short {round}");
        let program = ["true", "nosuch"][round % 2];

        host.ask(&exec(&name, process(&[program])));

        assert_eq!(host.told_ends_of(&name), 0, "{program}, round {round}");
    }
}

#[test]
#[ignore = "needs root"]
fn processes_are_listed_paused_and_killed_together() {
    let mut host = Host::start();
    let container = host.container(&["sh", "-c", "sleep 1000 & sleep 1000"]);
    host.create(&container);
    host.start_box();
    host.exec("third", process(&["sleep", "2000"]));

    let id = || "box".to_owned();
    assert_eq!(host.ask(&Request::Pause { container: id() }), Response::Done);
    let Response::Processes(found) = host.ask(&Request::Processes { container: id() }) else {
        panic!("there are processes")
    };
    assert_eq!(host.ask(&Request::Resume { container: id() }), Response::Done);
    let (process, signal) = (INIT_PROCESS.to_owned(), libc::SIGKILL);
    let kill = Request::Signal { container: id(), process, signal, all: true };
    assert_eq!(host.ask(&kill), Response::Done);

    assert!(found.iter().any(|process| process.command == "sleep 2000"), "{found:?}");
    let mut ended = [host.event(), host.event()].map(|event| format!("{event:?}"));
    ended.sort();
    assert!(ended[0].contains("Signal(9)") && ended[1].contains("third"), "{ended:?}");
}

#[test]
#[ignore = "needs root"]
fn a_stream_waits_while_many_processes_are_asked_for() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    host.start_box();
    let mut first = host.stream("box", "first", StdioStream::Stdout);
    let others = (0..400).map(|number| format!("other {number}"));

    let _others: Vec<_> =
        others.map(|name| host.stream("box", &name, StdioStream::Stdout)).collect();
    let mut last = host.stream("box", "last", StdioStream::Stdout);
    host.exec("first", process(&["echo", "here"]));
    host.exec("last", process(&["echo", "here"]));

    assert_eq!(read_until(&mut first, "here\n"), "here\n");
    assert_eq!(read_until(&mut last, "here\n"), "here\n");
}

#[test]
#[ignore = "needs root"]
fn streams_that_nobody_claims_do_not_keep_others_out() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    host.start_box();

    for number in 0..2000 {
        host.stream("box", &format!("absent {number}"), StdioStream::Stdout);
    }
    let mut stdout = host.stream("box", "tool", StdioStream::Stdout);
    host.exec("tool", process(&["echo", "here"]));

    assert_eq!(read_until(&mut stdout, "here\n"), "here\n");
}

#[test]
#[ignore = "needs root"]
fn the_streams_of_a_refused_process_are_closed() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    let mut stdout = host.stream("box", "early", StdioStream::Stdout);

    let answer = host.ask(&exec("early", process(&["true"])));

    assert!(matches!(answer, Response::Failed(_)), "{answer:?}");
    assert_eq!(stdout.read(&mut [0]).unwrap(), 0);
}

#[test]
#[ignore = "needs root"]
fn more_terminals_are_open_than_the_agent_was_allowed() {
    let mut host = Host::start();
    let container = host.container(&["sleep", "1000"]);
    host.create(&container);
    host.start_box();
    let names: Vec<String> = (0..40).map(|number| format!("shell {number}")).collect();
    let mut shell = process(&["sh", "-c", "ulimit -n; sleep 1000"]);
    shell.terminal = Some(WindowSize { rows: 24, columns: 80 });

    let mut terminals = Vec::new();
    for name in &names {
        terminals.push(host.stream("box", name, StdioStream::Terminal));
        host.exec(name, shell.clone());
    }

    let output = read_until(&mut terminals[39], "\r\n");
    assert_eq!(output, "1024\r\n");
}

#[test]
#[ignore = "needs root"]
fn a_thousand_long_command_lines_fit_the_answer() {
    let mut host = Host::start();
    let zero = "0".repeat(5000);
    let script = format!("for i in $(seq 1100); do sleep 1000 {zero} & done; echo all; wait");
    let container = host.container(&["sh", "-c", &script]);
    let mut stdout = host.stream("box", INIT_PROCESS, StdioStream::Stdout);
    host.create(&container);
    host.start_box();
    read_until(&mut stdout, "all\n");

    let Response::Processes(found) = host.ask(&Request::Processes { container: "box".into() })
    else {
        panic!("there are processes")
    };

    assert!(found.len() > 1100, "{} processes", found.len());
}

#[test]
#[ignore = "needs root"]
fn a_process_without_a_name_in_utf_8_is_listed() {
    let mut host = Host::start();
    // The kernel takes 15 bytes of the file's name, which cuts the last letter in two.
    let script = host.rootfs().join("bin/öööööööö");
    fs::copy("/bin/busybox", &script).unwrap();
    fs::write(&script, "#!/bin/sh\nwhile :; do sleep 1000; done\n").unwrap();
    let container = host.container(&["öööööööö"]);
    host.create(&container);
    host.start_box();

    let Response::Processes(found) = host.ask(&Request::Processes { container: "box".into() })
    else {
        panic!("there are processes")
    };

    assert!(found.iter().any(|process| process.command.ends_with("öööööööö")), "{found:?}");
}

#[test]
#[ignore = "needs root"]
fn an_answer_that_is_too_large_is_told_as_a_failure() {
    let mut host = Host::start();
    // Each is five bytes long in the answer, which names it.
    let container = "\u{1}".repeat(1 << 20);

    let Response::Failed(failed) = host.ask(&Request::Stats { container }) else {
        panic!("there is no such container")
    };

    assert!(failed.message.starts_with("the answer is too large"), "{}", failed.message);
    assert_eq!(host.ask(&Request::Shutdown), Response::Done);
}

#[test]
#[ignore = "needs root"]
fn the_default_devices_work() {
    let mut host = Host::start();
    let script = "echo x > /dev/null && head -c 3 /dev/zero | wc -c; ls -l /dev/tty /dev/full; \
                  readlink /dev/fd; readlink /dev/ptmx; stat -c %a /dev/random; ls /sys/fs/cgroup/cgroup.procs";

    let (output, _) = shell(&mut host, script);

    assert!(output.starts_with("3\n"), "{output}");
    assert!(output.contains("pts/ptmx\n666\n/sys/fs/cgroup/cgroup.procs\n"), "{output}");
}

#[test]
#[ignore = "needs root"]
fn a_read_only_root_takes_no_writes_but_its_volumes_do() {
    let mut host = Host::start();
    let volume = tempfile::tempdir().unwrap();
    let script = "touch /file || echo refused; touch /volume/file && echo written; \
                  touch /fixed/file || echo refused";
    let mut container = host.container(&["sh", "-c", script]);
    container.rootfs_readonly = true;
    container.mounts.push(bind(volume.path(), "/volume", MsFlags::MS_REC));
    container.mounts.push(bind(volume.path(), "/fixed", MsFlags::MS_REC | MsFlags::MS_RDONLY));

    let (output, _) = host.run(&container);

    assert_eq!(output, "refused\nwritten\nrefused\n");
    assert!(volume.path().join("file").exists());
}

#[test]
#[ignore = "needs root"]
fn a_file_is_bound_through_a_dangling_link() {
    let mut host = Host::start();
    symlink("../run/stub.conf", host.rootfs().join("etc/resolv.conf")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "nameserver\n").unwrap();
    let mut container = host.container(&["cat", "/etc/resolv.conf"]);
    container.mounts.push(bind(file.path(), "/etc/resolv.conf", MsFlags::MS_REC));

    assert_eq!(host.run(&container).0, "nameserver\n");
}

#[test]
#[ignore = "needs root"]
fn masked_and_read_only_paths_are() {
    let mut host = Host::start();
    fs::create_dir(host.rootfs().join("secrets")).unwrap();
    fs::write(host.rootfs().join("secrets/one"), "1").unwrap();
    fs::write(host.rootfs().join("secret"), "2").unwrap();
    let script = "ls /secrets; cat /secret; touch /etc/x || echo fixed; touch /free && echo free; \
                  sysctl -n kernel.domainname; sysctl -w kernel.domainname=a || echo fixed";
    let mut container = host.container(&["sh", "-c", script]);
    container.masked_paths = ["/secrets", "/secret", "/absent"].map(str::to_owned).to_vec();
    container.readonly_paths = ["/etc", "/proc/sys", "/absent"].map(str::to_owned).to_vec();
    container.sysctl = vec![("kernel.domainname".into(), "named".into())];

    assert_eq!(host.run(&container).0, "fixed\nfree\nnamed\nfixed\n");
}

#[test]
#[ignore = "needs root"]
fn a_tmpfs_takes_over_content_and_mode() {
    let mut host = Host::start();
    fs::create_dir(host.rootfs().join("data")).unwrap();
    fs::write(host.rootfs().join("data/file"), "content\n").unwrap();
    let script =
        "cat /data/file; echo gone > /data/file; stat -c %a /data; mount | grep -c ' /data '";
    let mut container = host.container(&["sh", "-c", script]);
    let mut tmpfs = file_system("tmpfs", "/data", MsFlags::MS_NODEV, "size=1m");
    tmpfs.copy_up = true;
    container.mounts.push(tmpfs);

    assert_eq!(host.run(&container).0, "content\n755\n1\n");
    assert_eq!(fs::read_to_string(host.rootfs().join("data/file")).unwrap(), "content\n");
}

#[test]
#[ignore = "needs root"]
fn start_hooks_run_inside_right_before_the_program() {
    let mut host = Host::start();
    let mut container = host.container(&["cat", "/tmp/hook"]);
    let args = ["sh", "-c", "cat > /tmp/hook"].map(str::to_owned).to_vec();
    let env = vec!["PATH=/bin".to_owned()];
    container.start_hooks = vec![Hook { path: "/bin/sh".into(), args, env, timeout_s: Some(10) }];
    container.state = "the state\n".into();
    host.create(&container);
    assert!(!host.rootfs().join("tmp/hook").exists());
    let mut stdout = host.stream("box", INIT_PROCESS, StdioStream::Stdout);
    host.start_box();

    let mut output = String::new();
    stdout.read_to_string(&mut output).unwrap();
    assert_eq!(output, "the state\n");
}

#[test]
#[ignore = "needs root"]
fn a_start_hook_need_not_read_the_state() {
    let mut host = Host::start();
    let mut container = host.container(&["sh", "-c", "yes | head -n 1"]);
    // The first process of a pid namespace does not die of SIGPIPE.
    container.namespaces &= !u64::try_from(libc::CLONE_NEWPID).unwrap();
    let args = vec!["true".to_owned()];
    container.start_hooks =
        vec![Hook { path: "/bin/true".into(), args, env: vec![], timeout_s: None }];
    // More than a pipe holds.
    container.state = "x".repeat(1 << 20);

    let (output, status) = host.run(&container);

    assert_eq!((output.as_str(), status), ("y\n", ExitStatus::Code(0)));
}

#[test]
#[ignore = "needs root"]
fn a_seccomp_filter_is_in_force() {
    // Loads the system call number and answers setpriority(2) with EPERM.
    let number = u32::try_from(libc::SYS_setpriority).unwrap();
    let filter: [(u16, u8, u8, u32); 4] = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, number),
        (0x06, 0, 0, 0x0005_0001),
        (0x06, 0, 0, 0x7fff_0000),
    ];
    let mut host = Host::start();
    let mut container = host.container(&["sh", "-c", "nice true || echo refused"]);
    let bytes = filter.iter().flat_map(|(code, jt, jf, k)| {
        [&code.to_ne_bytes()[..], &[*jt, *jf], &k.to_ne_bytes()[..]].concat()
    });
    let program = bytes.collect();
    container.process.seccomp = Some(agent_protocol::Seccomp { program, flags: 0 });

    assert_eq!(host.run(&container).0, "refused\n");
}

#[test]
#[ignore = "needs root"]
fn orphans_are_reaped() {
    let mut host = Host::start();
    // Without a pid namespace of its own, the agent inherits what the container leaves behind.
    let mut container = host.container(&["sh", "-c", "(sleep 0.2 &) ; sleep 0.5"]);
    container.namespaces &= !(libc::CLONE_NEWPID as u64);
    host.run(&container);

    let container = host.container(&["true"]);
    assert_eq!(host.ask(&Request::RemoveContainer { container: "box".into() }), Response::Done);
    host.create(&container);

    let Response::Processes(found) = host.ask(&Request::Processes { container: "box".into() })
    else {
        panic!("there is a process")
    };
    assert_eq!(found.len(), 1);
}

#[test]
#[ignore = "needs root"]
fn a_failure_to_set_up_leaves_nothing() {
    let mut host = Host::start();
    let mut container = host.container(&["true"]);
    container.cgroup.files = vec![("no.such".into(), "1".into())];
    let cgroup = host.refusal(container);
    let mut container = host.container(&["true"]);
    container.mounts.push(file_system("nosuchfs", "/x", MsFlags::empty(), ""));
    let mount = host.refusal(container);

    assert_eq!(cgroup, "write \"1\" to cgroup file no.such: no such file or directory");
    assert_eq!(mount, "mount nosuchfs (nosuchfs) to /x: no such device");
    assert!(host.cgroup_names().is_empty());
}

#[test]
#[ignore = "needs root"]
fn the_sandbox_gets_its_name_and_loopback_counts() {
    let mut host = Host::start();
    let sandbox = Sandbox { hostname: Some("guest".into()), ..Sandbox::default() };
    assert_eq!(host.ask(&Request::ConfigureSandbox(sandbox)), Response::Done);
    let mut container = host.container(&["sleep", "1000"]);
    container.hostname = None;
    host.create(&container);

    let Response::Stats(stats) = host.ask(&Request::Stats { container: "box".into() }) else {
        panic!("there is a container")
    };

    assert_eq!(stats.interfaces[0].name, "lo");
    assert!(stats.cpu_usage_us > 0);
}

#[test]
#[ignore = "needs root"]
fn shutdown_is_answered_before_the_agent_ends() {
    let mut host = Host::start();

    assert_eq!(host.ask(&Request::Shutdown), Response::Done);
}
