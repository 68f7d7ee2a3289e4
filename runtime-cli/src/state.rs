//! What is kept of a container between two verbs: one folder with a lock and `state.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Where container folders are, unless `--root` says otherwise.
pub const DEFAULT_ROOT: &str = "/run/coracle";

/// Others may pass through a container's folder, as runc lets them, but not list it.
const CONTAINER_DIR_MODE: u32 = 0o711;

/// Longest container id: it is the name of a folder.
const MAX_ID_BYTES: usize = 255;

const STATE_FILE: &str = "state.json";

/// Why the state of a container cannot be told or kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id breaks runc's rule for ids.
    #[error(
        "invalid container ID format: {0:?}: use only letters, digits and the characters _ + - . \
         (and not . or .. alone)"
    )]
    InvalidId(String),
    /// The id is in use.
    #[error("container with given ID already exists: {0}: delete it or choose another ID")]
    Exists(ContainerId),
    /// No container of this id.
    #[error("container does not exist")]
    Missing(ContainerId),
    /// The state folder cannot be made.
    #[error(
        "create state folder {path}: make room in or allow writing to its file system, or choose \
         another --root"
    )]
    CreateDir {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The state folder cannot be read.
    #[error("open state folder {path}")]
    OpenDir {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The lock of the state folder cannot be taken.
    #[error("lock state folder {path}")]
    Lock {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// `state.json` cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `state.json` is not what this program wrote.
    #[error("{path} is damaged: remove the container with `delete --force`")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// `state.json` cannot be written.
    #[error("write {path}: make room in or allow writing to its file system")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The state folder cannot be removed.
    #[error("remove state folder {path}")]
    Remove {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A container id that may safely be a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerId(String);

impl ContainerId {
    /// Checks runc's rule: one or more of `[A-Za-z0-9_+.-]`, neither `.` nor `..`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
        let valid = !text.is_empty()
            && text.len() <= MAX_ID_BYTES
            && text.bytes().all(allowed)
            && text != "."
            && text != "..";
        if valid { Ok(Self(text.into())) } else { Err(Error::InvalidId(text.into())) }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// The folder that holds one folder per container (`--root`).
#[derive(Debug, Clone)]
pub struct StateRoot {
    path: PathBuf,
}

impl StateRoot {
    /// Containers below `path`, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder of a new container; whoever makes it owns the id.
    pub fn create(&self, id: &ContainerId) -> Result<ContainerDir, Error> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            |source| Error::CreateDir { path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(CONTAINER_DIR_MODE)
            .create(&self.path)
            .map_err(failed(&self.path))?;
        let path = self.path.join(id.as_str());
        match DirBuilder::new().mode(CONTAINER_DIR_MODE).create(&path) {
            Ok(()) => self.open(id),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::Exists(id.clone()))
            }
            Err(error) => Err(failed(&path)(error)),
        }
    }

    /// Opens the folder of an existing container.
    pub fn open(&self, id: &ContainerId) -> Result<ContainerDir, Error> {
        let path = self.path.join(id.as_str());
        match File::open(&path) {
            Ok(dir) => Ok(ContainerDir { id: id.clone(), path, dir }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::Missing(id.clone()))
            }
            Err(source) => Err(Error::OpenDir { path, source }),
        }
    }

    /// The ids of all containers, in ascending order; none if the root does not exist.
    pub fn list(&self) -> Result<Vec<ContainerId>, Error> {
        let failed = |source| Error::OpenDir { path: self.path.clone(), source };
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            // Whatever else lies there is not ours: engines put files of their own beside us.
            let Some(id) =
                entry.file_name().to_str().and_then(|name| ContainerId::parse(name).ok())
            else {
                continue;
            };
            if entry.path().join(STATE_FILE).exists() {
                ids.push(id);
            }
        }
        ids.sort();
        Ok(ids)
    }
}

/// The folder of one container.
#[derive(Debug)]
pub struct ContainerDir {
    id: ContainerId,
    path: PathBuf,
    dir: File,
}

/// Exclusive use of a container's folder; released when dropped.
#[derive(Debug)]
#[must_use]
pub struct Lock {
    _flock: Flock<File>,
}

impl ContainerDir {
    /// Id of the container.
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// Path of the folder, as `--root` was given: it may be relative.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open folder: a socket in it is reached as `/proc/self/fd/N/name`, however long
    /// [`Self::path`] is.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Waits until no other process holds the lock of this folder, then holds it. The container is
    /// missing if another one removed it meanwhile, even if its id is in use again.
    pub fn lock(&self) -> Result<Lock, Error> {
        let failed = |source| Error::OpenDir { path: self.path.clone(), source };
        // An open file description of its own: locks of this one would not exclude each other.
        let dir = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Missing(self.id.clone()));
            }
            other => other.map_err(failed)?,
        };
        let lock = Flock::lock(dir, FlockArg::LockExclusive)
            .map_err(|(_, source)| Error::Lock { path: self.path.clone(), source })?;
        let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
        let ours = self.dir.metadata().map_err(failed)?;
        match fs::metadata(&self.path) {
            Ok(named) if identity(&named) == identity(&ours) => Ok(Lock { _flock: lock }),
            _ => Err(Error::Missing(self.id.clone())),
        }
    }

    /// Replaces `state.json`: a reader sees the old or the new one, never a part.
    pub fn save(&self, state: &State) -> Result<(), Error> {
        let path = self.path.join(STATE_FILE);
        let written = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
            file.write_all(&serde_json::to_vec(state)?)?;
            file.persist(&path)?;
            Ok(())
        };
        written().map_err(|source| Error::Write { path: path.clone(), source })
    }

    /// The container's state, [`Status::Stopped`] if its sandbox process is gone.
    pub fn load(&self) -> Result<State, Error> {
        let path = self.path.join(STATE_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Missing(self.id.clone()));
            }
            Err(source) => return Err(Error::Read { path, source }),
        };
        let mut state: State =
            serde_json::from_slice(&text).map_err(|source| Error::Damaged { path, source })?;
        let has_no_process_yet = state.status == Status::Creating && state.pid.is_none();
        if !has_no_process_yet && !state.is_alive() {
            state.status = Status::Stopped;
        }
        Ok(state)
    }

    /// Removes the folder; the id is free again.
    ///
    /// Files and empty folders in it are removed, and no more: the container's volumes are mounted
    /// below it in the sandbox's mount namespace, and must survive if they ever were in ours.
    pub fn remove(self) -> Result<(), Error> {
        match remove_flat(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::Remove { path: self.path, source }),
        }
    }
}

