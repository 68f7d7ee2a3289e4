//! Templates: guests that were ready once, kept so that others of their shape need not boot.
//!
//! A template is a file: the guest's RAM with holes for what is not touched, behind it where the machine
//! stands and what it is of, and at the end where that begins. Machines map it privately, so that all of
//! them share the pages that none has written to. The first sandbox of a shape boots, and has its
//! template written by the process that called it (`launch.rs`): what is written is not the container's
//! memory, and must not count as that.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_protocol::{Resumed, SEED_BYTES, frame};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::{
    ConsoleOutput, MachineState, MemoryLayout, SavedMemory, Sharing, VmConfig, VmHandle, Vmm,
};

use crate::logging::chain;
use crate::settings::Settings;

/// Most templates kept: those that were used last.
const MOST: usize = 8;

/// Name ending of a template that is being written.
const UNFINISHED: &str = "new";

/// Most that a template holds behind the memory, in bytes: what one message to the writer can say.
const MAX_STATE_BYTES: u64 = frame::MAX_FRAME_BYTES as u64;

/// How long a guest may take to stand still.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes at the end of a template: where the memory ends, as a little-endian integer.
const TRAILER_BYTES: usize = size_of::<u64>();

/// Changes with each start of the host, after which its kernel and processor may be others.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where the template of machines of one shape is, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template {
    path: PathBuf,
    /// All that makes one guest that is ready differ from another.
    description: String,
    /// The files that such a guest is made of.
    files: Vec<Identity>,
}

/// What tells a file from another one and from what it was before: device, inode, and when its contents and
/// the rest of it were changed.
type Identity = (u64, u64, [i64; 4]);

/// A machine that stands still, for the process that writes its template.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    path: PathBuf,
    layout: MemoryLayout,
    /// What comes behind the memory: the description, then the state.
    contents: Vec<u8>,
}

impl Template {
    /// The one for machines of `config`; nothing if the settings want none, or if such a guest has
    /// something to do with the files of one container before it is ready.
    pub(super) fn of(settings: &Settings, config: &VmConfig) -> Option<Self> {
        let folder = settings.templates.as_ref()?;
        if !config.disks.is_empty() || config.console.output != ConsoleOutput::Discard {
            return None;
        }
        let (description, files) = describe(config)
            .inspect_err(|error| log::debug!("no template: describe the machine: {error}"))
            .ok()?;
        let name: String =
            Sha256::digest(&description)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Some(Self { path: folder.join(name), description, files })
    }

    fn open(&self) -> Option<(MachineState, SavedMemory)> {
        match self.read() {
            Ok(found) => Some(found),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                self.discard(&error.to_string());
                None
            }
        }
    }

    /// The machine of `config` as the template has it, if there is one that is of use.
    pub(super) fn restore(&self, config: &VmConfig) -> Option<Vmm> {
        let (state, memory) = self.open()?;
        let vmm = Vmm::restore(config.clone(), &state, memory)
            .inspect_err(|error| self.discard(&chain(error)))
            .ok()?;
        // Files may have been replaced since it was found that this template is of them.
        files(config).is_ok_and(|now| now == self.files).then_some(vmm)
    }

    /// Removes a template of which `problem` shows that it is no good.
    pub(super) fn discard(&self, problem: &str) {
        log::warn!("template {}: {problem}: the guest boots without it", self.path.display());
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("remove template {}: {error}", self.path.display());
        }
    }

    fn read(&self) -> io::Result<(MachineState, SavedMemory)> {
        let file = File::open(&self.path)?;
        let metadata = file.metadata()?;
        if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(io::Error::other("it is another user's, or others may write to it"));
        }
        let broken = || io::Error::other("it is broken");
        let end = metadata.len().checked_sub(TRAILER_BYTES as u64).ok_or_else(broken)?;
        let mut start = [0; TRAILER_BYTES];
        file.read_exact_at(&mut start, end)?;
        let start = u64::from_le_bytes(start);
        let bytes = end.checked_sub(start).filter(|bytes| *bytes <= MAX_STATE_BYTES);
        let bytes = usize::try_from(bytes.ok_or_else(broken)?).map_err(io::Error::other)?;
        let mut contents = vec![0; bytes];
        file.read_exact_at(&mut contents, start)?;
        let (description, state): (String, MachineState) =
            postcard::from_bytes(&contents).map_err(|_| broken())?;
        if description != self.description {
            return Err(io::Error::other("it is one of another machine"));
        }
        // For who has to choose which one goes.
        file.set_modified(SystemTime::now())?;
        Ok((state, SavedMemory { file, sharing: Sharing::Private }))
    }

    /// Makes a template of `vm`, whose guest is ready and was asked for nothing yet: `write` has the
    /// order carried out. The guest stands still meanwhile. Without a template all is as well, but slower.
    pub(super) fn keep(&self, vm: &VmHandle, write: impl FnOnce(Order) -> io::Result<()>) {
        if !vm.pause_within(PAUSE_TIMEOUT) {
            return;
        }
        let saved = vm.save_with(|state, layout| {
            let contents = postcard::to_stdvec(&(&self.description, state));
            let contents = contents.map_err(io::Error::other)?;
            write(Order { path: self.path.clone(), layout: layout.clone(), contents })
        });
        vm.resume();
        if let Err(error) = saved {
            log::info!("no template {}: {}", self.path.display(), chain(&error));
        }
    }
}

