//! OCI hooks that run on the host (config.md, POSIX-platform Hooks).

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::SigSet;
use nix::unistd::chdir;
use oci_spec::runtime::Hook;

use super::namespaces::HostNamespaces;
use super::pidfd::Pidfd;
use crate::logging::chain;
use crate::state::{State, Status};

/// How much of a hook's output an error repeats, in bytes.
const MAX_OUTPUT_BYTES: u64 = 2048;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be run.
    #[error("error running {kind} hook #{index}: run {path}")]
    Run {
        /// Its point in the container's life, as in config.json.
        kind: &'static str,
        /// Its place among those, from 0.
        index: usize,
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It took longer than its `timeout`.
    #[error("error running {kind} hook #{index}: {path} ran past its timeout of {timeout_s} s")]
    TimedOut {
        /// Its point in the container's life.
        kind: &'static str,
        /// Its place among those.
        index: usize,
        /// The program.
        path: PathBuf,
        /// The timeout, in seconds.
        timeout_s: u64,
    },
    /// It said no.
    #[error("error running {kind} hook #{index}: {path}: {status}, output: {output}")]
    Failed {
        /// Its point in the container's life.
        kind: &'static str,
        /// Its place among those.
        index: usize,
        /// The program.
        path: PathBuf,
        /// Exit code or signal.
        status: String,
        /// The beginning of what it printed.
        output: String,
    },
}

/// Runs `hooks` one after the other with the OCI state on stdin and the bundle as working directory,
/// in `namespaces` or, without, in those of this process. The first to fail ends it.
pub(super) fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &State,
    namespaces: Option<&HostNamespaces>,
) -> Result<(), Error> {
    for (index, hook) in hooks.iter().enumerate() {
        let path = hook.path().clone();
        let run = || run_one(hook, state, namespaces);
        let (status, output) =
            run().map_err(|source| Error::Run { kind, index, path: path.clone(), source })?;
        match status {
            Some(status) if status.success() => {}
            Some(status) => {
                let status = describe(status);
                return Err(Error::Failed { kind, index, path, status, output });
            }
            None => {
                let timeout_s = timeout(hook).unwrap_or_default().as_secs();
                return Err(Error::TimedOut { kind, index, path, timeout_s });
            }
        }
    }
    Ok(())
}

/// Runs the hooks of a container's start, whose program runs.
pub(super) fn run_poststart(hooks: &[Hook], state: &State) {
    let running = State { status: Status::Running, ..state.clone() };
    run_each("poststart", hooks, &running, None);
}

/// Runs the hooks of a container's end.
pub(super) fn run_poststop(hooks: &[Hook], state: &State, namespaces: Option<&HostNamespaces>) {
    let stopped = State { status: Status::Stopped, ..state.clone() };
    run_each("poststop", hooks, &stopped, namespaces);
}

/// Runs `hooks` of which one that fails is logged, and the rest goes on (runtime.md, Lifecycle).
fn run_each(
    kind: &'static str,
    hooks: &[Hook],
    state: &State,
    namespaces: Option<&HostNamespaces>,
) {
    for hook in hooks {
        if let Err(error) = run(kind, std::slice::from_ref(hook), state, namespaces) {
            log::warn!("{}", chain(&error));
        }
    }
}

/// Runs one hook; its exit status, or `None` if it was killed for taking too long.
fn run_one(
    hook: &Hook,
    state: &State,
    namespaces: Option<&HostNamespaces>,
) -> io::Result<(Option<ExitStatus>, String)> {
    // A file takes any amount of output without a reader, and stays open in nobody's way if the
    // hook leaves a daemon behind. One of state waits for no reader, whatever its size.
    let mut output = memory_file()?;
    let mut input = memory_file()?;
    input.write_all(state.to_oci_json().as_bytes())?;
    input.rewind()?;
    let mut command = Command::new(hook.path());
    let arguments = hook.args().as_deref().unwrap_or_default();
    if let Some((name, rest)) = arguments.split_first() {
        command.arg0(name).args(rest);
    }
    // Without any it is that of the caller, as in runc and crun.
    if let Some(environment) = hook.env() {
        let variables = environment.iter().filter_map(|variable| variable.split_once('='));
        command.env_clear().envs(variables);
    }
    command.stdin(input).stdout(output.try_clone()?).stderr(output.try_clone()?);
    // SAFETY: setting the signal mask is safe between fork and exec.
    unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) };
    if let Some(host) = namespaces {
        let enter = host.entry()?;
        // SAFETY: `enter` makes only setns system calls, which are safe between fork and exec.
        unsafe { command.pre_exec(enter) };
    }
    let bundle = CString::new(state.bundle.as_os_str().as_bytes())?;
    // After `delete`'s engine has removed the bundle there is nothing to enter.
    let enter_bundle = move || chdir(bundle.as_c_str()).or(Ok(()));
    // SAFETY: chdir is safe between fork and exec, and the path was made before.
    unsafe { command.pre_exec(enter_bundle) };
    let mut child = command.spawn()?;
    let process = Pidfd::open(i32::try_from(child.id()).expect("a pid is a positive int"))?;
    let in_time = process.wait(timeout(hook))?;
    if !in_time {
        process.kill()?;
    }
    let status = child.wait()?;
    let mut bytes = Vec::new();
    output.rewind()?;
    output.take(MAX_OUTPUT_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).trim_end().replace('\n', "; ");
    Ok((in_time.then_some(status), text))
}

