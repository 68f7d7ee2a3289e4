//! What was fetched and built before, by a name that says all that went into it.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Where the cache is, unless the environment says otherwise.
const DEFAULT_ROOT: &str = "/var/cache/coracle";
const ROOT_VARIABLE: &str = "CORACLE_CACHE";

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder of the cache cannot be made, renamed or removed.
    #[error("write to the cache at {path} (set {ROOT_VARIABLE} to use another folder)")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Another process cannot be kept from building the same thing.
    #[error("lock {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: Errno,
    },
}

/// A folder of finished entries, each a folder, in sections.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache of this machine.
    pub fn of_this_machine() -> Self {
        let root = std::env::var_os(ROOT_VARIABLE).unwrap_or_else(|| OsString::from(DEFAULT_ROOT));
        Self { root: root.into() }
    }

    /// The folder `name`, for what is of no use to anybody else; it may hold what an earlier run left.
    pub fn scratch(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).map_err(|source| write_error(&path, source))?;
        Ok(path)
    }

    /// The folder of the entry `name`; if there is none yet, `fill` makes its contents.
    ///
    /// `fill` gets an empty folder that takes its place in the cache only if `fill` succeeds. Of
    /// several processes that want the same entry one fills it and the others wait.
    pub fn entry<E: From<Error>>(
        &self,
        section: &str,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let section = self.root.join(section);
        let finished = section.join(name);
        if finished.is_dir() {
            return Ok(finished);
        }
        fs::create_dir_all(&section).map_err(|source| write_error(&section, source))?;
        let _lock = lock(&section.join(format!(".{name}.lock")))?;
        if finished.is_dir() {
            return Ok(finished);
        }
        let partial = section.join(format!(".{name}.partial"));
        // What an interrupted run has left.
        remove(&partial)?;
        fs::create_dir(&partial).map_err(|source| write_error(&partial, source))?;
        if let Err(error) = fill(&partial) {
            remove(&partial)?;
            return Err(error);
        }
        fs::rename(&partial, &finished).map_err(|source| write_error(&finished, source))?;
        Ok(finished)
    }
}

fn lock(path: &Path) -> Result<Flock<File>, Error> {
    let failed = |source| Error::Lock { path: path.to_owned(), source };
    let file = File::create(path).map_err(|source| write_error(path, source))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, Errno::EWOULDBLOCK)) => {
            eprintln!("waiting for another coracle-image that is making the same thing");
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, source)| failed(source))
        }
        Err((_, source)) => Err(failed(source)),
    }
}

fn remove(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(write_error(folder, source)),
        _ => Ok(()),
    }
}

fn write_error(path: &Path, source: io::Error) -> Error {
    Error::Write { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    fn write_number(folder: &Path) -> Result<(), Error> {
        fs::write(folder.join("number"), "7").map_err(|source| write_error(folder, source))
    }

    #[test]
    fn an_entry_is_filled_once() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache { root: root.path().to_owned() };

        let first = cache.entry("section", "name", write_number).unwrap();
        let second =
            cache.entry::<Error>("section", "name", |_| unreachable!("it is there")).unwrap();

        assert_eq!(first, second);
        assert_eq!(fs::read_to_string(second.join("number")).unwrap(), "7");
    }

    #[test]
    fn a_failed_entry_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache { root: root.path().to_owned() };
        let failing = |folder: &Path| {
            write_number(folder)?;
            Err(write_error(folder, io::ErrorKind::StorageFull.into()))
        };

        cache.entry("section", "name", failing).unwrap_err();

        assert!(!root.path().join("section/name").exists());
        assert!(!root.path().join("section/.name.partial").exists());
    }

    #[test]
    fn what_an_interrupted_run_left_is_cleared() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache { root: root.path().to_owned() };
        fs::create_dir_all(root.path().join("section/.name.partial/old")).unwrap();

        let entry = cache.entry("section", "name", write_number).unwrap();

        assert!(!entry.join("old").exists());
    }

    #[test]
    fn of_two_at_once_one_fills_and_one_waits() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache { root: root.path().to_owned() };
        let fills = AtomicUsize::new(0);
        let fill = |folder: &Path| {
            fills.fetch_add(1, Ordering::Relaxed);
            write_number(folder)
        };

        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| cache.entry("section", "name", fill).unwrap());
            }
        });

        assert_eq!(fills.load(Ordering::Relaxed), 1);
    }
}
