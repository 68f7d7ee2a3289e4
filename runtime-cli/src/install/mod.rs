//! Makes container engines know this runtime: adds an entry to an engine's configuration, and takes it
//! out again.
//!
//! The entry is one piece of text, so that everything else stays as its owner wrote it. What the file
//! was before is kept, and comes back byte for byte unless the file was changed meanwhile.

mod edit;

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use edit::Entry;
pub use edit::Error as EditError;

/// Files of the backup folder: what was before, what was written, and the entry in it.
const BEFORE: &str = "before";
const AFTER: &str = "after";
const ENTRY: &str = "entry";

/// How a new configuration file may be used: by everybody to read.
const NEW_FILE_MODE: u32 = 0o644;

/// Why an engine's configuration could not be changed, or put back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file or folder cannot be written or removed.
    #[error("write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The entry finds no place.
    #[error("{path}")]
    Edit {
        /// The configuration file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: EditError,
    },
    /// The engine does not like the result.
    #[error(
        "{path} was left as it was, because the engine refuses what it would have become: {said}"
    )]
    Refused {
        /// The configuration file.
        path: PathBuf,
        /// What it said.
        said: String,
    },
    /// There is a backup already.
    #[error("the runtime was installed before: run `coracle uninstall` first ({0} keeps what was)")]
    Installed(PathBuf),
    /// There is no backup.
    #[error("the runtime was not installed by `coracle install`: there is no {0}")]
    NotInstalled(PathBuf),
    /// The file has changed where the entry is.
    #[error(
        "{path} was changed since; take the runtime out by hand, {before} is what it was before"
    )]
    Changed {
        /// The configuration file.
        path: PathBuf,
        /// The backup.
        before: PathBuf,
    },
}

/// A container engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Docker: `docker run --runtime coracle`.
    Docker,
    /// Podman: `podman --runtime coracle run`.
    Podman,
    /// containerd's Kubernetes plugin: a runtime class with the handler `coracle`.
    Containerd,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Containerd => "containerd",
        }
    }

    fn usual_config(self) -> &'static str {
        match self {
            Self::Docker => "/etc/docker/daemon.json",
            Self::Podman => "/etc/containers/containers.conf.d/50-coracle.conf",
            Self::Containerd => "/etc/containerd/config.toml",
        }
    }

    /// What the user does next.
    pub fn next_step(self) -> &'static str {
        match self {
            Self::Docker => "`systemctl reload docker` makes Docker read it",
            Self::Podman => "Podman reads it whenever it runs",
            Self::Containerd => "`systemctl restart containerd` makes containerd read it",
        }
    }

    fn entry(self, text: &str, program: &Path) -> Result<Entry, EditError> {
        match self {
            Self::Docker => edit::docker(text, program),
            Self::Podman => edit::podman(text, program),
            Self::Containerd => edit::containerd(text, program),
        }
    }

    /// The engine's own check of the configuration in `file`, where it has one.
    fn check(self, file: &Path) -> Option<Command> {
        let mut check = Command::new(match self {
            Self::Docker => "dockerd",
            Self::Podman => "podman",
            Self::Containerd => "containerd",
        });
        match self {
            Self::Docker => {
                // Since Docker 23.
                let help = Command::new("dockerd").arg("--help").output().ok()?;
                String::from_utf8_lossy(&help.stdout).contains("--validate").then_some(())?;
                check.args(["--validate", "--config-file"]).arg(file);
            }
            Self::Podman => {
                check.env("CONTAINERS_CONF", file).args(["--runtime", "coracle", "info"]);
            }
            Self::Containerd => {
                check.arg("--config").arg(file).args(["config", "dump"]);
            }
        }
        Some(check)
    }
}

/// How an entry was taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The file is what it was before, byte for byte.
    Whole,
    /// The file had been changed: only the entry is gone.
    Entry,
}

/// The runtime's entry in the configuration of one engine.
#[derive(Debug)]
pub struct Installation {
    engine: Engine,
    config: PathBuf,
    backup: PathBuf,
}

