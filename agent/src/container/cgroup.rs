//! A container's cgroup in the guest (cgroup v2 only; Documentation/admin-guide/cgroup-v2.rst).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use agent_protocol::Failed;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use crate::failure::{Context, failed, failed_with};

/// Below the hierarchy's root: the folder of all containers.
const FOLDER: &str = "coracle";

/// How long the last processes may take to go, or to freeze.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often an emptying cgroup is looked at; its end has no other sign than that it can be removed.
const POLL: Duration = Duration::from_millis(2);

/// Largest file read here; memory.stat has some 60 lines.
const MAX_FILE_BYTES: usize = 64 << 10;

/// One cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

/// Hands every controller the kernel has to the containers.
pub fn prepare(root: &Path) -> io::Result<()> {
    let folder = root.join(FOLDER);
    delegate(root)?;
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => delegate(&folder),
    }
}

/// The cgroup that all containers are below, in the hierarchy at `root`.
pub fn of_all(root: &Path) -> PathBuf {
    root.join(FOLDER)
}

fn delegate(folder: &Path) -> io::Result<()> {
    let controllers = fs::read_to_string(folder.join("cgroup.controllers"))?;
    for controller in controllers.split_whitespace() {
        // One by one, because a controller that cannot be had must not cost the others.
        if let Err(error) = write(&folder.join("cgroup.subtree_control"), &format!("+{controller}"))
        {
            log::warn!("cgroup controller {controller} is not available: {error}");
        }
    }
    Ok(())
}

impl Cgroup {
    /// A new cgroup for container `id`, with `files` written.
    pub fn create(root: &Path, id: &str, files: &[(String, String)]) -> Result<Self, Failed> {
        let path = root.join(FOLDER).join(id);
        fs::create_dir(&path).context(format_args!("create cgroup of {id}"))?;
        let cgroup = Self { path };
        match cgroup.write_files(files) {
            Ok(()) => Ok(cgroup),
            Err(failure) => {
                cgroup.remove()?;
                Err(failure)
            }
        }
    }

    /// Writes control files, in order.
    pub fn write_files(&self, files: &[(String, String)]) -> Result<(), Failed> {
        for (name, value) in files {
            if name.contains('/') {
                return Err(failed_with(format!("{name:?} is no cgroup file"), Errno::EINVAL));
            }
            let path = self.path.join(name);
            write(&path, value).context(format_args!("write {value:?} to cgroup file {name}"))?;
        }
        Ok(())
    }

    /// A descriptor to fork into.
    pub fn open(&self) -> io::Result<OwnedFd> {
        open_folder(&self.path)
    }

    /// A descriptor of the cgroup in or below this one that `pid` is in.
    pub fn open_of(&self, pid: Pid) -> io::Result<OwnedFd> {
        let folder = find_process(&self.path, pid.as_raw())?;
        open_folder(&folder.ok_or(Errno::ESRCH)?)
    }

    /// Kills every process in it.
    pub fn kill(&self) -> io::Result<()> {
        match write(&self.path.join("cgroup.kill"), "1") {
            // Before Linux 5.14.
            Err(error) if error.kind() == ErrorKind::NotFound => self.signal(libc::SIGKILL),
            result => result,
        }
    }

