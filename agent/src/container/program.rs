//! Finds and executes a process's program, failing in the words of Go's `exec` package, which runc
//! uses and engines look for.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agent_protocol::{Failed, Process};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::user;
use crate::failure::{failed, failed_with, reason};

/// A program that exists, with everything execve(2) takes.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// Looks the program up in this root, as this user, from this working directory.
    pub fn find(process: &Process) -> Result<Self, Failed> {
        let name = process.args.first().ok_or_else(|| failed("process has no arguments"))?;
        let path = look_up(name, variable(&process.env, "PATH").unwrap_or_default())?;
        let mut environment = without_repetition(&process.env);
        if variable(&environment, "HOME").is_none_or(str::is_empty) {
            environment.retain(|entry| !entry.starts_with("HOME="));
            environment.push(format!("HOME={}", user::home(process.uid)));
        }
        Ok(Self {
            path,
            arguments: c_strings(&process.args)?,
            environment: c_strings(&environment)?,
        })
    }

    /// Becomes the program; returns only if that fails.
    pub fn execute(&self) -> Failed {
        let path = CString::new(self.path.as_os_str().as_bytes()).expect("it was looked up");
        let errno = match nix::unistd::execve(&path, &self.arguments, &self.environment) {
            Err(errno) => errno,
            Ok(never) => match never {},
        };
        let message = format!("exec {}: {}", self.path.display(), reason(&errno.into()));
        failed_with(message, errno)
    }
}

/// Of entries with the same name the last, in the place of the first: the C library would take the
/// first, but whoever appends an entry means to replace it.
fn without_repetition(environment: &[String]) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut kept: Vec<String> = Vec::new();
    for entry in environment {
        match places.entry(name(entry)) {
            Entry::Occupied(place) => kept[*place.get()].clone_from(entry),
            Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(entry.clone());
            }
        }
    }
    kept
}

/// The value of the last entry with this name.
fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    let value = |entry: &'a String| entry.strip_prefix(name)?.strip_prefix('=');
    environment.iter().rev().find_map(value)
}

fn look_up(name: &str, search: &str) -> Result<PathBuf, Failed> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match check(&path) {
            Ok(()) => Ok(path),
            Err((call, errno)) => {
                let message = format!("exec: {name:?}: {call}{}", reason(&errno.into()));
                Err(failed_with(message, errno))
            }
        };
    }
    let candidates = search.split(':').filter(|folder| folder.starts_with('/'));
    let found =
        candidates.map(|folder| Path::new(folder).join(name)).find(|path| check(path).is_ok());
    found.ok_or_else(|| {
        let message = format!("exec: {name:?}: executable file not found in $PATH");
        failed_with(message, Errno::ENOENT)
    })
}

/// Whether `path` is a file that this process may execute; if not, the call as Go names it, and why.
fn check(path: &Path) -> Result<(), (String, Errno)> {
    let metadata = fs::metadata(path).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EINVAL));
        (format!("stat {}: ", path.display()), errno)
    })?;
    let executable =
        if metadata.is_dir() { Err(Errno::EISDIR) } else { access(path, AccessFlags::X_OK) };
    executable.map_err(|errno| (String::new(), errno))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, Failed> {
    let c_string = |text: &String| {
        CString::new(text.as_str())
            .map_err(|_| failed_with(format!("{text:?} contains a NUL byte"), Errno::EINVAL))
    };
    texts.iter().map(c_string).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn executable(folder: &Path, name: &str, mode: u32) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_name_is_searched_for_in_path_order() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        executable(first.path(), "tool", 0o644);
        let runnable = executable(second.path(), "tool", 0o755);
        let search = format!("{}:{}", first.path().display(), second.path().display());

        assert_eq!(look_up("tool", &search).unwrap(), runnable);
    }

    #[test]
    fn failures_have_the_words_of_runc() {
        let folder = tempfile::tempdir().unwrap();
        let plain = executable(folder.path(), "plain", 0o644).display().to_string();

        let message = |name: &str| look_up(name, "/nowhere").unwrap_err().message;

        assert_eq!(message("nosuch"), "exec: \"nosuch\": executable file not found in $PATH");
        let expected = "exec: \"/no/such\": stat /no/such: no such file or directory";
        assert_eq!(message("/no/such"), expected);
        assert_eq!(message(&plain), format!("exec: \"{plain}\": permission denied"));
    }

    #[test]
    fn an_entry_replaces_an_earlier_one_of_its_name() {
        let environment = ["A=1", "AB=2", "A=3=4", "B"].map(str::to_owned);

        assert_eq!(without_repetition(&environment), ["A=3=4", "AB=2", "B"]);
    }

    #[test]
    fn the_last_entry_of_a_name_counts() {
        let environment = ["A=1", "AB=2", "A=3"].map(str::to_owned);

        assert_eq!(variable(&environment, "A"), Some("3"));
        assert_eq!(variable(&environment, "B"), None);
    }
}
