//! Runs a program to its end and keeps what it said.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};

/// How a command ended and what it printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Exit code, or 128 plus the signal's number.
    pub code: i32,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
}

impl Outcome {
    /// The trimmed standard output of a command that must succeed.
    pub fn text(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout.trim()
    }
}

/// Runs `program` with `input` on its standard input.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S], input: &[u8]) -> Outcome {
    use std::os::unix::process::ExitStatusExt;

    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let input = input.to_vec();
    // A program that ends without reading its input closes the pipe, which is its good right.
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().expect("a child can be waited for");
    let _ = feeder.join().expect("the feeder does not panic");
    Outcome {
        code: output.status.code().or(output.status.signal().map(|s| 128 + s)).expect("it ended"),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs the installed `coracle`.
pub fn coracle<S: AsRef<OsStr>>(args: &[S]) -> Outcome {
    run("coracle", args, b"")
}

/// Runs `docker`.
pub fn docker<S: AsRef<OsStr>>(args: &[S]) -> Outcome {
    run("docker", args, b"")
}

/// Runs a shell script.
pub fn shell(script: &str) -> Outcome {
    run("bash", &["-c", script], b"")
}