impl Installation {
    /// For `engine`, with the usual configuration file unless another is given; `backups` is the folder
    /// that keeps what was, for all engines.
    pub fn new(engine: Engine, config: Option<PathBuf>, backups: &Path) -> Self {
        let config = config.unwrap_or_else(|| engine.usual_config().into());
        // What a link leads to is the file.
        let config = fs::canonicalize(&config).unwrap_or(config);
        Self { engine, config, backup: backups.join(engine.name()) }
    }

    /// The configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Adds the entry for `program`, if the engine accepts it.
    pub fn install(&self, program: &Path) -> Result<(), Error> {
        if self.backup.exists() {
            return Err(Error::Installed(self.backup.clone()));
        }
        let before = self.read_config()?;
        let text = before.as_deref().unwrap_or_default();
        let entry = self.engine.entry(text, program);
        let entry = entry.map_err(|source| Error::Edit { path: self.config.clone(), source })?;
        let after = entry.insert_into(text);
        self.ask_engine(&after)?;

        make_folder(&self.backup)?;
        if let Some(before) = &before {
            write(&self.backup.join(BEFORE), before)?;
        }
        write(&self.backup.join(ENTRY), &entry.text)?;
        write(&self.backup.join(AFTER), &after)?;
        let written = write(&self.config, &after);
        if written.is_err() {
            // Nothing was changed, so nothing is to be put back.
            let _ = fs::remove_dir_all(&self.backup);
        }
        written
    }

    /// Takes the entry out.
    pub fn uninstall(&self) -> Result<Removal, Error> {
        let Some(after) = read(&self.backup.join(AFTER))? else {
            return Err(Error::NotInstalled(self.backup.clone()));
        };
        let before = read(&self.backup.join(BEFORE))?;
        let now = self.read_config()?.unwrap_or_default();
        let removal = if now == after {
            match &before {
                Some(before) => write(&self.config, before)?,
                None => remove(&self.config)?,
            }
            Removal::Whole
        } else {
            let entry = read(&self.backup.join(ENTRY))?.unwrap_or_default();
            let mut parts = now.split(&entry);
            let (Some(head), Some(tail), None) = (parts.next(), parts.next(), parts.next()) else {
                let before = self.backup.join(BEFORE);
                return Err(Error::Changed { path: self.config.clone(), before });
            };
            let rest = format!("{head}{tail}");
            self.ask_engine(&rest)?;
            write(&self.config, &rest)?;
            Removal::Entry
        };
        fs::remove_dir_all(&self.backup)
            .map_err(|source| Error::Write { path: self.backup.clone(), source })?;
        Ok(removal)
    }

    fn read_config(&self) -> Result<Option<String>, Error> {
        read(&self.config)
    }

    /// Has the engine check `text` as its configuration, if it is there and can.
    fn ask_engine(&self, text: &str) -> Result<(), Error> {
        let failed = |source| Error::Write { path: self.config.clone(), source };
        // The engines tell the language of some files by their names' ends.
        let suffix = self.config.extension().map(|end| format!(".{}", end.to_string_lossy()));
        let mut candidate = tempfile::Builder::new()
            .suffix(&suffix.unwrap_or_default())
            .tempfile()
            .map_err(failed)?;
        candidate.write_all(text.as_bytes()).map_err(failed)?;
        let Some(mut check) = self.engine.check(candidate.path()) else { return Ok(()) };
        match check.output() {
            Ok(output) if !output.status.success() => Err(Error::Refused {
                path: self.config.clone(),
                said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            }),
            // An engine that is not there yet will read it when it comes.
            _ => Ok(()),
        }
    }
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.into(), source }),
    }
}

fn make_folder(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| Error::Write { path: path.into(), source })
}

fn remove(path: &Path) -> Result<(), Error> {
    fs::remove_file(path).map_err(|source| Error::Write { path: path.into(), source })
}

