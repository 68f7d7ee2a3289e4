//! The command line as engines and people see it, as far as no virtual machine is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// A folder with a bundle, a state root and a log.
struct Scene {
    folder: TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir_all(scene.bundle().join("rootfs")).unwrap();
        scene
    }

    /// A scene whose bundle has the default configuration, changed.
    fn with_config(change: impl FnOnce(&mut Value)) -> Self {
        let scene = Self::new();
        let mut config: Value =
            serde_json::from_str(include_str!("../src/commands/spec.json")).unwrap();
        config["process"]["terminal"] = false.into();
        change(&mut config);
        fs::write(scene.bundle().join("config.json"), config.to_string()).unwrap();
        scene
    }

    fn bundle(&self) -> PathBuf {
        self.folder.path().join("bundle")
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    fn coracle(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_coracle"))
            .arg("--root")
            .arg(self.root())
            .args(arguments)
            .current_dir(self.bundle())
            .env_remove("CORACLE_CONFIG")
            .output()
            .unwrap()
    }

    /// Exit code and stderr of `create` of this scene's bundle.
    fn create(&self, id: &str) -> (i32, String) {
        failure(&self.coracle(&["create", id]))
    }

    fn is_clean(&self) -> bool {
        fs::read_dir(self.root()).map_or(true, |entries| entries.count() == 0)
    }

    /// Leaves the state of a container whose process is this one.
    fn leave_alive(&self, id: &str, status: &str) {
        self.leave_stopped(id);
        let path = self.root().join(id).join("state.json");
        let mut state: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        state["pid"] = pid.into();
        state["pid_start_time"] = coracle::state::process_start_time(pid).into();
        state["status"] = status.into();
        fs::write(&path, state.to_string()).unwrap();
    }

    /// Leaves the state of a container whose process is gone.
    fn leave_stopped(&self, id: &str) {
        let folder = self.root().join(id);
        fs::create_dir_all(&folder).unwrap();
        let state = serde_json::json!({
            "oci_version": "1.0.2", "id": id, "pid": 1, "pid_start_time": 1,
            "status": "running", "bundle": self.bundle(), "rootfs": self.bundle().join("rootfs"),
            "created": "2026-01-02T03:04:05.678Z", "owner": "", "annotations": {},
            "cgroup_path": null, "systemd_cgroup": false, "netns": null,
        });
        fs::write(folder.join("state.json"), state.to_string()).unwrap();
    }
}