fn remove_flat(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

/// Where a container is in its life (runtime.md, State).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` has not returned yet.
    Creating,
    /// Waiting for `start`.
    Created,
    /// The user's program runs.
    Running,
    /// Frozen.
    Paused,
    /// The sandbox process is gone.
    Stopped,
}

impl Status {
    /// Status of a container whose first process exists. One that is paused before `start` still
    /// waits for it afterwards.
    pub fn of_live(frozen: bool, program_started: bool) -> Self {
        match (frozen, program_started) {
            (true, _) => Status::Paused,
            (false, true) => Status::Running,
            (false, false) => Status::Created,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Version of the specification the bundle was made for.
    pub oci_version: String,
    /// Container id.
    pub id: String,
    /// Pid of the sandbox process, once there is one.
    pub pid: Option<i32>,
    /// Its start time in clock ticks since boot, so that a reused pid is told apart.
    pub pid_start_time: u64,
    /// Status when this was written.
    pub status: Status,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system on the host.
    pub rootfs: PathBuf,
    /// When the container was created (RFC 3339, with nanoseconds, UTC).
    pub created: String,
    /// Empty, as in runc's `state`: `list` names whoever owns the state folder.
    pub owner: String,
    /// Annotations of the bundle.
    pub annotations: BTreeMap<String, String>,
    /// Host cgroup of the sandbox, to be removed with the container.
    pub cgroup_path: Option<PathBuf>,
    /// Whether that cgroup is systemd's to manage.
    pub systemd_cgroup: bool,
    /// Path of the network namespace the bundle named, if it named one.
    pub netns: Option<PathBuf>,
}

impl State {
    /// The state of a running container `box` that has no process.
    #[cfg(test)]
    pub(crate) fn of_test(bundle: &Path) -> Self {
        Self {
            oci_version: "1.0.2".into(),
            id: "box".into(),
            pid: None,
            pid_start_time: 0,
            status: Status::Running,
            bundle: bundle.into(),
            rootfs: bundle.join("rootfs"),
            created: "2026-01-02T03:04:05.678Z".into(),
            owner: String::new(),
            annotations: BTreeMap::new(),
            cgroup_path: None,
            systemd_cgroup: false,
            netns: None,
        }
    }

    /// Whether the sandbox process runs.
    pub fn is_alive(&self) -> bool {
        self.pid.is_some_and(|pid| process_start_time(pid) == Some(self.pid_start_time))
    }

    /// Whether the sandbox process has not quite ended: it runs, or some of its threads still let go of
    /// what they held after it was killed.
    pub fn has_process(&self) -> bool {
        let same = |(_, start_time)| start_time == self.pid_start_time;
        self.pid.and_then(process_stat).is_some_and(same)
    }

    /// The state as `runc state` prints it and hooks read it on stdin.
    pub fn to_oci_json(&self) -> String {
        let view = OciState {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: self.shown_pid(),
            status: self.status,
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            annotations: &self.annotations,
            owner: &self.owner,
        };
        serde_json::to_string_pretty(&view).expect("plain data with string keys serializes")
    }

    /// The pid to show: that of a stopped container means nothing any more.
    pub fn shown_pid(&self) -> i32 {
        match self.status {
            Status::Stopped => 0,
            _ => self.pid.unwrap_or(0),
        }
    }
}

/// The JSON object of `state`, in runc's order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OciState<'a> {
    oci_version: &'a str,
    id: &'a str,
    pid: i32,
    status: Status,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
    owner: &'a str,
}

/// The present time as [`State::created`] writes it.
pub fn timestamp() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).expect("the year has four digits")
}