/// Replaces a file at once, with the permissions it had.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    make_folder(folder)?;
    let replace = || {
        let permissions = match fs::metadata(path) {
            Ok(metadata) => metadata.permissions(),
            Err(_) => Permissions::from_mode(NEW_FILE_MODE),
        };
        let mut file = tempfile::Builder::new().tempfile_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.as_file().set_permissions(permissions)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        io::Result::Ok(())
    };
    replace().map_err(|source| Error::Write { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        folder: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap() }
        }

        fn config(&self) -> PathBuf {
            self.folder.path().join("etc/daemon.json")
        }

        /// For an engine whose own check needs nothing but a file that is not there.
        fn installation(&self) -> Installation {
            let backups = self.folder.path().join("backup");
            Installation::new(Engine::Docker, Some(self.config()), &backups)
        }

        fn write(&self, text: &str) {
            fs::create_dir_all(self.config().parent().unwrap()).unwrap();
            fs::write(self.config(), text).unwrap();
        }

        fn read(&self) -> String {
            fs::read_to_string(self.config()).unwrap()
        }
    }

    const PROGRAM: &str = "/usr/local/bin/coracle";

    #[test]
    fn a_file_comes_back_byte_for_byte_with_its_permissions() {
        let fixture = Fixture::new();
        let text = "{\t\"log-level\":\"warn\",\n\n \"runtimes\" : { \"a\": {\"path\": \"/a\"} } }";
        fixture.write(text);
        fs::set_permissions(fixture.config(), Permissions::from_mode(0o600)).unwrap();

        fixture.installation().install(Path::new(PROGRAM)).unwrap();
        let value: serde_json::Value = serde_json::from_str(&fixture.read()).unwrap();
        let removal = fixture.installation().uninstall().unwrap();

        assert_eq!(value["runtimes"]["coracle"]["path"], PROGRAM);
        assert_eq!(
            (&value["runtimes"]["a"]["path"], &value["log-level"]),
            (&"/a".into(), &"warn".into())
        );
        assert_eq!((removal, fixture.read().as_str()), (Removal::Whole, text));
        assert_eq!(fs::metadata(fixture.config()).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!fixture.folder.path().join("backup/docker").exists());
    }

    #[test]
    fn a_file_that_was_not_there_is_gone_again() {
        let fixture = Fixture::new();

        fixture.installation().install(Path::new(PROGRAM)).unwrap();
        assert!(fixture.read().contains(PROGRAM));
        fixture.installation().uninstall().unwrap();

        assert!(!fixture.config().exists());
    }

    #[test]
    fn what_was_changed_since_is_kept() {
        let fixture = Fixture::new();
        fixture.write("{ \"debug\": true }");

        fixture.installation().install(Path::new(PROGRAM)).unwrap();
        fixture.write(&fixture.read().replace("true", "false"));
        let removal = fixture.installation().uninstall().unwrap();

        assert_eq!((removal, fixture.read().as_str()), (Removal::Entry, "{ \"debug\": false }"));
    }

    #[test]
    fn an_entry_that_was_changed_since_is_left_to_its_owner() {
        let fixture = Fixture::new();

        fixture.installation().install(Path::new(PROGRAM)).unwrap();
        fixture.write(&fixture.read().replace("bin", "sbin"));

        assert!(matches!(fixture.installation().uninstall(), Err(Error::Changed { .. })));
    }

    #[test]
    fn it_is_installed_once_and_uninstalled_once() {
        let fixture = Fixture::new();

        assert!(matches!(fixture.installation().uninstall(), Err(Error::NotInstalled(_))));
        fixture.installation().install(Path::new(PROGRAM)).unwrap();
        let again = fixture.installation().install(Path::new(PROGRAM));

        assert!(matches!(again, Err(Error::Installed(_))));
    }

    #[test]
    fn a_file_that_is_broken_stays_as_it_is() {
        let fixture = Fixture::new();
        fixture.write("{ \"debug\": ");

        let error = fixture.installation().install(Path::new(PROGRAM)).unwrap_err();

        assert!(matches!(error, Error::Edit { .. }), "{error}");
        assert_eq!(fixture.read(), "{ \"debug\": ");
    }
}
