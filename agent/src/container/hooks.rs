//! Programs run inside the container right before its own (config.md, POSIX-platform Hooks,
//! `startContainer`).

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use agent_protocol::{Failed, Hook};

use crate::failure::{Context, failed};

/// How often a hook with a time limit is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Runs the hooks in order; each gets `state` on its stdin, and the first failure ends it.
pub fn run(hooks: &[Hook], state: &str) -> Result<(), Failed> {
    if hooks.is_empty() {
        return Ok(());
    }
    // A hook need not read its state, and this process, which is the container's, must survive that.
    let before = act_on_broken_pipe(libc::SIG_IGN);
    let result = run_all(hooks, state);
    act_on_broken_pipe(before);
    result
}

/// Returns the action before.
fn act_on_broken_pipe(action: libc::sighandler_t) -> libc::sighandler_t {
    // SAFETY: no action here is a handler, so nothing has to be safe to call.
    unsafe { libc::signal(libc::SIGPIPE, action) }
}

fn run_all(hooks: &[Hook], state: &str) -> Result<(), Failed> {
    for (index, hook) in hooks.iter().enumerate() {
        let step = format!("error running startContainer hook #{index}");
        match run_one(hook, state).context(&step)? {
            None => return Err(failed(format!("{step}: timed out"))),
            Some(status) if !status.success() => return Err(failed(format!("{step}: {status}"))),
            Some(_) => {}
        }
    }
    Ok(())
}

/// How the hook ended, or nothing if its time was up.
fn run_one(hook: &Hook, state: &str) -> io::Result<Option<ExitStatus>> {
    let environment = hook.env.iter().filter_map(|entry| entry.split_once('='));
    let mut command = Command::new(&hook.path);
    command.env_clear().envs(environment).stdin(Stdio::piped()).stdout(Stdio::null());
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    let mut child = command.stderr(Stdio::null()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // See `run`.
        let _ = stdin.write_all(state.as_bytes());
    }
    match hook.timeout_s {
        None => child.wait().map(Some),
        Some(seconds) => wait_until(&mut child, Duration::from_secs(seconds.into())),
    }
}

fn wait_until(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        sleep(POLL);
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout_s: Option<u32>) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        Hook { path: "/bin/sh".into(), args, env: vec!["WORD=yes".into()], timeout_s }
    }

    #[test]
    fn a_hook_gets_state_and_environment() {
        let hook = shell("read line; test \"$line\" = state && test \"$WORD\" = yes", Some(10));

        assert_eq!(run(&[hook], "state\n"), Ok(()));
    }

    #[test]
    fn the_first_failure_is_told_with_its_index() {
        let hooks = [shell("true", None), shell("exit 3", None)];

        let failed = run(&hooks, "").unwrap_err();

        assert_eq!(failed.message, "error running startContainer hook #1: exit status: 3");
    }

    #[test]
    fn a_hook_that_takes_too_long_fails() {
        let failed = run(&[shell("sleep 60", Some(0))], "").unwrap_err();

        assert_eq!(failed.message, "error running startContainer hook #0: timed out");
    }
}
