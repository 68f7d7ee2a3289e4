//! Starts this program once more as a hidden verb and hears from it whether it came up.
//!
//! The two are joined by a socket pair. The starter sends an order, the new process reports that
//! it is ready or why not, and the starter commits. If the starter dies before that, the new
//! process sees the socket close and takes everything back.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};

use agent_protocol::frame;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::SigSet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Error;
use super::template;

/// What the new process says: at last one of the first two.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    Ready,
    Failed(String),
    /// It waits until this is written: an answer is a [`Written`].
    Template(Box<template::Order>),
}

/// What came of a template.
type Written = Result<(), String>;

/// What the starter says when it has done its own part, such as the pid file.
#[derive(Debug, Serialize, Deserialize)]
struct Commit;

/// The starter's side.
pub(super) struct Launched {
    verb: &'static str,
    child: Child,
    socket: UnixStream,
}

impl Launched {
    /// Starts `/proc/self/exe VERB FD NAME` in a session of its own, with this process's fds 0, 1
    /// and 2 and no others, and sends it `order`. `name` is only there for people who read `ps`.
    pub(super) fn start(
        verb: &'static str,
        name: &str,
        order: &impl Serialize,
    ) -> Result<Self, Error> {
        let spawned = || {
            let (ours, theirs) = UnixStream::pair()?;
            let mut command = Command::new("/proc/self/exe");
            command.arg0("coracle").arg(verb).arg(theirs.as_raw_fd().to_string()).arg(name);
            let fd = theirs.as_raw_fd();
            // SAFETY: between fork and exec only async-signal-safe system calls are made.
            unsafe { command.pre_exec(move || detach(fd)) };
            Ok((command.spawn()?, ours))
        };
        let (child, socket) = spawned().map_err(|source| Error::Spawn { verb, source })?;
        let mut launched = Self { verb, child, socket };
        let order = serde_json::to_vec(order).expect("an order is plain data");
        // If it died already, the report that is missing says more than this error would.
        let _ = frame::write(&mut launched.socket, &order);
        Ok(launched)
    }

    /// Pid of the new process.
    pub(super) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is a positive int")
    }

    /// Waits until the new process is ready. If it is not to be, it has ended when this returns.
    pub(super) fn wait_ready(&mut self) -> Result<(), Error> {
        loop {
            match frame::read::<Report>(&mut self.socket) {
                Ok(Some(Report::Ready)) => return Ok(()),
                Ok(Some(Report::Failed(message))) => {
                    let _ = self.child.wait();
                    return Err(Error::Reported(message));
                }
                Ok(Some(Report::Template(order))) => {
                    let written = order.carry_out(self.pid()).map_err(|error| error.to_string());
                    // If it died meanwhile, the report that is missing says so.
                    let _ = frame::write::<Written>(&mut self.socket, &written);
                }
                Ok(None) | Err(_) => return Err(self.died()),
            }
        }
    }

    /// The new process has ended, or is of no use.
    fn died(&mut self) -> Error {
        let how = match self.child.wait() {
            Ok(status) => ending(status),
            Err(error) => error.to_string(),
        };
        Error::Died { verb: self.verb, how }
    }

    /// Lets the new process go its own way.
    pub(super) fn commit(mut self) -> Result<(), Error> {
        frame::write(&mut self.socket, &Commit).map_err(Error::Talk)
    }

    /// Makes the new process take everything back, and waits until it has.
    pub(super) fn abandon(self) {
        let Self { mut child, socket, .. } = self;
        drop(socket);
        let _ = child.wait();
    }
}

/// How a process ended that did not say so itself.
fn ending(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGSYS) => "signal 31 (SIGSYS): one of its threads made a system call that its \
             filter forbids; the host's kernel log names both (dmesg | grep type=1326)"
            .into(),
        Some(signal) => format!("signal {signal}"),
        None => format!("exit code {}", status.code().unwrap_or_default()),
    }
}

