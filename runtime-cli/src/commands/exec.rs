//! `exec`: one more process in a container.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use coracle::bundle::{self, Bundle};
use coracle::limits;
use coracle::sandbox::{self, ExecOptions, ExecOutcome};
use coracle::state::{State, Status};
use coracle::translate;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, Process};

use super::{Failure, Globals};

/// Exit code when the process could not be started, as runc's.
const EXEC_FAILURE: u8 = 255;

#[derive(clap::Args)]
pub struct Args {
    /// Unix socket that receives the master end of the process's terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, short = 'w', value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Environment variable NAME=VALUE
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Allocate a pseudo-terminal
    #[arg(long, short = 't')]
    tty: bool,
    /// UID[:GID]
    #[arg(long, short = 'u', value_name = "UID[:GID]")]
    user: Option<String>,
    /// Additional groups
    #[arg(long, short = 'g', value_name = "GID")]
    additional_gids: Vec<u32>,
    /// File with an OCI process object
    #[arg(long, short = 'p', value_name = "FILE")]
    process: Option<PathBuf>,
    /// Do not wait for the process to end
    #[arg(long, short = 'd')]
    detach: bool,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Accepted as runc has it; the guest's kernel has no such policy
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Accepted as runc has it; the guest's kernel has no such policy
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Never gain privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Capability to add
    #[arg(long, short = 'c', value_name = "CAPABILITY")]
    cap: Vec<String>,
    /// File descriptors to pass besides stdio; not possible across a machine border
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Sub-cgroup for the process; only the container's own, /, is supported
    #[arg(long, value_name = "[CONTROLLER:]CGROUP")]
    cgroup: Vec<String>,
    /// Allow this in a paused container
    #[arg(long)]
    ignore_paused: bool,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Returns the exit code of the process, or 0 if it goes on without us.
pub fn run(globals: &Globals, args: &Args) -> Result<u8, Failure> {
    exec(globals, args)
        .context("exec failed")
        .map_err(|error| Failure { error, code: EXEC_FAILURE })
}

fn exec(globals: &Globals, args: &Args) -> anyhow::Result<u8> {
    let (dir, state) = globals.container(&args.id)?;
    check(args, &state)?;
    let bundle = Bundle::load(&state.bundle)?;
    let process = match &args.process {
        Some(path) => with_defaults(bundle::load_process(path)?, &bundle),
        None => from_flags(args, &bundle)?,
    };
    let terminal = process.terminal().unwrap_or(false);
    bundle::check_console(terminal, args.detach, args.console_socket.is_some())?;
    let seccomp = bundle.spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let options = ExecOptions {
        name: unique_name(),
        process: with_limits(translate::process(&process, seccomp)?),
        console_socket: args.console_socket.clone(),
        pid_file: args.pid_file.clone(),
        detach: args.detach,
        log: globals.log.clone(),
    };
    match sandbox::exec(&dir, &options).context("unable to start container process")? {
        ExecOutcome::Exited(code) => Ok(u8::try_from(code).unwrap_or(u8::MAX)),
        ExecOutcome::Detached(_) => Ok(0),
    }
}

fn check(args: &Args, state: &State) -> anyhow::Result<()> {
    match state.status {
        Status::Stopped => bail!("cannot exec in a stopped container"),
        Status::Paused if !args.ignore_paused => {
            bail!("cannot exec in a paused container (use --ignore-paused to override)")
        }
        Status::Creating => bail!("cannot exec in a container in the creating state"),
        _ => {}
    }
    let own_cgroup = |cgroup: &String| cgroup.rsplit(':').next() == Some("/");
    ensure!(
        args.cgroup.iter().all(own_cgroup),
        "--cgroup names a sub-cgroup: leave it out, processes of a virtual machine share the \
         container's cgroup"
    );
    if args.preserve_fds > 0 {
        log::warn!("--preserve-fds has no effect in a virtual machine");
    }
    Ok(())
}

fn with_limits(mut process: agent_protocol::Process) -> agent_protocol::Process {
    limits::inherit(&mut process);
    process
}

/// A process object, with what it leaves out as the container's own process has it, as in runc: one
/// without capabilities is no process without any.
fn with_defaults(mut process: Process, bundle: &Bundle) -> Process {
    let Some(own) = bundle.spec.process() else { return process };
    if process.capabilities().is_none() {
        process.set_capabilities(own.capabilities().clone());
    }
    if process.rlimits().iter().flatten().next().is_none() {
        process.set_rlimits(own.rlimits().clone());
    }
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(own.oom_score_adj());
    }
    process
}

/// The container's own process with what the flags change.
fn from_flags(args: &Args, bundle: &Bundle) -> anyhow::Result<Process> {
    ensure!(!args.command.is_empty(), "process args cannot be empty");
    let mut process =
        bundle.spec.process().clone().context("process property must not be empty")?;
    process.set_args(Some(args.command.clone()));
    process.set_terminal(Some(args.tty));
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().cloned());
    process.set_env(Some(env));
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(user) = &args.user {
        let (uid, gid) = parse_user(user)?;
        process.user_mut().set_uid(uid);
        if let Some(gid) = gid {
            process.user_mut().set_gid(gid);
        }
    }
    if !args.additional_gids.is_empty() {
        let mut gids = process.user().additional_gids().clone().unwrap_or_default();
        gids.extend(&args.additional_gids);
        process.user_mut().set_additional_gids(Some(gids));
    }
    if !args.cap.is_empty() {
        let capabilities = with_capabilities(process.capabilities().as_ref(), &args.cap)?;
        process.set_capabilities(Some(capabilities));
    }
    Ok(process)
}