fn failure(output: &Output) -> (i32, String) {
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn last_log_line(path: &Path) -> Value {
    serde_json::from_str(fs::read_to_string(path).unwrap().lines().last().unwrap()).unwrap()
}

#[test]
fn the_version_names_itself_and_the_specification() {
    let text = stdout(&Scene::new().coracle(&["--version"]));

    assert!(text.starts_with("coracle version "), "{text}");
    assert!(text.lines().nth(1).unwrap().starts_with("spec: 1."), "{text}");
}

#[test]
fn an_error_without_a_log_is_one_line_of_logrus_on_stderr() {
    let (code, text) = failure(&Scene::new().coracle(&["state", "nosuch"]));

    assert_eq!(code, 1);
    assert!(text.starts_with("time=\""), "{text}");
    assert!(text.ends_with(" level=error msg=\"container does not exist\"\n"), "{text}");
}

#[test]
fn an_error_with_a_json_log_is_its_last_line_and_bare_on_stderr() {
    let scene = Scene::new();
    let log = scene.folder.path().join("log.json");
    let log_path = log.to_str().unwrap();

    let output = scene.coracle(&["--log", log_path, "--log-format", "json", "state", "nosuch"]);

    assert_eq!(failure(&output), (1, "container does not exist\n".into()));
    let line = last_log_line(&log);
    assert_eq!(
        (&line["level"], &line["msg"]),
        (&"error".into(), &"container does not exist".into())
    );
    assert!(line["time"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn an_unknown_log_format_is_refused() {
    let (code, text) = failure(&Scene::new().coracle(&["--log-format", "xml", "list"]));

    assert_eq!(code, 1);
    assert!(text.contains("invalid log-format: xml"), "{text}");
}

#[test]
fn an_unknown_option_fails_with_code_1() {
    assert_eq!(failure(&Scene::new().coracle(&["create", "--nosuch", "box"])).0, 1);
}

#[test]
fn an_error_of_usage_is_told_to_the_log_an_engine_reads() {
    let scene = Scene::new();
    let log = scene.folder.path().join("log.json");
    let log_path = log.to_str().unwrap();

    for (arguments, message) in [
        (&["create", "--nosuch", "box"][..], "unexpected argument '--nosuch' found"),
        (&["state"], "required arguments were not provided: <CONTAINER-ID>"),
        (&["nosuch"], "unrecognized subcommand 'nosuch'"),
    ] {
        let mut line = vec!["--log", log_path, "--log-format", "json"];
        line.extend(arguments);

        assert_eq!(scene.coracle(&line).status.code(), Some(1));
        let logged = last_log_line(&log);
        assert!(logged["msg"].as_str().unwrap().contains(message), "{logged}");
    }
}

#[test]
fn of_an_option_given_twice_the_last_counts() {
    let scene = Scene::new();
    let log = scene.folder.path().join("log.json");

    let output = scene.coracle(&[
        "--log-format",
        "text",
        "--log",
        "/dev/null",
        "--log-format",
        "json",
        "--log",
        log.to_str().unwrap(),
        "create",
        "--bundle",
        "/nonexistent/one",
        "--bundle",
        "/nonexistent/two",
        "box",
    ]);

    assert_eq!(output.status.code(), Some(1));
    assert!(last_log_line(&log)["msg"].as_str().unwrap().contains("/nonexistent/two"));
}

#[test]
fn a_result_that_cannot_be_printed_is_an_error_and_no_panic() {
    let scene = Scene::new();
    scene.leave_stopped("box");

    for arguments in [&["list"][..], &["state", "box"], &["features"], &["--version"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_coracle"))
            .arg("--root")
            .arg(scene.root())
            .args(arguments)
            .stdout(fs::File::create("/dev/full").unwrap())
            .output()
            .unwrap();

        assert_eq!(output.status.code(), Some(1), "{arguments:?} {output:?}");
    }
}

#[test]
fn an_error_that_cannot_be_printed_has_the_same_exit_code() {
    let status = Command::new(env!("CARGO_BIN_EXE_coracle"))
        .args(["state", "nosuch"])
        .stderr(fs::File::create("/dev/full").unwrap())
        .status()
        .unwrap();

    assert_eq!(status.code(), Some(1));
}

#[test]
fn spec_writes_a_bundle_that_create_reads() {
    let scene = Scene::new();

    stdout(&scene.coracle(&["spec"]));
    let (_, text) = scene.create("box");

    assert!(text.contains("cannot allocate tty if coracle will detach"), "{text}");
}

#[test]
fn spec_does_not_overwrite() {
    let scene = Scene::with_config(|_| {});

    let (code, text) = failure(&scene.coracle(&["spec"]));

    assert_eq!(code, 1);
    assert!(text.contains("config.json exists. Remove it first"), "{text}");
}

#[test]
fn a_bundle_without_configuration_is_refused_and_leaves_nothing() {
    let scene = Scene::new();

    let (code, text) = scene.create("box");

    assert_eq!(code, 1);
    assert!(
        text.contains("coracle create failed: JSON specification file config.json not found"),
        "{text}"
    );
    assert!(scene.is_clean());
}

#[test]
fn broken_json_is_located_and_leaves_nothing() {
    let scene = Scene::new();
    fs::write(scene.bundle().join("config.json"), "{\n  \"ociVersion\": ,\n}").unwrap();

    let (code, text) = scene.create("box");

    assert_eq!(code, 1);
    assert!(text.contains("config.json is not a valid OCI configuration"), "{text}");
    assert!(text.contains("at line 2 column 17"), "{text}");
    assert!(scene.is_clean());
}

#[test]
fn an_unknown_field_is_refused_by_name() {
    let scene = Scene::with_config(|config| config["linux"]["resources"]["memori"] = 1.into());

    let (code, text) = scene.create("box");

    assert_eq!(code, 1);
    assert!(text.contains("unknown field linux.resources.memori"), "{text}");
}

#[test]
fn a_missing_root_file_system_is_named() {
    let scene = Scene::with_config(|config| config["root"]["path"] = "nope".into());

    let (code, text) = scene.create("box");

    assert_eq!(code, 1);
    assert!(text.contains("root.path in config.json must name a folder that exists"), "{text}");
    assert!(text.contains("/nope: No such file or directory"), "{text}");
}

#[test]
fn an_id_cannot_leave_the_root() {
    let scene = Scene::with_config(|_| {});

    for id in ["../box", "a/b", ".", ".."] {
        let (code, text) = scene.create(id);

        assert_eq!(code, 1);
        assert!(text.contains("invalid container ID format"), "{text}");
    }
}

#[test]
fn an_id_is_used_once() {
    let scene = Scene::with_config(|_| {});
    scene.leave_stopped("box");

    let (code, text) = scene.create("box");

    assert_eq!(code, 1);
    assert!(text.contains("container with given ID already exists"), "{text}");
}

#[test]
fn a_console_socket_needs_a_terminal() {
    let scene = Scene::with_config(|_| {});

    let (_, text) = failure(&scene.coracle(&["create", "--console-socket", "/x", "box"]));

    assert!(text.contains("cannot use console socket if"), "{text}");
}

#[test]
fn a_misspelt_annotation_is_refused() {
    let scene = Scene::with_config(|config| {
        config["annotations"] = serde_json::json!({"io.coracle.cpu": "1"});
    });

    let (_, text) = scene.create("box");

    assert!(text.contains("unknown annotation io.coracle.cpu"), "{text}");
}

#[test]
fn a_settings_file_that_is_named_must_exist() {
    let scene = Scene::with_config(|_| {});

    let output = Command::new(env!("CARGO_BIN_EXE_coracle"))
        .args(["create", "box"])
        .current_dir(scene.bundle())
        .env("CORACLE_CONFIG", "/nonexistent/config.json")
        .output()
        .unwrap();

    let (code, text) = failure(&output);
    assert_eq!(code, 1);
    assert!(text.contains("settings file /nonexistent/config.json does not exist"), "{text}");
}

#[test]
fn verbs_on_a_container_that_does_not_exist_say_so() {
    let scene = Scene::new();

    for verb in ["start", "state", "kill", "delete", "ps", "pause", "resume", "events", "update"] {
        let (code, text) = failure(&scene.coracle(&[verb, "nosuch"]));

        assert_eq!(code, 1, "{verb}");
        assert!(text.contains("container does not exist"), "{verb}: {text}");
    }
}

#[test]
fn exec_that_fails_has_code_255() {
    let (code, text) = failure(&Scene::new().coracle(&["exec", "nosuch", "ls"]));

    assert_eq!(code, 255);
    assert!(text.contains("exec failed: container does not exist"), "{text}");
}

#[test]
fn exec_in_a_paused_container_says_what_to_do() {
    let scene = Scene::with_config(|_| {});
    scene.leave_alive("box", "paused");

    let (code, text) = failure(&scene.coracle(&["exec", "box", "ls"]));

    assert_eq!(code, 255);
    assert!(text.contains("paused container (use --ignore-paused to override)"), "{text}");
}

#[test]
fn a_stopped_container_is_told_from_a_running_one() {
    let scene = Scene::with_config(|_| {});
    scene.leave_stopped("box");
    let message = |arguments: &[&str]| failure(&scene.coracle(arguments)).1;

    let state: Value = serde_json::from_str(&stdout(&scene.coracle(&["state", "box"]))).unwrap();
    assert_eq!((&state["status"], &state["pid"]), (&"stopped".into(), &0.into()));
    assert!(message(&["start", "box"]).contains("cannot start a container that has stopped"));
    assert!(message(&["kill", "box"]).contains("container not running"));
    assert!(message(&["pause", "box"]).contains("container not running"));
    assert!(message(&["resume", "box"]).contains("container not paused"));
    assert!(message(&["exec", "box", "ls"]).contains("cannot exec in a stopped container"));
    stdout(&scene.coracle(&["kill", "--all", "box", "9"]));
}

#[test]
fn an_unknown_signal_is_refused_in_the_words_of_runc() {
    let scene = Scene::new();
    scene.leave_stopped("box");

    let (code, text) = failure(&scene.coracle(&["kill", "box", "FOO"]));

    assert_eq!(code, 1);
    assert!(text.contains(r#"msg="unknown signal \"FOO\"""#), "{text}");
}

#[test]
fn signal_0_asks_whether_the_container_runs() {
    let scene = Scene::new();
    scene.leave_stopped("gone");
    scene.leave_alive("here", "running");

    let (code, text) = failure(&scene.coracle(&["kill", "gone", "0"]));

    assert_eq!(code, 1);
    assert!(text.contains("container not running"), "{text}");
    stdout(&scene.coracle(&["kill", "here", "0"]));
}

#[test]
fn a_missing_container_is_told_before_an_unknown_signal() {
    let (_, text) = failure(&Scene::new().coracle(&["kill", "nosuch", "FOO"]));

    assert!(text.contains("container does not exist"), "{text}");
}

#[test]
fn deleting_by_force_succeeds_without_a_container() {
    stdout(&Scene::new().coracle(&["delete", "--force", "nosuch"]));
}

#[test]
fn a_damaged_state_can_be_deleted_by_force() {
    let scene = Scene::new();
    fs::create_dir_all(scene.root().join("box")).unwrap();
    fs::write(scene.root().join("box/state.json"), "{").unwrap();

    let (code, text) = failure(&scene.coracle(&["delete", "box"]));
    assert_eq!(code, 1);
    assert!(text.contains("is damaged"), "{text}");

    stdout(&scene.coracle(&["delete", "--force", "box"]));
    assert!(scene.is_clean());
}

#[test]
fn the_list_of_no_containers_has_its_heading() {
    let scene = Scene::new();

    let heading = "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n";
    assert_eq!(stdout(&scene.coracle(&["list"])), heading);
    assert_eq!(stdout(&scene.coracle(&["list", "-f", "json"])), "[]\n");
    assert_eq!(stdout(&scene.coracle(&["list", "-q"])), "");
}

#[test]
fn a_container_is_listed_with_its_status() {
    let scene = Scene::new();
    scene.leave_stopped("box");

    assert_eq!(stdout(&scene.coracle(&["list", "--quiet"])), "box\n");
    let list: Value =
        serde_json::from_str(&stdout(&scene.coracle(&["list", "--format", "json"]))).unwrap();
    assert_eq!((&list[0]["id"], &list[0]["status"]), (&"box".into(), &"stopped".into()));
}

#[test]
fn features_are_json_of_the_specification() {
    let features: Value =
        serde_json::from_str(&stdout(&Scene::new().coracle(&["features"]))).unwrap();

    assert_eq!(features["ociVersionMin"], "1.0.0");
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
}

#[test]
fn check_names_what_is_missing_and_what_to_do() {
    let scene = Scene::new();
    let settings = scene.folder.path().join("settings.json");
    fs::write(&settings, r#"{"kernel": "/nonexistent/kernel"}"#).unwrap();

    let output = Command::new(env!("CARGO_BIN_EXE_coracle"))
        .arg("check")
        .env("CORACLE_CONFIG", &settings)
        .output()
        .unwrap();

    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("FAIL  guest kernel: open /nonexistent/kernel"), "{text}");
    assert!(text.contains("build the guest image with coracle-image"), "{text}");
    assert!(text.ends_with("This host cannot run containers.\n"), "{text}");
}

#[test]
fn check_does_not_take_a_file_for_a_kernel() {
    let scene = Scene::new();
    let settings = scene.folder.path().join("settings.json");
    fs::write(&settings, format!(r#"{{"kernel": {0:?}, "initrd": {0:?}}}"#, settings)).unwrap();

    let output = Command::new(env!("CARGO_BIN_EXE_coracle"))
        .arg("check")
        .env("CORACLE_CONFIG", &settings)
        .output()
        .unwrap();

    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("FAIL  "), "{text}");
    assert!(text.ends_with("This host cannot run containers.\n"), "{text}");
}

/// A hook that runs `script` with the shell.
fn hook(script: &str) -> Value {
    serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]})
}

#[test]
#[ignore = "needs root"]
fn a_create_that_fails_leaves_nothing_and_runs_the_poststop_hooks() {
    let marks = tempfile::tempdir().unwrap();
    let mark = marks.path().join("stopped");
    let scene = Scene::with_config(|config| {
        config["linux"]["cgroupsPath"] = "/coracle-cli-test".into();
        config["hooks"] = serde_json::json!({
            "createRuntime": [hook("exit 7")],
            "poststop": [hook("exit 1"), hook(&format!("cat > {}", mark.display()))],
        });
    });

    let (code, text) = scene.create("box");

    assert_eq!(code, 1);
    assert!(text.contains("error running createRuntime hook #0: /bin/sh: exit status 7"), "{text}");
    assert!(scene.is_clean());
    assert!(!Path::new("/sys/fs/cgroup/coracle-cli-test").exists());
    assert!(!Path::new("/sys/fs/cgroup/memory/coracle-cli-test").exists());
    let state: Value = serde_json::from_str(&fs::read_to_string(mark).unwrap()).unwrap();
    assert_eq!((&state["status"], &state["id"]), (&"stopped".into(), &"box".into()));
}

#[test]
#[ignore = "needs root"]
fn a_sandbox_process_keeps_no_folder_busy_and_hooks_start_in_the_bundle() {
    let marks = tempfile::tempdir().unwrap();
    let mark = marks.path().join("folders");
    // By identity and not by name: a root that is none of the mount namespace has another name.
    let at_root = "test /proc/$PPID/cwd -ef /proc/$PPID/root && echo at root";
    let script = format!("echo $(pwd) $({at_root}) > {}; exit 7", mark.display());
    let scene = Scene::with_config(|config| {
        config["hooks"] = serde_json::json!({"createRuntime": [hook(&script)]});
    });

    assert_eq!(scene.create("box").0, 1);

    let folders = fs::read_to_string(mark).unwrap();
    assert_eq!(folders, format!("{} at root\n", scene.bundle().display()));
}

#[test]
#[ignore = "needs root"]
fn a_sandbox_process_killed_by_a_hook_leaves_nothing_and_runs_the_poststop_hooks() {
    let marks = tempfile::tempdir().unwrap();
    let mark = marks.path().join("stopped");
    let scene = Scene::with_config(|config| {
        config["linux"]["cgroupsPath"] = "/coracle-cli-killed".into();
        config["hooks"] = serde_json::json!({
            "createRuntime": [hook("kill -KILL $PPID")],
            "poststop": [hook(&format!("cat > {}", mark.display()))],
        });
    });

    let (code, text) = scene.create("box");

    assert_eq!(code, 1);
    assert!(text.contains("sandbox-process process ended (signal 9)"), "{text}");
    assert!(scene.is_clean());
    assert!(!Path::new("/sys/fs/cgroup/memory/coracle-cli-killed").exists());
    assert!(mark.exists());
}
