//! Who is at the other end of a connection to the control socket.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::prctl::set_dumpable;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::{Pid, geteuid};
use vmm::UserConfig;

/// The process that connected, as it was then (unix(7), `SO_PEERCRED`).
#[derive(Debug, Clone)]
pub struct Asker {
    /// Its number in this namespace; 0 if it has none here.
    pub process: Pid,
    user: UserConfig,
    groups: Vec<libc::gid_t>,
}

impl Asker {
    /// The one at the other end of `stream`.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let peer = getsockopt(stream, PeerCredentials)?;
        let user = UserConfig { uid: peer.uid(), gid: peer.gid() };
        Ok(Asker { process: Pid::from_raw(peer.pid()), user, groups: groups(stream)? })
    }

    /// Takes from the calling thread, for good, what it may and the asker may not: root's threads become
    /// the asker. Others can become nobody else, and whoever may connect to them may as much as they.
    pub fn lend_rights(&self) -> io::Result<()> {
        if self.user.uid == 0 || !geteuid().is_root() {
            return Ok(());
        }
        vmm::become_less(self.user, &self.groups)?;
        // Where fs.suid_dumpable is 1 it could trace this thread, which has its user now and root's memory.
        Ok(set_dumpable(false)?)
    }
}

/// The further groups of the process at the other end of `stream` (`SO_PEERGROUPS`).
fn groups(stream: &UnixStream) -> io::Result<Vec<libc::gid_t>> {
    let mut groups: Vec<libc::gid_t> = Vec::new();
    // The first time to learn how many there are.
    loop {
        let bytes = size_of::<libc::gid_t>() * groups.len();
        let mut bytes = libc::socklen_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: there is room for as many bytes as is said, and both outlive the call.
        let outcome = Errno::result(unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        });
        // In any case the kernel says how many bytes they have.
        let count = usize::try_from(bytes).map_err(io::Error::other)? / size_of::<libc::gid_t>();
        match outcome {
            Err(Errno::ERANGE) if count > groups.len() => groups.resize(count, 0),
            Err(error) => return Err(error.into()),
            Ok(_) => {
                groups.truncate(count);
                return Ok(groups);
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs::File;

    use nix::unistd::{getegid, getgroups};

    use super::*;

    /// A process of `uid` that there is not.
    pub fn of_user(uid: u32) -> Asker {
        Asker { process: Pid::from_raw(0), user: UserConfig { uid, gid: uid }, groups: vec![] }
    }

    #[test]
    fn the_other_end_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let asker = Asker::of(&one).unwrap();
        let user = UserConfig { uid: geteuid().as_raw(), gid: getegid().as_raw() };
        assert_eq!((asker.process, asker.user), (Pid::this(), user));
        let own: Vec<_> = getgroups().unwrap().into_iter().map(|group| group.as_raw()).collect();
        assert_eq!(asker.groups, own);
    }

    #[test]
    #[ignore = "needs root"]
    fn a_thread_of_root_may_no_more_than_who_asks() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = |uid| {
            let open = || of_user(uid).lend_rights().and_then(|()| File::open(file.path()));
            std::thread::scope(|scope| scope.spawn(open).join().unwrap())
        };

        open(0).unwrap();
        assert_eq!(open(65_534).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        // The other threads are who they were.
        open(0).unwrap();
    }
}
