//! Signals that end the machine, as a descriptor.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

/// SIGINT, SIGTERM and SIGHUP as a descriptor; once it is dropped they end the process as usual.
pub struct Signals {
    descriptor: OwnedFd,
    set: libc::sigset_t,
}

impl Signals {
    /// Blocks them for this thread and those it starts: call it before the first starts. A SIGHUP that is
    /// ignored (nohup(1)) stays so.
    pub fn open() -> io::Result<Self> {
        // SAFETY: an all-zero sigset_t is valid for sigemptyset to initialize; the other calls get
        // that initialized set.
        let (fd, set) = unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            // A signal that is blocked arrives even if it is ignored.
            if !is_ignored(libc::SIGHUP) {
                libc::sigaddset(&raw mut set, libc::SIGHUP);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            (libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC), set)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd just opened it, and nobody else owns it.
        Ok(Signals { descriptor: unsafe { OwnedFd::from_raw_fd(fd) }, set })
    }

    /// The number of the signal that arrived.
    pub fn read(&self) -> io::Result<i32> {
        // SAFETY: the structure is plain numbers, for which zero is valid.
        let mut info: libc::signalfd_siginfo = unsafe { mem::zeroed() };
        let bytes = size_of_val(&info);
        // SAFETY: the kernel writes at most `bytes` bytes into `info`.
        let read =
            unsafe { libc::read(self.descriptor.as_raw_fd(), (&raw mut info).cast(), bytes) };
        if read < 0 {
            return Err(io::Error::last_os_error());
        }
        i32::try_from(info.ssi_signo).map_err(io::Error::other)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: `open` initialized the set.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const self.set, ptr::null_mut()) };
    }
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: the structure is plain numbers, for which zero is valid.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: the call changes nothing, and fills in the structure it is given.
    unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    action.sa_sigaction == libc::SIG_IGN
}