fn memory_file() -> io::Result<File> {
    Ok(memfd_create(c"hook", MFdFlags::MFD_CLOEXEC)?.into())
}

fn timeout(hook: &Hook) -> Option<Duration> {
    // config.md: the timeout must be greater than zero; runc takes what is not as no timeout.
    let seconds = u64::try_from(hook.timeout()?).ok().filter(|seconds| *seconds > 0)?;
    Some(Duration::from_secs(seconds))
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit status {}", status.code().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn shell(script: &str, timeout: Option<i64>) -> Vec<Hook> {
        let hook = serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["NAME=value"],
            "timeout": timeout,
        });
        vec![serde_json::from_value(hook).unwrap()]
    }

    fn state() -> State {
        State::of_test(Path::new("/usr"))
    }

    #[test]
    fn a_hook_reads_the_state_and_sees_only_its_environment() {
        let script = r#"grep -q '"id": "box"' && test "$NAME" = value && test -z "$HOME""#;

        run("prestart", &shell(script, None), &state(), None).unwrap();
    }

    #[test]
    fn a_hook_without_environment_has_that_of_the_caller() {
        let path = std::env::var("PATH").unwrap();
        let script = format!("test \"$PATH\" = '{path}' && test -n \"$PATH\"");
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]});

        run("prestart", &[serde_json::from_value(hook).unwrap()], &state(), None).unwrap();
    }

    #[test]
    fn a_hook_starts_in_the_bundle_and_does_not_need_it() {
        let gone = State::of_test(Path::new("/nonexistent/bundle"));

        run("poststop", &shell(r#"test "$(pwd)" = /usr"#, None), &state(), None).unwrap();
        run("poststop", &shell("true", None), &gone, None).unwrap();
    }

    #[test]
    fn a_large_state_that_is_not_read_does_not_stop_the_clock() {
        let mut large = state();
        large.annotations.insert("a".into(), "x".repeat(1 << 20));

        let error = run("prestart", &shell("exec sleep 5", Some(1)), &large, None).unwrap_err();

        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    }

    #[test]
    fn a_hook_that_fails_says_what_it_printed() {
        let error =
            run("prestart", &shell("echo why >&2; exit 3", None), &state(), None).unwrap_err();

        assert_eq!(
            error.to_string(),
            "error running prestart hook #0: /bin/sh: exit status 3, output: why"
        );
    }

    #[test]
    fn a_hook_past_its_timeout_is_killed() {
        let error =
            run("poststop", &shell("exec sleep 1000", Some(1)), &state(), None).unwrap_err();

        assert!(matches!(error, Error::TimedOut { timeout_s: 1, .. }), "{error}");
    }

    #[test]
    fn a_hook_that_does_not_exist_is_named() {
        let hook = serde_json::json!({"path": "/nonexistent/hook"});
        let hooks = [serde_json::from_value(hook).unwrap()];

        let error = run("createRuntime", &hooks, &state(), None).unwrap_err();

        assert!(error.to_string().contains("/nonexistent/hook"), "{error}");
    }

    #[test]
    fn signals_this_process_collects_reach_a_hook() {
        let _signals = super::super::signals::Signals::collect().unwrap();

        let script = "grep -q 'SigBlk:.0000000000000000' /proc/self/status";
        run("prestart", &shell(script, None), &state(), None).unwrap();
    }

    #[test]
    fn a_hook_may_ignore_its_stdin() {
        run("prestart", &shell("exec <&-", None), &state(), None).unwrap();
    }
}
