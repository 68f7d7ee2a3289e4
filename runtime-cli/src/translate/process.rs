//! A process: user, limits and privileges.

use agent_protocol::{Process, Stdio, WindowSize};
use oci_spec::runtime as oci;

use super::{capabilities, seccomp};

/// Why a process cannot be started in the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No process.
    #[error("process property must not be empty")]
    Missing,
    /// No program.
    #[error("args must not be empty")]
    NoArgs,
    /// No working directory.
    #[error("Cwd property must not be empty")]
    NoCwd,
    /// A working directory that depends on another one.
    #[error("Cwd must be an absolute path")]
    RelativeCwd,
    /// A string that execve(2) cannot take.
    #[error("process.{property} contains a NUL character")]
    Nul {
        /// `args` or `env`.
        property: &'static str,
    },
    /// The same limit twice.
    #[error("rlimit {0} is set more than once: remove all but one")]
    DuplicateRlimit(oci::PosixRlimitType),
    /// A soft limit above the hard one.
    #[error("rlimit {0} has a soft limit above its hard limit")]
    RlimitOrder(oci::PosixRlimitType),
    /// A property that the agent's protocol has no word for.
    #[error("process.{0} is not supported: remove it")]
    Unsupported(&'static str),
    /// The seccomp profile.
    #[error("compile linux.seccomp")]
    Seccomp(#[source] seccomp::Error),
}

/// What the agent is told about a process, under the seccomp profile of its container. Without a
/// terminal it has all three stdio streams; whoever knows of fewer clears them.
///
/// `apparmorProfile` and `selinuxLabel` name policies of the host's kernel and mean nothing to the
/// guest's.
pub fn process(
    process: &oci::Process,
    profile: Option<&oci::LinuxSeccomp>,
) -> Result<Process, Error> {
    refuse_unsupported(process)?;
    let args = process.args().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::NoArgs);
    }
    let env = process.env().clone().unwrap_or_default();
    for (property, strings) in [("args", &args), ("env", &env)] {
        if strings.iter().any(|string| string.contains('\0')) {
            return Err(Error::Nul { property });
        }
    }
    let terminal = process.terminal().unwrap_or(false);
    let user = process.user();
    Ok(Process {
        args,
        env,
        cwd: cwd(process)?,
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        capabilities: capabilities::translate(process.capabilities().as_ref()),
        rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
        no_new_privs: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: process.oom_score_adj(),
        seccomp: profile.map(seccomp::compile).transpose().map_err(Error::Seccomp)?.flatten(),
        terminal: terminal.then(|| window_size(process.console_size())),
        stdio: if terminal {
            Stdio::default()
        } else {
            Stdio { stdin: true, stdout: true, stderr: true }
        },
    })
}

fn refuse_unsupported(process: &oci::Process) -> Result<(), Error> {
    if process.scheduler().is_some() {
        return Err(Error::Unsupported("scheduler"));
    }
    if process.io_priority().is_some() {
        return Err(Error::Unsupported("ioPriority"));
    }
    if process.exec_cpu_affinity().is_some() {
        return Err(Error::Unsupported("execCPUAffinity"));
    }
    Ok(())
}

fn cwd(process: &oci::Process) -> Result<String, Error> {
    let cwd = process.cwd();
    if cwd.as_os_str().is_empty() {
        return Err(Error::NoCwd);
    }
    if !cwd.is_absolute() {
        return Err(Error::RelativeCwd);
    }
    Ok(cwd.to_str().expect("a path read from JSON is UTF-8").into())
}

/// Size of the terminal; 0 by 0, which is what the kernel starts with, if none is given.
fn window_size(size: Option<oci::Box>) -> WindowSize {
    let characters = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
    match size {
        Some(size) => {
            WindowSize { rows: characters(size.height()), columns: characters(size.width()) }
        }
        None => WindowSize { rows: 0, columns: 0 },
    }
}

fn rlimits(limits: &[oci::PosixRlimit]) -> Result<Vec<(u32, u64, u64)>, Error> {
    let mut seen: Vec<(u32, u64, u64)> = Vec::with_capacity(limits.len());
    for limit in limits {
        let number = rlimit_number(limit.typ());
        if seen.iter().any(|(other, ..)| *other == number) {
            return Err(Error::DuplicateRlimit(limit.typ()));
        }
        if limit.soft() > limit.hard() {
            return Err(Error::RlimitOrder(limit.typ()));
        }
        seen.push((number, limit.soft(), limit.hard()));
    }
    Ok(seen)
}

