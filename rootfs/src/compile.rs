//! Runs the kernel's own build: the same bytes each time, with a sign of life every few seconds.

use crate::program::{command, last_lines, search_path};
use crate::target::Target;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// What the build would otherwise take from the machine, and put into the kernel.
const FIXED_ENVIRONMENT: &[(&str, &str)] = &[
    ("KBUILD_BUILD_HOST", "coracle"),
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
    ("KBUILD_BUILD_USER", "coracle"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// Starts of the lines by which the build says that it compiles one more file.
const COMPILING: &[&str] = &["  CC ", "  AS "];

const REPORT_EVERY: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Words of a failed build, and what to do about them.
const REMEDIES: &[(&str, &str)] = &[
    ("No space left on device", "free 3 GB on the cache's disk, or move it with CORACLE_CACHE"),
    ("Killed", "the machine ran out of memory: use a smaller --jobs"),
    ("fatal error: libelf", "run `apt-get install libelf-dev`"),
    ("fatal error: openssl", "run `apt-get install libssl-dev`"),
    (": not found", "install the program that the log says is not found"),
];

/// Why the kernel was not built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `make` does not start, or its log cannot be used.
    #[error("run make with its log in {log}")]
    Run {
        /// Where its words go.
        log: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("build the kernel: {status}; {remedy}\n(all of {log} is kept, it ends:)\n{last_lines}")]
    Failed {
        /// How `make` ended.
        status: ExitStatus,
        /// What to do about it.
        remedy: &'static str,
        /// The whole log.
        log: PathBuf,
        /// The end of the log.
        last_lines: String,
    },
}

/// `make` in the source folder `tree`, with nothing of the caller's environment.
pub fn make(tree: &Path, target: &Target) -> Command {
    let mut make = command("make");
    make.env_clear()
        .env("PATH", search_path())
        .env("LC_ALL", "C")
        .envs(FIXED_ENVIRONMENT.iter().copied());
    make.current_dir(tree).arg(format!("ARCH={}", target.kbuild.arch));
    make.arg(format!("CROSS_COMPILE={}", target.tool("")));
    make
}

/// Compiles the configured source in `tree` with `jobs` processes; the log is removed on success.
pub fn compile(tree: &Path, target: &Target, jobs: usize, log: &Path) -> Result<(), Error> {
    let failed = |source| Error::Run { log: log.to_owned(), source };
    let output = File::create(log).map_err(failed)?;
    let mut make = make(tree, target);
    make.arg(format!("-j{jobs}")).arg(target.kbuild.goal);
    make.stderr(output.try_clone().map_err(failed)?).stdout(output);
    eprintln!("kernel: compiling with {jobs} processes, once per machine");
    let status = make.spawn().and_then(|child| watch(child, log)).map_err(failed)?;
    if status.success() {
        return fs::remove_file(log).map_err(failed);
    }
    let text = String::from_utf8_lossy(&fs::read(log).map_err(failed)?).into_owned();
    Err(Error::Failed {
        status,
        remedy: remedy(&text),
        log: log.to_owned(),
        last_lines: last_lines(&text),
    })
}

/// Waits for `child` and meanwhile tells how far its log says that it is.
fn watch(mut child: Child, log: &Path) -> io::Result<ExitStatus> {
    let start = Instant::now();
    let mut log = File::open(log)?;
    let mut text = Vec::new();
    let mut next_report = REPORT_EVERY;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        thread::sleep(LOOK_EVERY);
        if start.elapsed() >= next_report {
            log.read_to_end(&mut text)?;
            eprintln!("kernel: {} files compiled in {} s", compiled(&text), next_report.as_secs());
            next_report += REPORT_EVERY;
        }
    }
}

fn compiled(log: &[u8]) -> usize {
    let log = String::from_utf8_lossy(log);
    log.lines().filter(|line| COMPILING.iter().any(|start| line.starts_with(start))).count()
}

fn remedy(log: &str) -> &'static str {
    let known = REMEDIES.iter().find(|(words, _)| log.contains(words));
    known.map_or("the log says why", |(_, remedy)| remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> &'static Target {
        Target::named("x86_64").unwrap()
    }

    #[test]
    fn only_compiled_files_count_as_progress() {
        let log = b"  HOSTCC  scripts/x\n  CC      a.o\n  AS      b.o\n  AR      built-in.a\n";

        assert_eq!(compiled(log), 2);
    }

    #[test]
    fn a_full_disk_has_a_remedy() {
        assert!(remedy("cc1: error: x: No space left on device\n").starts_with("free 3 GB"));
    }

    #[test]
    fn the_callers_environment_stays_out_of_the_build() {
        let make = make(Path::new("/"), target());

        let mut names: Vec<_> = make.get_envs().map(|(name, _)| name).collect();
        names.retain(|name| !name.to_string_lossy().starts_with("KBUILD_BUILD_"));
        assert_eq!(names, ["LC_ALL", "PATH"]);
    }

    #[test]
    fn a_failed_build_keeps_its_log_and_quotes_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("Makefile"), "vmlinux:\n\t@echo broken here; false\n")
            .unwrap();
        let log = folder.path().join("log");

        let error = compile(folder.path(), target(), 1, &log).unwrap_err();

        assert!(error.to_string().contains("broken here"), "{error}");
        assert!(log.exists());
    }
}
