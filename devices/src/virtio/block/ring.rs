//! Requests that the host's kernel carries out by itself, through an io_uring.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::Instant;

use event_manager::EventSet;
use io_uring::register::{Probe, Restriction};
use io_uring::{IoUring, opcode, squeue, types};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::request::Request;
use super::transfer::{MOST_IN_FLIGHT, Transfer};
use crate::virtio::Backend;

/// What is asked of the ring, and nothing else can be.
const OPERATIONS: [u8; 3] = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];

/// An io_uring for one disk.
///
/// It is entered only to submit. Completions are found in memory shared with the kernel, and the
/// eventfd tells of them, so that a thread that waits for them needs no more than read(2), and poll(2) for
/// a while only.
pub struct Ring {
    ring: IoUring,
    /// Blocks who reads it until something completes. The event loop never reads it.
    completions: EventFd,
    in_flight: usize,
}

impl Ring {
    /// Makes a ring. The error is that the host has none, forbids it or has an old one.
    pub fn open() -> io::Result<Self> {
        let entries = u32::try_from(MOST_IN_FLIGHT).expect("a small number");
        // Disabled until it is restricted.
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(entries)?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe)?;
        let all = OPERATIONS.iter().all(|&operation| probe.is_supported(operation));
        if !all || !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let completions = EventFd::new(libc::EFD_CLOEXEC)?;
        submitter.register_eventfd(completions.as_raw_fd())?;
        // System call filters do not see what a ring does.
        let mut restrictions = OPERATIONS.map(Restriction::sqe_op);
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Ring { ring, completions, in_flight: 0 })
    }

    /// What is ready when requests have completed.
    pub fn backend(&self) -> Backend {
        Backend { fd: self.completions.as_raw_fd(), events: EventSet::IN }
    }

    /// Puts `transfer` in line for [`Ring::submit`], if it is something a ring can do. It completes
    /// as `number`.
    ///
    /// # Safety
    ///
    /// Until it has completed neither `transfer`'s buffers nor the files of `disk` may be changed or
    /// dropped.
    pub unsafe fn push(&mut self, disk: &Disk, transfer: &Transfer, number: usize) -> bool {
        let Some(entry) = entry(disk, transfer) else { return false };
        let entry = entry.user_data(number as u64);
        // SAFETY: the entry points to the pieces of memory and the list of them that the buffers of
        // `transfer` keep, and names a file of `disk`; the caller keeps both.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has an entry for each transfer");
        self.in_flight += 1;
        true
    }

    /// Hands over to the kernel what is in line.
    pub fn submit(&mut self) {
        while !self.ring.submission().is_empty() {
            if let Err(error) = self.ring.submit() {
                // Short of memory, or interrupted. Nothing may stay in line: what it points to is
                // only kept until the next reset.
                let again = [libc::EAGAIN, libc::EBUSY, libc::EINTR, libc::ENOMEM];
                let may_try_again = error.raw_os_error().is_some_and(|code| again.contains(&code));
                assert!(may_try_again, "submit to our own io_uring: {error}");
                thread::yield_now();
            }
        }
    }

    /// The number of a request that has completed, and its result: bytes moved or an error number
    /// below zero.
    pub fn completed(&mut self) -> Option<(usize, i32)> {
        let entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        let number = usize::try_from(entry.user_data()).expect("it is a number given to `push`");
        Some((number, entry.result()))
    }

    /// How much is in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Waits until something that is in flight may have completed; `false` if nothing is in flight, or if
    /// nothing has completed by `deadline`.
    pub fn wait(&mut self, deadline: Option<Instant>) -> bool {
        self.submit();
        if self.in_flight == 0 || !self.ring.completion().is_empty() {
            return self.in_flight > 0;
        }
        if let Some(deadline) = deadline {
            // SAFETY: the eventfd stays open for as long as `self`.
            let completions = unsafe { BorrowedFd::borrow_raw(self.completions.as_raw_fd()) };
            let mut told = [PollFd::new(completions, PollFlags::POLLIN)];
            let left = deadline.saturating_duration_since(Instant::now());
            // In whole milliseconds. What is longer than can be said is a short one.
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            match nix::poll::poll(&mut told, timeout) {
                Ok(0) => return false,
                Ok(_) => {}
                // Interrupted: nothing may be there to be read.
                Err(_) => return true,
            }
        }
        // What was told before and what interrupts the wait only make the caller look once more.
        let _ = self.completions.read();
        true
    }

    /// Waits until nothing is in flight any more, and forgets how it ended.
    pub fn quiesce(&mut self) {
        while self.wait(None) {
            while self.completed().is_some() {}
        }
    }
}