fn parse_user(text: &str) -> anyhow::Result<(u32, Option<u32>)> {
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (uid, Some(gid)),
        None => (text, None),
    };
    let number = |part: &str| {
        part.parse().with_context(|| format!("--user {text:?}: use numbers, as in 1000:1000"))
    };
    Ok((number(uid)?, gid.map(number).transpose()?))
}

/// Adds capabilities to every set but the inheritable one, as runc does.
fn with_capabilities(
    sets: Option<&LinuxCapabilities>,
    names: &[String],
) -> anyhow::Result<LinuxCapabilities> {
    let mut added = Capabilities::new();
    for name in names {
        // The specification's type takes a name in any case, with or without CAP_.
        let capability: Capability = serde_json::from_value(name.as_str().into())
            .with_context(|| format!("--cap {name:?} is no capability"))?;
        added.insert(capability);
    }
    let with = |set: Option<&Capabilities>| {
        let mut set = set.cloned().unwrap_or_default();
        set.extend(added.iter().copied());
        Some(set)
    };
    let mut result = sets.cloned().unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        none.set_inheritable(None).set_bounding(None).set_effective(None);
        none.set_permitted(None).set_ambient(None);
        none
    });
    let (bounding, effective) =
        (with(result.bounding().as_ref()), with(result.effective().as_ref()));
    let (permitted, ambient) = (with(result.permitted().as_ref()), with(result.ambient().as_ref()));
    result.set_bounding(bounding).set_effective(effective);
    result.set_permitted(permitted).set_ambient(ambient);
    Ok(result)
}

/// A name that no other process of the container has: pids are reused, but not within a
/// nanosecond.
fn unique_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("exec-{}-{}", std::process::id(), now.as_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn bundle() -> Bundle {
        let spec = serde_json::from_str(include_str!("spec.json")).unwrap();
        Bundle { path: "/b".into(), rootfs: "/b/rootfs".into(), spec }
    }

    fn process(line: &[&str]) -> anyhow::Result<Process> {
        let words = ["exec"].iter().chain(line);
        let line = <Line as clap::Parser>::try_parse_from(words).unwrap();
        from_flags(&line.args, &bundle())
    }

    fn described(text: &str) -> Process {
        with_defaults(serde_json::from_str(text).unwrap(), &bundle())
    }

    #[test]
    fn what_a_process_object_leaves_out_is_as_in_the_container() {
        let process = described(r#"{"user":{"uid":1,"gid":1},"args":["sh"],"cwd":"/"}"#);

        let own = bundle().spec.process().clone().unwrap();
        assert!(own.capabilities().is_some() && own.rlimits().is_some());
        assert_eq!(process.capabilities(), own.capabilities());
        assert_eq!(process.rlimits(), own.rlimits());
        assert_eq!((process.no_new_privileges(), process.user().uid()), (None, 1));
    }

    #[test]
    fn what_a_process_object_says_counts() {
        let process = described(
            r#"{"user":{"uid":1,"gid":1},"args":["sh"],"cwd":"/","capabilities":{},
                "rlimits":[{"type":"RLIMIT_CPU","soft":1,"hard":2}],"oomScoreAdj":5}"#,
        );

        assert!(process.capabilities().as_ref().unwrap().bounding().is_none());
        assert_eq!(process.rlimits().as_ref().unwrap().len(), 1);
        assert_eq!(process.oom_score_adj(), Some(5));
    }

    #[test]
    fn the_container_s_process_is_what_flags_start_from() {
        let process = process(&["box", "ls", "-l"]).unwrap();

        assert_eq!(process.args().as_deref().unwrap(), ["ls", "-l"]);
        assert_eq!(process.terminal(), Some(false));
        assert!(process.env().as_ref().unwrap().contains(&"TERM=xterm".to_string()));
    }

    #[test]
    fn flags_change_the_process() {
        let process = process(&[
            "-t",
            "-u",
            "7:8",
            "-g",
            "9",
            "--cwd",
            "/tmp",
            "-e",
            "A=b",
            "-c",
            "CAP_SYS_TIME",
            "box",
            "sh",
        ])
        .unwrap();

        assert_eq!(process.terminal(), Some(true));
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.user().additional_gids().as_deref(), Some(&[9][..]));
        assert_eq!(process.cwd().to_str(), Some("/tmp"));
        assert_eq!(process.env().as_ref().unwrap().last().unwrap(), "A=b");
        let sets = process.capabilities().as_ref().unwrap();
        assert!(sets.effective().as_ref().unwrap().contains(&Capability::SysTime));
        assert!(sets.inheritable().is_none());
    }

    #[test]
    fn a_program_is_needed() {
        let error = process(&["box"]).unwrap_err();

        assert_eq!(error.to_string(), "process args cannot be empty");
    }

    #[test]
    fn users_are_numbers() {
        assert_eq!(parse_user("7").unwrap(), (7, None));
        assert!(parse_user("root").is_err());
    }
}
