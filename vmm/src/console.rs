//! What the guest prints: a bounded memory of its last lines and, if wanted, a copy to a file.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::config::ConsoleOutput;
use crate::output::open_output;

/// Most bytes remembered: about a hundred lines, enough for a kernel panic with its call trace.
const RING_BYTES: usize = 8 << 10;

/// What every console of the guest writes into. Clones share one memory and one file.
#[derive(Clone)]
pub struct ConsoleLog {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    /// Grows as the guest prints, to at most [`RING_BYTES`].
    last: VecDeque<u8>,
    copy: Option<File>,
}

impl ConsoleLog {
    /// Opens where `output` says the copy goes.
    pub fn open(output: &ConsoleOutput) -> io::Result<Self> {
        let copy = match output {
            ConsoleOutput::Discard => None,
            ConsoleOutput::Stdout => Some(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
            ConsoleOutput::File(path) => Some(open_output(path)?),
        };
        Ok(ConsoleLog { shared: Arc::new(Mutex::new(Shared { last: VecDeque::new(), copy })) })
    }

    /// The last lines the guest printed: at most 8 KiB, without control characters.
    pub fn tail(&self) -> String {
        let mut shared = self.lock();
        readable(shared.last.make_contiguous())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().expect("nothing panics while it holds the console")
    }
}

impl Write for ConsoleLog {
    /// Never fails: a copy that cannot be written is given up, and the guest runs on.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut shared = self.lock();
        remember(&mut shared.last, data);
        if let Some(mut copy) = shared.copy.take() {
            shared.copy = copy.write_all(data).is_ok().then_some(copy);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// This process's standard input as the console's, opened anew so that O_NONBLOCK stays our own.
/// Nothing where there is no input to wait for: epoll refuses regular files and `/dev/null`.
pub fn input(output: &ConsoleOutput) -> Option<OwnedFd> {
    if *output != ConsoleOutput::Stdout {
        return None;
    }
    let input = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/proc/self/fd/0")
        .ok()?;
    let event = EpollEvent::new(EventSet::IN, 0);
    Epoll::new().ok()?.ctl(ControlOperation::Add, input.as_raw_fd(), event).ok()?;
    Some(input.into())
}

fn remember(last: &mut VecDeque<u8>, data: &[u8]) {
    let data = &data[data.len().saturating_sub(RING_BYTES)..];
    let excess = (last.len() + data.len()).saturating_sub(RING_BYTES);
    last.drain(..excess);
    last.extend(data);
}

/// `bytes` as text that is safe to print: escape sequences and control characters left out.
fn readable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut state = Escape::None;
    for character in String::from_utf8_lossy(bytes).chars() {
        state = match (mem::replace(&mut state, Escape::None), character) {
            (_, '\x1b') => Escape::Started,
            (Escape::Started, '[') => Escape::Parameters,
            (Escape::Started, _) => Escape::None,
            (Escape::Parameters, '\x20'..='\x3f') => Escape::Parameters,
            (Escape::Parameters, _) => Escape::None,
            (Escape::None, printed) => {
                if printed == '\n' || printed == '\t' || !printed.is_control() {
                    text.push(printed);
                }
                Escape::None
            }
        };
    }
    text
}

/// Where in a terminal escape sequence we are (ECMA-48, section 5.4).
enum Escape {
    None,
    Started,
    Parameters,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> ConsoleLog {
        ConsoleLog::open(&ConsoleOutput::Discard).unwrap()
    }

    #[test]
    fn consoles_share_one_memory() {
        let log = log();

        log.clone().write_all(b"serial\n").unwrap();
        log.clone().write_all(b"virtio\n").unwrap();

        assert_eq!(log.tail(), "serial\nvirtio\n");
    }

    #[test]
    fn only_the_last_8_kib_are_kept() {
        let mut log = log();

        log.write_all(&[b'a'; 10_000]).unwrap();
        log.write_all(b"end").unwrap();

        let tail = log.tail();
        assert_eq!(tail.len(), RING_BYTES);
        assert!(tail.ends_with("aaaend"));
    }

    #[test]
    fn control_characters_and_escape_sequences_are_left_out() {
        let mut log = log();

        log.write_all(b"\x1b[31;1mred\x1b[0m\r\n\x07bell\xff").unwrap();

        assert_eq!(log.tail(), "red\nbell\u{fffd}");
    }

    #[test]
    fn a_copy_that_cannot_be_written_does_not_stop_the_guest() {
        let mut log = ConsoleLog::open(&ConsoleOutput::File("/dev/full".into())).unwrap();

        log.write_all(b"one").unwrap();
        log.write_all(b"two").unwrap();

        assert_eq!(log.tail(), "onetwo");
    }
}