impl Order {
    /// Writes the template of the machine in process `pid`, unless somebody else does.
    pub(super) fn carry_out(&self, pid: i32) -> io::Result<()> {
        let folder = self.path.parent().ok_or(ErrorKind::InvalidInput)?;
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let lock = match Flock::lock(File::open(folder)?, FlockArg::LockExclusiveNonblock) {
            Err((_, Errno::EWOULDBLOCK)) => return Ok(()),
            lock => lock.map_err(|(_, error)| error)?,
        };
        if !self.path.exists() {
            make_room(folder)?;
            let unfinished = self.path.with_extension(UNFINISHED);
            let written = self
                .write(&unfinished, pid)
                .and_then(|()| fs::rename(&unfinished, &self.path))
                .inspect_err(|_| drop(fs::remove_file(&unfinished)));
            written?;
        }
        drop(lock);
        Ok(())
    }

    fn write(&self, path: &Path, pid: i32) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        self.layout.copy(&Path::new("/proc").join(pid.to_string()), &file)?;
        let start = self.layout.file_bytes();
        let end = start + self.contents.len() as u64;
        file.write_all_at(&self.contents, start)?;
        file.write_all_at(&start.to_le_bytes(), end)
    }
}

/// What the guest of a machine must be told that goes on from a template.
pub(super) fn awakening() -> io::Result<Resumed> {
    let mut seed = [0; SEED_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Resumed { now, seed })
}

/// Removes what nobody will finish, and the templates that were used longest ago, so that there is room
/// for one more.
fn make_room(folder: &Path) -> io::Result<()> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == UNFINISHED) {
            fs::remove_file(entry.path())?;
        } else {
            kept.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    kept.sort();
    let surplus = (kept.len() + 1).saturating_sub(MOST);
    kept.iter().take(surplus).try_for_each(|(_, path)| fs::remove_file(path))
}

/// All that can make a difference to a guest before it is asked for something, and to whether its state
/// means anything here; and the files that are part of it.
fn describe(config: &VmConfig) -> io::Result<(String, Vec<Identity>)> {
    let files = files(config)?;
    let mut config = config.clone();
    config.shares.iter_mut().for_each(|share| share.path = PathBuf::new());
    config.nets.iter_mut().for_each(|net| net.tap = String::new());
    let boot = fs::read_to_string(BOOT_ID)?;
    Ok((serde_json::to_string(&(boot, &files, config))?, files))
}

/// What a guest of `config` is made of: this program, its kernel and its root.
fn files(config: &VmConfig) -> io::Result<Vec<Identity>> {
    let roots = config.boot.initrd.iter().chain(config.pmem.iter().map(|pmem| &pmem.path));
    let files = [Path::new("/proc/self/exe"), &config.boot.kernel];
    files.into_iter().chain(roots.map(PathBuf::as_path)).map(identity).collect()
}

fn identity(path: &Path) -> io::Result<Identity> {
    let of = fs::metadata(path)?;
    Ok((of.dev(), of.ino(), [of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec()]))
}

#[cfg(test)]
mod tests {
    use vmm::{BootConfig, DiskConfig, NetConfig, ShareConfig};

    use super::*;

    /// A machine that boots the test itself, which is a file that is there.
    fn config() -> VmConfig {
        let mut config = VmConfig::new("/proc/self/exe".into());
        config.console.output = ConsoleOutput::Discard;
        config.shares = vec![ShareConfig::new("t", "/one".into())];
        config.nets = vec![NetConfig::new("tap0", "02:00:00:00:00:00")];
        config
    }

    fn template(config: &VmConfig) -> Option<Template> {
        Template::of(&Settings::default(), config)
    }

    #[test]
    fn what_the_host_calls_its_files_makes_no_other_template() {
        let mut other = config();
        other.shares[0].path = "/two".into();
        other.nets[0].tap = "tap7".into();

        assert_eq!(template(&other), template(&config()));
    }

    #[test]
    fn what_the_guest_sees_does() {
        let mut larger = config();
        larger.memory.size_mib += 1;
        let mut connected = config();
        connected.nets.push(NetConfig::new("tap1", "02:00:00:00:00:01"));
        let booted = VmConfig { boot: BootConfig::new("/bin/sh".into()), ..config() };

        for other in [larger, connected, booted] {
            assert_ne!(template(&other), template(&config()));
        }
    }

    #[test]
    fn another_root_does_too() {
        let folder = tempfile::tempdir().unwrap();
        let mapping = |name: &str, contents: &str| {
            let path = folder.path().join(name);
            fs::write(&path, contents).unwrap();
            let mut config = config();
            config.map_root(path);
            template(&config)
        };
        let (one, other, empty) = (mapping("one", "a"), mapping("other", "a"), mapping("one", ""));

        assert!(one.is_some());
        assert_ne!(one, other);
        assert_ne!(one, empty);
        assert_ne!(one, template(&config()));
    }

    #[test]
    fn a_guest_with_a_container_s_own_disk_or_console_has_none() {
        let disk = DiskConfig::new("disk", "/disk".into());
        let with_disk = VmConfig { disks: vec![disk], ..config() };
        let mut told = config();
        told.console.output = ConsoleOutput::File("/console".into());
        let unwanted = Settings { templates: None, ..Settings::default() };

        assert_eq!(template(&with_disk), None);
        assert_eq!(template(&told), None);
        assert_eq!(Template::of(&unwanted, &config()), None);
    }

    #[test]
    fn there_is_room_for_a_new_template_and_those_used_last() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..=MOST {
            let file = File::create(folder.path().join(number.to_string())).unwrap();
            file.set_modified(UNIX_EPOCH + Duration::from_secs(number as u64)).unwrap();
        }
        File::create(folder.path().join("half").with_extension(UNFINISHED)).unwrap();

        make_room(folder.path()).unwrap();

        let mut left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, (2..=MOST).map(|number| number.to_string()).collect::<Vec<_>>());
    }
}