/// The child between fork and exec: its own session, no signal blocked, and only the descriptors
/// meant for it.
fn detach(socket: RawFd) -> io::Result<()> {
    nix::unistd::setsid()?;
    // A container must not keep a file system busy because its engine was there.
    nix::unistd::chdir(c"/")?;
    SigSet::empty().thread_set_mask()?;
    // SAFETY: close_range with CLOEXEC only sets flags of this process's own descriptors.
    let done = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `socket` is open in this process, a copy of its parent, until exec.
    let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(socket) };
    fcntl(socket, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// The new process's side.
#[derive(Debug)]
pub(super) struct Starter(UnixStream);

impl Starter {
    /// The starter at the other end of inherited descriptor `fd`, and its order.
    pub(super) fn meet<T: DeserializeOwned>(fd: RawFd) -> Result<(Self, T), Error> {
        // The number is an argument of a hidden verb: whoever types that by hand gets an error.
        if fd < 3 || fcntl(unsafe_borrow(fd), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_err() {
            return Err(Error::Unexpected);
        }
        // SAFETY: the descriptor is open, as fcntl just found, was inherited for this purpose, and
        // nothing else in this fresh process knows of it.
        let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let order: Vec<u8> =
            frame::read(&mut socket).map_err(Error::Talk)?.ok_or(Error::Unexpected)?;
        let order = serde_json::from_slice(&order).map_err(|_| Error::Unexpected)?;
        Ok((Self(socket), order))
    }

    /// Reports that this process is ready.
    pub(super) fn ready(&mut self) -> Result<(), Error> {
        frame::write(&mut self.0, &Report::Ready).map_err(Error::Talk)
    }

    /// Reports why this process gives up.
    pub(super) fn failed(mut self, message: String) {
        // A starter that is gone has nobody to tell.
        let _ = frame::write(&mut self.0, &Report::Failed(message));
    }

    /// Waits for the starter's consent; `false` if it is gone.
    pub(super) fn committed(mut self) -> bool {
        matches!(frame::read::<Commit>(&mut self.0), Ok(Some(Commit)))
    }

    /// The socket: readable before [`Self::ready`] only if the starter is gone.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.0
    }
}

/// Has the starter behind `socket` write a template, before [`Starter::ready`].
pub(super) fn have_written(mut socket: &UnixStream, order: template::Order) -> io::Result<()> {
    frame::write(&mut socket, &Report::Template(Box::new(order))).map_err(io::Error::other)?;
    let written = frame::read::<Written>(&mut socket).map_err(io::Error::other)?;
    written.ok_or(io::ErrorKind::UnexpectedEof)?.map_err(io::Error::other)
}

fn unsafe_borrow<'a>(fd: RawFd) -> std::os::fd::BorrowedFd<'a> {
    // SAFETY: used for one fcntl only, which refuses a number that is not open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn pair() -> (UnixStream, RawFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, theirs.into_raw_fd())
    }

    #[test]
    fn an_order_arrives_as_it_was_sent() {
        let (mut ours, theirs) = pair();
        frame::write(&mut ours, &serde_json::to_vec(&("a", 7)).unwrap()).unwrap();

        let (_starter, order) = Starter::meet::<(String, u32)>(theirs).unwrap();

        assert_eq!(order, ("a".to_owned(), 7));
    }

    #[test]
    fn a_starter_that_is_gone_has_not_committed() {
        let (mut ours, theirs) = pair();
        frame::write(&mut ours, &serde_json::to_vec(&0).unwrap()).unwrap();
        let (starter, _) = Starter::meet::<u32>(theirs).unwrap();

        drop(ours);

        assert!(!starter.committed());
    }

    #[test]
    fn a_starter_that_commits_is_heard() {
        let (mut ours, theirs) = pair();
        frame::write(&mut ours, &serde_json::to_vec(&0).unwrap()).unwrap();
        let (starter, _) = Starter::meet::<u32>(theirs).unwrap();

        frame::write(&mut ours, &Commit).unwrap();

        assert!(starter.committed());
    }

    #[test]
    fn a_process_that_died_of_its_filter_points_at_the_kernels_log() {
        let status = Command::new("sh").args(["-c", "kill -SYS $$"]).status().unwrap();

        assert!(ending(status).contains("dmesg | grep type=1326"), "{}", ending(status));
    }

    #[test]
    fn a_hand_typed_descriptor_is_refused() {
        assert!(Starter::meet::<u32>(1).is_err());
        assert!(Starter::meet::<u32>(9999).is_err());
    }
}
