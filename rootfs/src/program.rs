//! Runs the programs that the build leans on, and says which package has a missing one.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// Debian packages by the program that is looked for.
const PACKAGES: &[(&str, &str)] = &[
    ("apt-cache", "apt"),
    ("apt-config", "apt"),
    ("apt-get", "apt"),
    ("bc", "bc"),
    ("bison", "bison"),
    ("depmod", "kmod"),
    ("dpkg", "dpkg"),
    ("flex", "flex"),
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("make", "make"),
    ("mkfs.erofs", "erofs-utils"),
    ("strip", "binutils"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
];

/// The kernel's host tools need it; it is a header, so no `PATH` look-up finds it.
const LIBELF_HEADER: &str = "/usr/include/gelf.h";

/// Where programs of the superuser are, on a `PATH` that lacks them.
const SUPERUSER_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// So many lines of a failed program's own words go into the error.
const LAST_LINES: usize = 20;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some of what a step needs is not installed.
    #[error("missing {}: run `apt-get install --no-install-recommends {}`", .missing.join(", "), .packages.join(" "))]
    NotInstalled {
        /// What was looked for.
        missing: Vec<String>,
        /// The packages that have it.
        packages: Vec<String>,
    },
    /// The system does not start it.
    #[error("start {program}")]
    Start {
        /// The program.
        program: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It ran and failed.
    #[error("{program} ended with {status}:\n{last_lines}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed.
        last_lines: String,
    },
}

/// A step's programs, checked before it starts.
pub fn require(programs: &[&str]) -> Result<(), Error> {
    let missing = programs.iter().filter(|program| find(program).is_none());
    not_installed(missing.map(|program| (*program).to_owned()).collect())
}

/// Like [`require`], and the one library that the kernel's build tools are linked with.
pub fn require_with_libelf(programs: &[&str]) -> Result<(), Error> {
    let missing = programs.iter().filter(|program| find(program).is_none());
    let mut missing: Vec<String> = missing.map(|program| (*program).to_owned()).collect();
    if !Path::new(LIBELF_HEADER).exists() {
        missing.push("gelf.h".to_owned());
    }
    not_installed(missing)
}

/// `PATH` with the folders of the superuser's programs.
pub fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:{SUPERUSER_PATH}")
}

/// A command with a path that has the superuser's programs and messages in plain English.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", search_path()).env("LC_ALL", "C");
    command
}

/// Runs `command` and returns what it prints.
pub fn output(command: &mut Command) -> Result<String, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.output().map_err(|source| Error::Start { program: program.clone(), source })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let all = text + &String::from_utf8_lossy(&output.stderr);
    Err(Error::Failed { program, status: output.status, last_lines: last_lines(&all) })
}

/// The end of a log, for an error message.
pub fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

fn not_installed(missing: Vec<String>) -> Result<(), Error> {
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<String> = missing.iter().map(|name| package(name)).collect();
    packages.sort();
    packages.dedup();
    Err(Error::NotInstalled { missing, packages })
}

fn package(name: &str) -> String {
    if name == "gelf.h" {
        return "libelf-dev".to_owned();
    }
    let known = |name: &str| PACKAGES.iter().find(|(program, _)| *program == name);
    if let Some((_, package)) = known(name) {
        return (*package).to_owned();
    }
    // A tool for another architecture: aarch64-linux-gnu-ld is in binutils-aarch64-linux-gnu.
    let cross = name
        .rsplit_once('-')
        .and_then(|(prefix, tool)| known(tool).map(|(_, package)| format!("{package}-{prefix}")));
    cross.unwrap_or_else(|| name.to_owned())
}

fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path())
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_programs_name_their_packages_once() {
        let missing = ["ld", "bc", "strip", "gelf.h"].map(str::to_owned);

        let error = not_installed(missing.into()).unwrap_err();

        assert_eq!(
            error.to_string(),
            "missing ld, bc, strip, gelf.h: \
             run `apt-get install --no-install-recommends bc binutils libelf-dev`"
        );
    }

    #[test]
    fn tools_for_another_architecture_have_packages_of_their_own() {
        assert_eq!(package("aarch64-linux-gnu-gcc"), "gcc-aarch64-linux-gnu");
        assert_eq!(package("aarch64-linux-gnu-ld"), "binutils-aarch64-linux-gnu");
    }

    #[test]
    fn a_failure_carries_the_programs_last_words() {
        let error = output(command("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();

        assert!(error.to_string().ends_with("exit status: 3:\nwhy"), "{error}");
    }

    #[test]
    fn only_the_end_of_a_long_log_is_kept() {
        let log: String = (0..100).map(|line| format!("{line}\n")).collect();

        assert_eq!(last_lines(&log).lines().next(), Some("80"));
    }
}
