//! Every bad input gets an error that names cause and remedy, on stderr and in the log, and leaves
//! nothing behind.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{Bundle, Container, Outcome, coracle, run, shell};

use crate::{assert_nothing_left, eventually};

/// Runs a bundle that must fail and gives back the error of the JSON log.
fn refused(bundle: &Path, id: &str, environment: &[(&str, &str)]) -> String {
    let log = TempDir::new().unwrap();
    let log = log.path().join("log.json");
    let mut args: Vec<String> =
        environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
    for part in [
        "coracle",
        "--log-format",
        "json",
        "--log",
        log.to_str().unwrap(),
        "run",
        "-b",
        bundle.to_str().unwrap(),
        id,
    ] {
        args.push(part.to_owned());
    }
    let outcome = run("env", &args, b"");
    assert_eq!(outcome.code, 1, "{outcome:?}");
    error_of(&log, &outcome)
}

fn error_of(log: &Path, outcome: &Outcome) -> String {
    let lines = fs::read_to_string(log).unwrap();
    let last: Value = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .rfind(|line| line["level"] == "error")
        .unwrap_or_else(|| panic!("no error in the log: {lines} {outcome:?}"));
    let message = last["msg"].as_str().unwrap().to_owned();
    assert!(last["time"].is_string());
    assert!(outcome.stderr.contains(message.lines().next().unwrap()), "{outcome:?} {message}");
    message
}

#[track_caller]
fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not name {part:?}");
    }
}

/// A settings file and its folder.
fn settings(change: impl FnOnce(&mut Value)) -> (TempDir, String) {
    let directory = TempDir::new().unwrap();
    let mut value = json!({});
    change(&mut value);
    let path = directory.path().join("config.json");
    fs::write(&path, value.to_string()).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (directory, path)
}

#[test]
fn a_missing_config_json() {
    let bundle = TempDir::new().unwrap();

    let message = refused(bundle.path(), "t-bad", &[]);

    assert_names(&message, &["config.json"]);
    assert_nothing_left();
}

#[test]
fn a_broken_config_json() {
    let bundle = Bundle::new(&["true"]);
    fs::write(bundle.config(), "{ \"ociVersion\": ").unwrap();

    let message = refused(bundle.path(), "t-bad", &[]);

    assert_names(&message, &["config.json", "line 1"]);
    assert_nothing_left();
}

#[test]
fn an_unknown_field() {
    let bundle = Bundle::new(&["true"]);
    bundle.edit(|config| config["process"]["argz"] = json!(["true"]));

    let message = refused(bundle.path(), "t-bad", &[]);

    assert_names(&message, &["process.argz"]);
    assert_nothing_left();
}

#[test]
fn a_rootfs_that_does_not_exist() {
    let bundle = Bundle::new(&["true"]);
    bundle.edit(|config| config["root"]["path"] = json!("/no/such/rootfs"));

    let message = refused(bundle.path(), "t-bad", &[]);

    assert_names(&message, &["/no/such/rootfs"]);
    assert_nothing_left();
}

#[test]
fn an_id_in_use_and_an_id_with_a_slash() {
    let first = Container::running("t-twice", &["sleep", "1000"]);
    let bundle = Bundle::new(&["true"]);

    let twice = refused(bundle.path(), "t-twice", &[]);
    let slash = refused(bundle.path(), "a/b", &[]);
    let state = coracle(&["state", "t-twice"]);

    assert_names(&twice, &["t-twice", "already exists"]);
    assert_names(&slash, &["a/b", "id"]);
    assert!(state.text().contains("running"), "the first container lives on");
    drop(first);
    assert_nothing_left();
}

#[test]
fn a_kernel_that_is_not_a_kernel() {
    let bundle = Bundle::new(&["true"]);
    let (_directory, path) = settings(|value| value["kernel"] = json!("/etc/passwd"));

    let message = refused(bundle.path(), "t-bad", &[("CORACLE_CONFIG", &path)]);

    assert_names(&message, &["/etc/passwd", "not a kernel"]);
    assert_nothing_left();
}

