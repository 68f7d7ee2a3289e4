//! `coracle-vmm --check`: it says all that a start would refuse, and changes nothing.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;

/// What is complained about, a line each, by a program in `folder`; none is a success.
#[track_caller]
fn complaints(folder: &TempDir, arguments: &[&str]) -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"))
        .current_dir(folder.path())
        .arg("--check")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    assert_eq!(output.status.code(), Some(i32::from(!lines.is_empty())), "{text}");
    lines
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_the_arguments_name_is_looked_at() {
    let folder = TempDir::new().unwrap();
    let _listener = UnixListener::bind(folder.path().join("socket")).unwrap();

    let complaints = complaints(
        &folder,
        &[
            "--kernel=kernel",
            "--cgroup=.",
            "--resource-limit=no-file=3",
            "--api-socket=socket",
            "--metrics=nowhere/metrics",
        ],
    );

    let wanted = [
        "coracle-vmm: boot.kernel: open kernel \"kernel\": No such file",
        "coracle-vmm: --cgroup: must be a folder of the cgroup v2 hierarchy",
        "coracle-vmm: --resource-limit: no-file must be 6 to ",
        "coracle-vmm: --api-socket: \"socket\": another process listens there already",
        "coracle-vmm: --metrics: \"nowhere/metrics\": directory \"nowhere\": No such file",
    ];
    assert_eq!(complaints.len(), wanted.len(), "{complaints:#?}");
    for (complaint, wanted) in complaints.iter().zip(wanted) {
        assert!(complaint.starts_with(wanted), "{complaint}");
    }
}

#[test]
fn a_look_makes_nothing_and_waits_for_nobody() {
    let folder = TempDir::new().unwrap();
    mkfifo(&folder.path().join("fifo"), Mode::S_IRWXU).unwrap();
    fs::write(folder.path().join("metrics"), "kept").unwrap();

    let complaints = complaints(
        &folder,
        &[
            "--kernel=fifo",
            "--initrd=fifo",
            "--console-file=fifo",
            "--memory-backing=file=memory",
            "--vsock=cid=3,socket=vsock",
            "--api-socket=api",
            "--metrics=metrics",
            "--disk=id=a,path=fifo,read_only",
            "--pmem=id=a,path=fifo",
        ],
    );

    let fields = complaints.iter().map(|line| line.split(": ").nth(1).unwrap());
    let wanted = ["boot.kernel", "boot.initrd", "disks[0].path", "pmem[0].path"];
    assert_eq!(fields.collect::<Vec<_>>(), wanted, "{complaints:#?}");
    assert_eq!(names(folder.path()), ["fifo", "metrics"]);
    assert_eq!(fs::read_to_string(folder.path().join("metrics")).unwrap(), "kept");
}
