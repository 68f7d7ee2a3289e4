//! `config.json`, read and checked.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Process, Root, Spec};
use serde::de::DeserializeOwned;

/// The file of a bundle that describes its container.
pub const CONFIG_FILE: &str = "config.json";

/// Major version of the specification that is implemented.
const MAJOR_VERSION: &str = "1";

/// Parts of the specification that are newer than the types we parse it with and that are about
/// other platforms.
const NEWER_FIELDS: &[&str] = &["freebsd", "vm.hwConfig"];

/// A bundle whose configuration has passed every check that needs no virtual machine.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Absolute path of the bundle's folder.
    pub path: PathBuf,
    /// Its configuration.
    pub spec: Spec,
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
}

/// Why a bundle cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such bundle.
    #[error("bundle {path}: use the folder that holds {CONFIG_FILE} (--bundle)")]
    Folder {
        /// As given.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A bundle without configuration.
    #[error(
        "JSON specification file {CONFIG_FILE} not found in {0}: write one with `coracle spec`"
    )]
    NoConfig(PathBuf),
    /// A configuration that cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not JSON, or JSON of another shape.
    #[error("{path} is not a valid OCI configuration: correct {field}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Path of the field, such as `process.user.uid`, or "it" if it is no JSON at all.
        field: String,
        /// What is wrong, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// A property that the specification does not have.
    #[error(
        "{path} has the unknown field {field}: correct its name or remove it (annotations are the \
         place for own fields)"
    )]
    UnknownField {
        /// The file.
        path: PathBuf,
        /// Path of the field, such as `linux.resources.memori`.
        field: String,
    },
    /// Another major version of the specification.
    #[error("ociVersion {0:?} is not supported: this runtime implements 1.x")]
    Version(String),
    /// No `root`.
    #[error("root must be specified")]
    NoRoot,
    /// A `root` without path.
    #[error("root.path must not be empty: name the root file system's folder")]
    NoRootPath,
    /// The root file system is not there.
    #[error("invalid rootfs: root.path in config.json must name a folder that exists: stat {path}")]
    Rootfs {
        /// Where it should be.
        path: PathBuf,
        /// Why it cannot be used.
        #[source]
        source: io::Error,
    },
    /// The root file system is a file.
    #[error("invalid rootfs: {0} is not a directory")]
    RootfsNotDirectory(PathBuf),
    /// A container without a process cannot be started.
    #[error("process property must not be empty")]
    NoProcess,
    /// A process without a program.
    #[error("args must not be empty")]
    NoArgs,
    /// A process without a working directory.
    #[error("Cwd property must not be empty")]
    NoCwd,
    /// A working directory that depends on another.
    #[error("Cwd must be an absolute path")]
    RelativeCwd,
    /// A terminal whose master would have nowhere to go.
    #[error("cannot allocate tty if coracle will detach without setting console socket")]
    TerminalWithoutSocket,
    /// A console socket that nothing would be sent to.
    #[error("cannot use console socket if coracle will not detach or allocate tty")]
    SocketWithoutTerminal,
}

impl Bundle {
    /// Reads and checks the bundle in `path`.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let path =
            path.canonicalize().map_err(|source| Error::Folder { path: path.into(), source })?;
        let config = path.join(CONFIG_FILE);
        let spec: Spec = match std::fs::read(&config) {
            Ok(text) => parse(&config, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoConfig(path));
            }
            Err(source) => return Err(Error::Read { path: config, source }),
        };
        check_version(spec.version())?;
        let rootfs = rootfs(&path, spec.root().as_ref())?;
        check_process(spec.process().as_ref().ok_or(Error::NoProcess)?)?;
        Ok(Self { path, spec, rootfs })
    }

    /// Whether the container's process gets a terminal.
    pub fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(Process::terminal).unwrap_or(false)
    }

    /// Annotations of the configuration in the order of their names.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        self.spec.annotations().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// Reads an OCI process object, which `exec --process` is given.
pub fn load_process(path: &Path) -> Result<Process, Error> {
    let text = std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let process = parse(path, &text)?;
    check_process(&process)?;
    Ok(process)
}

/// Checks that a terminal and a socket for its master come together, where the caller of this
/// program will not be there to hold the terminal.
pub fn check_console(terminal: bool, detached: bool, has_socket: bool) -> Result<(), Error> {
    match (terminal && detached, has_socket) {
        (true, false) => Err(Error::TerminalWithoutSocket),
        (false, true) => Err(Error::SocketWithoutTerminal),
        _ => Ok(()),
    }
}

