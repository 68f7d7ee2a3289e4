//! Whom a new file belongs to: the identity of a thread while it makes one.

use std::io;

use caps::{CapSet, Capability};
use fuse_backend_rs::api::filesystem::Context;

use super::tree::Tree;

/// No user and no group: who sets it changes nothing and is told what is set.
const NOBODY: u32 = u32::MAX;

/// The thread makes files in the name of somebody else until this is dropped.
///
/// Only the owner of new files changes. The guest's kernel has checked the permission already, and
/// it alone knows all groups of the process; so the host must not refuse what a supplementary group
/// allows, and the thread keeps the right to pass by permission bits.
pub(super) struct Credentials {
    former_uid: libc::uid_t,
    former_gid: libc::gid_t,
}

impl Credentials {
    /// Takes on the identity; the thread must be allowed to (CAP_SETUID and CAP_SETGID).
    pub fn assume(uid: libc::uid_t, gid: libc::gid_t) -> io::Result<Self> {
        let credentials = Credentials { former_gid: set_gid(gid), former_uid: set_uid(uid) };
        if set_gid(gid) != gid || set_uid(uid) != uid {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if uid != credentials.former_uid {
            // Giving up user 0 gave the capability up, too; it comes back with user 0. A process
            // that never had it is bound by what the host says.
            let _ = caps::raise(None, CapSet::Effective, Capability::CAP_DAC_OVERRIDE);
        }
        Ok(credentials)
    }
}

impl Tree {
    /// Makes something new in the name of the guest's process.
    pub fn make<T>(
        &self,
        context: &Context,
        make: impl FnOnce(&Context) -> io::Result<T>,
    ) -> io::Result<T> {
        self.writable()?;
        let _credentials = (self.owner() != (context.uid, context.gid))
            .then(|| Credentials::assume(context.uid, context.gid))
            .transpose()?;
        // The library changes the identity as well, unless it is told that it is root's already.
        make(&Context { uid: 0, gid: 0, pid: context.pid })
    }

    /// Whom new files belong to if nothing is done about it. All requests are served by one thread.
    fn owner(&self) -> (libc::uid_t, libc::gid_t) {
        *self.owner.get_or_init(|| (set_uid(NOBODY), set_gid(NOBODY)))
    }
}

impl Drop for Credentials {
    fn drop(&mut self) {
        set_uid(self.former_uid);
        set_gid(self.former_gid);
    }
}

/// Sets the user of this thread for file access and returns the former one, whether or not it worked.
fn set_uid(uid: libc::uid_t) -> libc::uid_t {
    // SAFETY: the call takes a number, touches no memory and changes this thread only.
    unsafe { libc::setfsuid(uid) as libc::uid_t }
}

/// Sets the group of this thread for file access and returns the former one, whether or not it worked.
fn set_gid(gid: libc::gid_t) -> libc::gid_t {
    // SAFETY: the call takes a number, touches no memory and changes this thread only.
    unsafe { libc::setfsgid(gid) as libc::gid_t }
}