#[test]
fn kvm_missing_or_forbidden() {
    let bundle = Bundle::new(&["true"]);
    let path = bundle.path().to_str().unwrap();
    let log = bundle.path().join("log");
    let coracle = format!("coracle --log-format json --log {} run -b {path} t-bad", log.display());

    // An empty /dev/kvm is one no ioctl works on; one that is not there cannot be opened at all.
    let missing = shell(&format!(
        "unshare -m sh -c 'mv /dev/kvm /dev/kvm.away; {coracle}'; \
                                  status=$?; mv /dev/kvm.away /dev/kvm; exit $status"
    ));
    let missing_message = error_of(&log, &missing);
    // Root may open anything, unless the device cgroup or a mount forbids it.
    let forbidden = shell(&format!(
        "unshare -m sh -c 'mount -t tmpfs -o nodev t /mnt; \
                                    mknod /mnt/kvm c 10 232; mount --bind /mnt/kvm /dev/kvm; {coracle}'"
    ));
    let forbidden_message = error_of(&log, &forbidden);
    let check = shell(
        "mv /dev/kvm /dev/kvm.away; coracle check; status=$?; mv /dev/kvm.away /dev/kvm; \
                       exit $status",
    );

    assert_names(&missing_message, &["/dev/kvm", "kvm"]);
    assert_names(&forbidden_message, &["/dev/kvm", "ermission"]);
    assert_eq!(check.code, 1);
    assert!(check.stdout.contains("/dev/kvm") || check.stderr.contains("/dev/kvm"), "{check:?}");
    assert_nothing_left();
}

#[test]
fn a_full_disk_under_the_state_folder() {
    let bundle = Bundle::new(&["true"]);
    let path = bundle.path().to_str().unwrap();
    let log = bundle.path().join("log");

    let outcome = shell(&format!(
        "mkdir -p /tmp/full && mount -t tmpfs -o size=4k tmpfs /tmp/full && head -c 4096 /dev/zero > /tmp/full/x; \
         coracle --root /tmp/full --log-format json --log {} run -b {path} t-full; status=$?; \
         ls /tmp/full; umount /tmp/full; exit $status",
        log.display()
    ));

    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert_names(&error_of(&log, &outcome), &["/tmp/full", "No space left on device"]);
    assert_eq!(outcome.stdout, "x\n", "no state folder is left");
    assert_nothing_left();
}

#[test]
fn a_guest_that_never_answers() {
    let bundle = Bundle::new(&["true"]);
    // The modules of the guest's own initrd, if it has any: the console may be one. The kernel takes
    // archives one after the other, each at a multiple of four bytes.
    let script = "cd $(mktemp -d) && mkdir bin && cp /bin/busybox bin/ && \
                  printf '#!/bin/busybox sh\\nalias b=/bin/busybox\\nb mkdir /dev; b mount -t devtmpfs dev /dev\\n\
                  [ ! -e /modules/order ] || while read m; do b insmod /modules/$m; done < /modules/order\\n\
                  echo last words > /dev/console\\nexec /bin/busybox sleep 1000\\n' > init && chmod +x init && \
                  cp /var/lib/coracle/guest/initrd /tmp/silent.cpio && truncate -s %4 /tmp/silent.cpio && \
                  find . | cpio -o -H newc --quiet >> /tmp/silent.cpio";
    assert_eq!(shell(script).code, 0);
    let (_directory, path) = settings(|value| {
        value["initrd"] = json!("/tmp/silent.cpio");
        value["boot_timeout_s"] = json!(20);
    });

    let message = refused(bundle.path(), "t-bad", &[("CORACLE_CONFIG", &path)]);

    assert_names(&message, &["20 s", "last words"]);
    assert_nothing_left();
}

#[test]
fn a_sandbox_process_that_is_killed() {
    let container = Container::running("t-killed", &["sleep", "1000"]);

    shell(&format!("kill -9 {}", container.pid()));

    eventually("the stopped state", || {
        coracle(&["state", "t-killed"]).stdout.contains("stopped").then_some(())
    });
    let exec = coracle(&["exec", "t-killed", "true"]);
    assert_ne!(exec.code, 0);
    assert!(exec.stderr.contains("stopped") || exec.stderr.contains("not running"), "{exec:?}");
    assert_eq!(coracle(&["delete", "t-killed"]).code, 0);
    drop(container);
    assert_nothing_left();
}

#[test]
fn a_command_that_does_not_exist_or_is_no_program() {
    let bundle = Bundle::new(&["nosuchprogram"]);
    let missing = refused(bundle.path(), "t-bad", &[]);
    let bundle = Bundle::new(&["/etc/passwd"]);
    let not_executable = refused(bundle.path(), "t-bad", &[]);

    assert_names(&missing, &[r#"exec: "nosuchprogram": executable file not found in $PATH"#]);
    assert_names(&not_executable, &[r#"exec: "/etc/passwd": permission denied"#]);
    assert_nothing_left();
}
