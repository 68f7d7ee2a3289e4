//! Shows engines on the host that a container ran out of memory in its guest.
//!
//! Engines learn it from the kernel: they watch `memory.events` of the container's cgroup on the host
//! (Documentation/admin-guide/cgroup-v2.rst), where nothing happens when a guest's kernel kills a
//! process. So the host's kernel gets something to kill there: a process that exists for that only, with
//! some memory and the highest score, while the cgroup's limit is a moment below what is in use. This
//! process has the lowest score meanwhile.

use std::fs;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::cgroup;

/// Hidden verb of the process that is killed; its body is [`victim`].
pub const VICTIM_VERB: &str = "oom-victim";

/// What it holds, in bytes.
const VICTIM_BYTES: usize = 8 << 20;

/// How far the limit is set below what is in use, in bytes: less than the victim's death frees.
const SQUEEZE_BYTES: u64 = 4 << 20;

/// What the kernel can take back instead of killing is taken first: so often is the limit lowered.
const ATTEMPTS: u32 = 8;

/// Scores of /proc/PID/oom_score_adj: never killed, and killed first (proc(5)).
const NEVER: &str = "-1000";
const FIRST: &str = "1000";

const SCORE: &str = "/proc/self/oom_score_adj";

/// Has the kernel count a kill in this process's cgroup.
pub(super) fn show() -> io::Result<()> {
    let Some(cgroup) = cgroup::own_cgroups().into_iter().find(|it| it.join("memory.max").exists())
    else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    let _score = Restored::set(Path::new(SCORE), NEVER)?;
    let mut victim = start()?;
    let squeezed = squeeze(&cgroup, &mut victim);
    // Unless it is dead, as it should be.
    let _ = victim.kill();
    victim.wait()?;
    squeezed
}

/// Starts the victim and waits until it holds its memory.
fn start() -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(VICTIM_VERB).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut victim = command.spawn()?;
    let ready = victim.stdout.as_mut().expect("it is piped").read_exact(&mut [0]);
    if ready.is_err() {
        let _ = victim.kill();
        victim.wait()?;
    }
    ready.map(|()| victim)
}

fn squeeze(cgroup: &Path, victim: &mut Child) -> io::Result<()> {
    let limit = Restored::keep(&cgroup.join("memory.max"))?;
    for _ in 0..ATTEMPTS {
        let used: u64 = number(&fs::read_to_string(cgroup.join("memory.current"))?)?;
        // The kernel returns once that is so, or nobody is left to kill.
        limit.write(&used.saturating_sub(SQUEEZE_BYTES).to_string())?;
        if victim.try_wait()?.is_some() {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn number(text: &str) -> io::Result<u64> {
    text.trim().parse().map_err(io::Error::other)
}

/// Body of the hidden verb [`VICTIM_VERB`]: holds memory until it is killed.
pub fn victim() -> io::Result<()> {
    fs::write(SCORE, FIRST)?;
    let memory = vec![1_u8; VICTIM_BYTES];
    let mut stdout = io::stdout();
    stdout.write_all(b".")?;
    stdout.flush()?;
    loop {
        // Whoever started it kills it, too.
        std::thread::park();
        black_box(&memory);
    }
}

/// A file of the kernel's that gets back what it said.
struct Restored {
    path: PathBuf,
    text: String,
}

impl Restored {
    fn keep(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.into(), text: fs::read_to_string(path)? })
    }

    fn set(path: &Path, text: &str) -> io::Result<Self> {
        let restored = Self::keep(path)?;
        restored.write(text)?;
        Ok(restored)
    }

    fn write(&self, text: &str) -> io::Result<()> {
        fs::write(&self.path, text)
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if let Err(error) = self.write(&self.text) {
            log::warn!("write {} to {}: {error}", self.text.trim(), self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_back_what_it_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "max\n").unwrap();

        let kept = Restored::set(file.path(), "4096").unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "4096");
        drop(kept);

        assert_eq!(fs::read_to_string(file.path()).unwrap(), "max\n");
    }
}