    /// Sends a signal to every process in it.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        for pid in self.processes()? {
            match send_signal(Pid::from_raw(pid), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Pids of the processes in it and in cgroups below it, ascending.
    pub fn processes(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        visit(&self.path, &mut |_, found| pids.extend_from_slice(found))?;
        pids.sort_unstable();
        Ok(pids)
    }

    /// Freezes or thaws it, and waits until that is so.
    pub fn freeze(&self, frozen: bool) -> Result<(), Failed> {
        let state = if frozen { "1" } else { "0" };
        write(&self.path.join("cgroup.freeze"), state).context("write cgroup.freeze")?;
        let events = File::open(self.path.join("cgroup.events")).context("open cgroup.events")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = read(&events).context("read cgroup.events")?;
            if value(&text, "frozen") == Some(u64::from(frozen)) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut change = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut change, timeout).context("wait for cgroup.events")?;
        }
        if frozen {
            // Half frozen is worse than not at all.
            let _ = write(&self.path.join("cgroup.freeze"), "0");
        }
        Err(failed("unable to freeze: some processes do not stop"))
    }

    /// The text of one of its files, if there is one.
    pub fn read(&self, name: &str) -> Option<String> {
        read(&File::open(self.path.join(name)).ok()?).ok()
    }

    /// Watches its memory limit; not possible without the memory controller.
    pub fn watch_memory(&self) -> Option<MemoryWatch> {
        let events = File::open(self.path.join("memory.events")).ok()?;
        let mut watch = MemoryWatch { events, kills: 0 };
        watch.killed();
        Some(watch)
    }

    /// Kills what is left in it and removes it.
    pub fn remove(&self) -> Result<(), Failed> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context(format_args!("remove {}", self.path.display()));
                }
                Err(_) => {}
            }
            self.kill().context("kill the processes of the cgroup")?;
            sleep(POLL);
        }
    }
}

/// Tells when the kernel killed a process because the cgroup's memory was used up.
#[derive(Debug)]
pub struct MemoryWatch {
    events: File,
    kills: u64,
}

impl MemoryWatch {
    /// Whether there were kills since the last call. It has to be called whenever the descriptor
    /// polls as POLLPRI, and rearms it.
    pub fn killed(&mut self) -> bool {
        let text = read(&self.events).unwrap_or_default();
        let kills = value(&text, "oom_kill").unwrap_or(self.kills);
        let more = kills > self.kills;
        self.kills = kills;
        more
    }
}

impl AsFd for MemoryWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// Sends any signal; nix knows no realtime signals.
pub fn send_signal(pid: Pid, signal: i32) -> nix::Result<()> {
    // SAFETY: kill takes integers.
    Errno::result(unsafe { libc::kill(pid.as_raw(), signal) })?;
    Ok(())
}

/// The number after `key` in a flat keyed file.
pub fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Writes without creating: in a cgroup only the kernel makes files.
pub fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// Reads from the start, whatever was read before.
pub fn read(file: &File) -> io::Result<String> {
    let mut bytes = vec![0; MAX_FILE_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(String::from_utf8_lossy(&bytes[..filled]).into_owned())
}

/// A descriptor of a cgroup.
pub fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

fn find_process(folder: &Path, pid: i32) -> io::Result<Option<PathBuf>> {
    let mut found = None;
    visit(folder, &mut |folder, pids| {
        if pids.contains(&pid) {
            found = Some(folder.to_owned());
        }
    })?;
    Ok(found)
}

/// Shows `look` each cgroup in and below `folder` with its pids. The container makes and removes
/// cgroups meanwhile: one that is gone has no processes.
fn visit(folder: &Path, look: &mut impl FnMut(&Path, &[i32])) -> io::Result<()> {
    // The folder of a thread in a threaded cgroup has no list; its processes are listed above.
    if let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) {
        let pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        look(folder, &pids);
    }
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            visit(&entry.path(), look)?;
        }
    }
    Ok(())
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_matched_whole() {
        let text = "oom 1\noom_kill 3\noom_group_kill 0\n";

        assert_eq!(value(text, "oom_kill"), Some(3));
        assert_eq!(value(text, "oom_kil"), None);
    }

    #[test]
    fn kills_are_told_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut watch = MemoryWatch { events: File::open(file.path()).unwrap(), kills: 0 };

        fs::write(file.path(), "oom 1\noom_kill 1\n").unwrap();

        assert!(watch.killed());
        assert!(!watch.killed());
    }

    #[test]
    fn a_cgroup_that_is_gone_has_no_processes() {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = Cgroup { path: folder.path().join("gone") };

        assert_eq!(cgroup.processes().unwrap(), [0; 0]);
    }

    #[test]
    fn a_file_name_with_a_slash_is_refused() {
        let cgroup = Cgroup { path: "/nowhere".into() };

        let files = [("../cgroup.procs".to_owned(), "1".to_owned())];

        assert_eq!(cgroup.write_files(&files).unwrap_err().errno, libc::EINVAL);
    }
}