/// Reads OCI JSON and refuses what the specification does not know: a misspelt limit that is
/// ignored is no limit.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, Error> {
    // Engines write a configuration as one line, where a column helps nobody.
    let mut track = serde_path_to_error::Track::new();
    let mut unknown = None;
    let mut json = serde_json::Deserializer::from_slice(text);
    let deserializer = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let value = serde_ignored::deserialize(deserializer, |field| {
        // The crate marks every optional parent with a question mark.
        let field = field.to_string().replace(".?", "").replace("?.", "");
        if !NEWER_FIELDS.contains(&field.as_str()) {
            unknown.get_or_insert(field);
        }
    })
    .and_then(|value| json.end().map(|()| value));
    let value = value.map_err(|source| Error::Parse {
        path: path.into(),
        field: if source.is_data() { track.path().to_string() } else { "it".into() },
        source,
    })?;
    match unknown {
        Some(field) => Err(Error::UnknownField { path: path.into(), field }),
        None => Ok(value),
    }
}

/// The specification promises compatibility within a major version. Old engines leave it out.
fn check_version(version: &str) -> Result<(), Error> {
    let major = version.split('.').next().unwrap_or_default();
    if version.is_empty() || major == MAJOR_VERSION {
        Ok(())
    } else {
        Err(Error::Version(version.into()))
    }
}

fn rootfs(bundle: &Path, root: Option<&Root>) -> Result<PathBuf, Error> {
    let root = root.ok_or(Error::NoRoot)?;
    if root.path().as_os_str().is_empty() {
        return Err(Error::NoRootPath);
    }
    let path = bundle.join(root.path());
    let failed = |source| Error::Rootfs { path: path.clone(), source };
    let resolved = path.canonicalize().map_err(failed)?;
    if resolved.metadata().map_err(failed)?.is_dir() {
        Ok(resolved)
    } else {
        Err(Error::RootfsNotDirectory(resolved))
    }
}