/// The entry for what `transfer` asks for.
fn entry(disk: &Disk, transfer: &Transfer) -> Option<squeue::Entry> {
    let fd = |offset, buffers| types::Fd(disk.fd_for(offset, buffers).as_raw_fd());
    let (readable, writable) = (&transfer.readable, &transfer.writable);
    // A list has at most UIO_MAXIOV pieces.
    let count = |list: &[libc::iovec]| u32::try_from(list.len()).ok();
    match transfer.request {
        Request::Read { offset } => {
            let list = writable.iovecs();
            let entry = opcode::Readv::new(fd(offset, writable), list.as_ptr(), count(list)?);
            Some(entry.offset(offset).build())
        }
        Request::Write { offset } => {
            let list = readable.iovecs();
            let entry = opcode::Writev::new(fd(offset, readable), list.as_ptr(), count(list)?);
            // A worker of the kernel waits for it, and no thread of ours.
            let flags = if disk.is_write_through() { libc::RWF_DSYNC } else { 0 };
            Some(entry.offset(offset).rw_flags(flags).build())
        }
        Request::Flush => {
            let entry = opcode::Fsync::new(types::Fd(disk.fd().as_raw_fd()));
            Some(entry.flags(types::FsyncFlags::DATASYNC).build())
        }
        Request::Id | Request::Discard { .. } | Request::WriteZeroes { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::mem;

    use super::super::transfer::Transfers;
    use super::*;
    use crate::virtio::testing::memory;

    /// Where an entry has the flags of a read or write (`struct io_uring_sqe`).
    const FLAGS_OFFSET: usize = 28;

    #[test]
    fn writes_and_nothing_else_last_before_they_complete_if_the_disk_is_write_through() {
        let mut disk = Disk::endless(File::open("/dev/null").unwrap());
        let mut transfers = Transfers::default();
        let number = transfers.take(&memory()).unwrap();
        let transfer = transfers.get(number);
        let mut flags = |disk: &Disk, request| {
            transfer.request = request;
            // SAFETY: an entry is 64 bytes, all of them plain numbers.
            let bytes: [u8; 64] = unsafe { mem::transmute(entry(disk, transfer).unwrap()) };
            i32::from_le_bytes(*bytes[FLAGS_OFFSET..].first_chunk().unwrap())
        };
        let (read, write) = (Request::Read { offset: 512 }, Request::Write { offset: 512 });

        assert_eq!([read, write].map(|request| flags(&disk, request)), [0, 0]);
        disk.set_write_through(true);
        assert_eq!([read, write].map(|request| flags(&disk, request)), [0, libc::RWF_DSYNC]);
    }

    #[test]
    #[ignore = "needs io_uring"]
    fn a_ring_without_requests_is_quiet_at_once() {
        let mut ring = Ring::open().unwrap();
        ring.quiesce();
        assert!(ring.completed().is_none());
    }

    #[test]
    #[ignore = "needs io_uring"]
    fn a_ring_refuses_what_a_disk_never_asks() {
        let mut ring = Ring::open().unwrap();
        let path = c"/";
        let at = types::Fd(libc::AT_FDCWD);
        let entry = opcode::OpenAt::new(at, path.as_ptr()).build().user_data(1);
        // SAFETY: the path is static.
        unsafe { ring.ring.submission().push(&entry).unwrap() };
        ring.in_flight = 1;

        ring.submit();

        assert_eq!(ring.completed(), Some((1, -libc::EACCES)));
    }
}