/// Number of a limit for prlimit(2); the same on all architectures of ours.
fn rlimit_number(limit: oci::PosixRlimitType) -> u32 {
    use oci::PosixRlimitType as Type;
    match limit {
        Type::RlimitCpu => libc::RLIMIT_CPU,
        Type::RlimitFsize => libc::RLIMIT_FSIZE,
        Type::RlimitData => libc::RLIMIT_DATA,
        Type::RlimitStack => libc::RLIMIT_STACK,
        Type::RlimitCore => libc::RLIMIT_CORE,
        Type::RlimitRss => libc::RLIMIT_RSS,
        Type::RlimitNproc => libc::RLIMIT_NPROC,
        Type::RlimitNofile => libc::RLIMIT_NOFILE,
        Type::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        Type::RlimitAs => libc::RLIMIT_AS,
        Type::RlimitLocks => libc::RLIMIT_LOCKS,
        Type::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        Type::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        Type::RlimitNice => libc::RLIMIT_NICE,
        Type::RlimitRtprio => libc::RLIMIT_RTPRIO,
        Type::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(properties: &str) -> Result<Process, Error> {
        let json = format!(r#"{{"user": {{"uid": 0, "gid": 0}}, "cwd": "/", {properties}}}"#);
        process(&serde_json::from_str(&json).unwrap(), None)
    }

    #[test]
    fn a_process_keeps_its_program_user_and_environment() {
        let json = r#"{"user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]},
                       "cwd": "/tmp", "args": ["sh", "-c", "x"], "env": ["A=b"],
                       "noNewPrivileges": true, "oomScoreAdj": -5}"#;

        let process = process(&serde_json::from_str(json).unwrap(), None).unwrap();

        assert_eq!(process.args, ["sh", "-c", "x"]);
        assert_eq!(process.env, ["A=b"]);
        assert_eq!((process.uid, process.gid, process.umask), (1, 2, Some(0o022)));
        assert_eq!(process.additional_gids, [3]);
        assert_eq!(process.cwd, "/tmp");
        assert!(process.no_new_privs);
        assert_eq!(process.oom_score_adj, Some(-5));
    }

    #[test]
    fn a_process_without_a_program_is_refused_in_the_words_of_runc() {
        for properties in [r#""args": []"#, r#""args": [""]"#, r#""env": []"#] {
            let error = translated(properties).unwrap_err();

            assert_eq!(error.to_string(), "args must not be empty");
        }
    }

    #[test]
    fn the_working_directory_is_absolute() {
        let json = r#"{"user": {}, "cwd": "tmp", "args": ["sh"]}"#;

        let error = process(&serde_json::from_str(json).unwrap(), None).unwrap_err();

        assert_eq!(error.to_string(), "Cwd must be an absolute path");
    }

    #[test]
    fn a_nul_character_cannot_be_passed_to_a_program() {
        assert!(translated(r#""args": ["a\u0000b"]"#).is_err());
    }

    #[test]
    fn a_terminal_replaces_the_three_streams() {
        let process = translated(
            r#""args": ["sh"], "terminal": true, "consoleSize": {"height": 24, "width": 80}"#,
        )
        .unwrap();

        assert_eq!(process.terminal, Some(WindowSize { rows: 24, columns: 80 }));
        assert_eq!(process.stdio, Stdio::default());
    }

    #[test]
    fn without_a_terminal_all_three_streams_exist() {
        let process = translated(r#""args": ["sh"]"#).unwrap();

        assert_eq!(process.terminal, None);
        assert_eq!(process.stdio, Stdio { stdin: true, stdout: true, stderr: true });
    }

    #[test]
    fn limits_have_the_numbers_of_the_kernel() {
        let process = translated(
            r#""args": ["sh"],
               "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 18446744073709551615}]"#,
        )
        .unwrap();

        assert_eq!(process.rlimits, [(7, 1, u64::MAX)]);
    }

    #[test]
    fn a_limit_set_twice_or_upside_down_is_refused() {
        let twice =
            r#""args": ["sh"], "rlimits": [{"type": "RLIMIT_CPU"}, {"type": "RLIMIT_CPU"}]"#;
        let upside_down =
            r#""args": ["sh"], "rlimits": [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]"#;

        assert!(matches!(translated(twice), Err(Error::DuplicateRlimit(_))));
        assert!(matches!(translated(upside_down), Err(Error::RlimitOrder(_))));
    }

    #[test]
    fn what_the_agent_cannot_do_is_refused_by_name() {
        let error = translated(r#""args": ["sh"], "ioPriority": {}"#).unwrap_err();

        assert_eq!(error.to_string(), "process.ioPriority is not supported: remove it");
    }
}