fn check_process(process: &Process) -> Result<(), Error> {
    if process.args().iter().flatten().next().is_none() {
        return Err(Error::NoArgs);
    }
    if process.cwd().as_os_str().is_empty() {
        return Err(Error::NoCwd);
    }
    if !process.cwd().is_absolute() {
        return Err(Error::RelativeCwd);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logging::chain;

    const DEFAULT: &str = include_str!("commands/spec.json");
    const DOCKER: &str = include_str!("translate/testdata/docker.json");
    const PODMAN: &str = include_str!("translate/testdata/podman.json");

    /// The error of loading a bundle whose configuration is `text`.
    fn refusal(text: &str) -> String {
        chain(&load(text).unwrap_err())
    }

    fn load(text: &str) -> Result<Bundle, Error> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("rootfs")).unwrap();
        std::fs::write(directory.path().join("file"), "").unwrap();
        std::fs::write(directory.path().join(CONFIG_FILE), text).unwrap();
        Bundle::load(directory.path())
    }

    /// The error of loading the default configuration after a change.
    fn refusal_of(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut value = serde_json::from_str(DEFAULT).unwrap();
        change(&mut value);
        refusal(&value.to_string())
    }

    #[test]
    fn the_default_configuration_is_accepted() {
        let bundle = load(DEFAULT).unwrap();

        assert!(bundle.terminal());
        assert_eq!(bundle.rootfs, bundle.path.join("rootfs"));
    }

    #[test]
    fn configurations_of_engines_have_no_unknown_field() {
        for text in [DOCKER, PODMAN] {
            let spec: Result<Spec, _> = parse(Path::new(CONFIG_FILE), text.as_bytes());

            assert!(spec.is_ok(), "{spec:?}");
        }
    }

    #[test]
    fn a_missing_bundle_is_named() {
        let error = chain(&Bundle::load(Path::new("/nonexistent/bundle")).unwrap_err());

        assert!(error.starts_with("bundle /nonexistent/bundle: use the folder"), "{error}");
    }

    #[test]
    fn a_bundle_without_configuration_says_how_to_write_one() {
        let directory = tempfile::tempdir().unwrap();

        let error = chain(&Bundle::load(directory.path()).unwrap_err());

        assert!(error.starts_with("JSON specification file config.json not found"), "{error}");
        assert!(error.ends_with("write one with `coracle spec`"), "{error}");
    }

    #[test]
    fn broken_json_is_located() {
        let error = refusal("{\n  \"ociVersion\": ,\n}");

        assert!(error.contains("at line 2 column 17"), "{error}");
    }

    #[test]
    fn half_a_file_is_broken() {
        assert!(refusal("{\"ociVersion\": ").contains("EOF while parsing"));
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_field() {
        let error = refusal_of(|spec| spec["process"]["user"]["uid"] = "root".into());

        assert!(error.contains("correct process.user.uid: invalid type: string"), "{error}");
    }

    #[test]
    fn a_missing_field_is_named_with_its_parent() {
        let error = refusal_of(|spec| spec["mounts"][2] = serde_json::json!({}));

        assert!(error.contains("correct mounts[2]: missing field `destination`"), "{error}");
    }

    #[test]
    fn text_after_the_configuration_is_refused() {
        assert!(refusal(&format!("{DEFAULT} x")).contains("trailing characters"));
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        let error = refusal_of(|spec| spec["linux"]["resources"]["memori"] = 1.into());

        assert!(error.contains("unknown field linux.resources.memori:"), "{error}");
    }

    #[test]
    fn an_unknown_field_in_a_list_is_named_with_its_place() {
        let error = refusal_of(|spec| spec["mounts"][1]["typ"] = "tmpfs".into());

        assert!(error.contains("unknown field mounts.1.typ:"), "{error}");
    }

    #[test]
    fn an_unknown_field_at_the_top_is_named() {
        let error = refusal_of(|spec| spec["hostnam"] = "x".into());

        assert!(error.contains("unknown field hostnam:"), "{error}");
    }

    #[test]
    fn annotations_may_be_anything() {
        let mut spec: serde_json::Value = serde_json::from_str(DEFAULT).unwrap();
        spec["annotations"] = serde_json::json!({"com.example.x": "y"});

        assert_eq!(load(&spec.to_string()).unwrap().annotations()["com.example.x"], "y");
    }

    #[test]
    fn an_unknown_namespace_is_named() {
        let error = refusal_of(|spec| spec["linux"]["namespaces"][0]["type"] = "foo".into());

        assert!(error.contains("unknown variant `foo`"), "{error}");
    }

    #[test]
    fn a_negative_user_id_is_refused() {
        assert!(refusal_of(|spec| spec["process"]["user"]["uid"] = (-1).into()).contains("-1"));
    }

    #[test]
    fn versions_of_the_same_major_are_compatible() {
        assert!(check_version("1.0.2-dev").is_ok());
        assert!(check_version("1.3.0").is_ok());
        assert!(check_version("2.0.0").is_err());
        assert!(check_version("10.0.0").is_err());
    }

    #[test]
    fn a_missing_root_file_system_is_named() {
        let error = refusal_of(|spec| spec["root"]["path"] = "nope".into());

        assert!(error.starts_with("invalid rootfs: root.path in config.json"), "{error}");
        assert!(error.contains("/nope: No such file or directory"), "{error}");
    }

    #[test]
    fn a_root_file_system_is_a_directory() {
        let error = refusal_of(|spec| spec["root"]["path"] = "file".into());

        assert!(error.ends_with("/file is not a directory"), "{error}");
    }

    #[test]
    fn a_root_has_a_path() {
        assert!(refusal_of(|spec| spec["root"]["path"] = "".into()).starts_with("root.path must"));
        let no_root = refusal_of(|spec| {
            spec.as_object_mut().unwrap().remove("root");
        });
        assert_eq!(no_root, "root must be specified");
    }

    #[test]
    fn a_process_has_a_program_and_a_working_directory() {
        let null = serde_json::Value::Null;

        assert_eq!(
            refusal_of(|spec| spec["process"] = null.clone()),
            "process property must not be empty"
        );
        assert_eq!(refusal_of(|spec| spec["process"]["args"] = null), "args must not be empty");
        assert_eq!(
            refusal_of(|spec| spec["process"]["cwd"] = "".into()),
            "Cwd property must not be empty"
        );
        assert_eq!(
            refusal_of(|spec| spec["process"]["cwd"] = "x".into()),
            "Cwd must be an absolute path"
        );
    }

    #[test]
    fn a_detached_terminal_and_a_console_socket_come_together() {
        assert!(check_console(true, true, true).is_ok());
        assert!(check_console(false, true, false).is_ok());
        assert!(check_console(true, false, false).is_ok());
        assert!(matches!(check_console(true, true, false), Err(Error::TerminalWithoutSocket)));
        assert!(matches!(check_console(false, true, true), Err(Error::SocketWithoutTerminal)));
        assert!(matches!(check_console(true, false, true), Err(Error::SocketWithoutTerminal)));
    }
}