/// Start time of a running process in clock ticks since boot; `None` if it is gone or a zombie.
pub fn process_start_time(pid: i32) -> Option<u64> {
    process_stat(pid).filter(|(state, _)| !matches!(state, 'Z' | 'X')).map(|(_, time)| time)
}

/// State and start time of a process (proc(5), /proc/pid/stat).
fn process_stat(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may hold spaces and parentheses itself.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // The state is field 3, starttime field 22.
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(22 - 4)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> ContainerId {
        ContainerId::parse(text).unwrap()
    }

    fn own_pid() -> i32 {
        nix::unistd::getpid().as_raw()
    }

    fn state(pid: Option<i32>, pid_start_time: u64) -> State {
        State { pid, pid_start_time, ..State::of_test(Path::new("/bundle")) }
    }

    #[test]
    fn ids_of_engines_are_valid() {
        for text in ["a", "..a", "web-1_x+y.z", &"0123456789abcdef".repeat(4)] {
            assert!(ContainerId::parse(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn ids_that_could_leave_the_root_are_invalid() {
        for text in ["", ".", "..", "a/b", "../x", "a b", "a\0", "\u{e4}", &"x".repeat(256)] {
            assert!(ContainerId::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_id_is_used_once() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path().join("deep/root"));

        let first = root.create(&id("box")).unwrap();

        assert!(matches!(root.create(&id("box")), Err(Error::Exists(_))));
        first.remove().unwrap();
        assert!(root.create(&id("box")).is_ok());
    }

    #[test]
    fn removing_a_container_spares_what_is_mounted_below_it() {
        let directory = tempfile::tempdir().unwrap();
        let dir = StateRoot::new(directory.path()).create(&id("box")).unwrap();
        let volume = dir.path().join("share");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("precious"), "").unwrap();

        assert!(matches!(dir.remove(), Err(Error::Remove { .. })));

        assert!(volume.join("precious").exists());
    }

    #[test]
    fn a_folder_without_state_is_no_container() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path());
        let dir = root.create(&id("box")).unwrap();

        assert!(matches!(dir.load(), Err(Error::Missing(_))));
        assert!(matches!(root.open(&id("other")), Err(Error::Missing(_))));
        assert_eq!(root.list().unwrap(), []);
    }

    #[test]
    fn state_of_a_living_process_comes_back_as_saved() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path());
        let dir = root.create(&id("box")).unwrap();
        let saved = state(Some(own_pid()), process_start_time(own_pid()).unwrap());

        dir.save(&saved).unwrap();

        assert_eq!(dir.load().unwrap(), saved);
        assert_eq!(root.list().unwrap(), [id("box")]);
    }

    #[test]
    fn a_container_whose_pid_was_reused_is_stopped() {
        let directory = tempfile::tempdir().unwrap();
        let dir = StateRoot::new(directory.path()).create(&id("box")).unwrap();

        dir.save(&state(Some(own_pid()), 1)).unwrap();

        assert_eq!(dir.load().unwrap().status, Status::Stopped);
        assert_eq!(dir.load().unwrap().shown_pid(), 0);
    }

    #[test]
    fn a_damaged_state_names_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let dir = StateRoot::new(directory.path()).create(&id("box")).unwrap();
        fs::write(dir.path().join(STATE_FILE), "{").unwrap();

        let error = dir.load().unwrap_err();

        assert!(error.to_string().contains("state.json is damaged"), "{error}");
    }

    #[test]
    fn the_lock_keeps_others_out_until_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let dir = StateRoot::new(directory.path()).create(&id("box")).unwrap();
        let lock = dir.lock().unwrap();
        let attempt = || {
            Flock::lock(File::open(dir.path()).unwrap(), FlockArg::LockExclusiveNonblock).is_ok()
        };

        assert!(!attempt());
        drop(lock);
        assert!(attempt());
    }

    #[test]
    fn a_folder_that_cannot_be_made_says_what_to_do() {
        let file = tempfile::NamedTempFile::new().unwrap();

        let error = StateRoot::new(file.path().join("root")).create(&id("box")).unwrap_err();

        let text = crate::logging::chain(&error);
        assert!(text.contains("choose another --root: Not a directory"), "{text}");
    }

    #[test]
    fn the_root_may_not_exist() {
        assert_eq!(StateRoot::new("/nonexistent/root").list().unwrap(), []);
    }

    #[test]
    fn oci_json_has_the_fields_of_runc_in_its_order() {
        let json = state(Some(7), 0).to_oci_json();

        let keys: Vec<_> = json.lines().filter_map(|line| line.split('"').nth(1)).collect();
        let expected =
            ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner"];
        assert_eq!(keys, expected);
    }

    #[test]
    fn a_timestamp_is_rfc_3339_in_utc() {
        let text = timestamp();

        assert!(text.ends_with('Z') && text.as_bytes()[10] == b'T', "{text}");
    }

    #[test]
    fn a_container_resumed_before_its_start_can_still_be_started() {
        assert_eq!(Status::of_live(true, false), Status::Paused);
        assert_eq!(Status::of_live(false, false), Status::Created);
    }

    #[test]
    fn a_folder_that_was_removed_cannot_be_locked_though_its_id_is_in_use_again() {
        let root = tempfile::tempdir().unwrap();
        let root = StateRoot::new(root.path());
        root.create(&id("box")).unwrap();
        let late = root.open(&id("box")).unwrap();

        root.open(&id("box")).unwrap().remove().unwrap();
        assert!(matches!(late.lock(), Err(Error::Missing(_))));
        let other = root.create(&id("box")).unwrap();

        assert!(matches!(late.lock(), Err(Error::Missing(_))));
        assert!(other.lock().is_ok());
    }

    #[test]
    fn a_program_that_was_resumed_runs() {
        assert_eq!(Status::of_live(true, true), Status::Paused);
        assert_eq!(Status::of_live(false, true), Status::Running);
    }
}
