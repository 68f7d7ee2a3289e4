//! Who a process is: groups, ids, and the home directory that follows from them (config.md, User).

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use agent_protocol::Process;
use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

/// The container chooses how large its passwd file is; more than this is not read.
const MAX_PASSWD_BYTES: u64 = 1 << 20;

/// Takes the process's groups and ids. The order matters: each step needs the rights that the next
/// one gives up.
pub fn become_user(process: &Process) -> nix::Result<()> {
    let groups: Vec<Gid> = process.additional_gids.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups)?;
    setgid(Gid::from_raw(process.gid))?;
    setuid(Uid::from_raw(process.uid))
}

/// Gives stdio to the user, so that programs can reopen `/dev/stdout`.
pub fn own_stdio(uid: u32) -> nix::Result<()> {
    for descriptor in 0..=2 {
        // SAFETY: descriptors 0 to 2 are open in every process the agent makes.
        let descriptor = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
        let null = nix::sys::stat::fstat(descriptor)?.st_rdev == nix::sys::stat::makedev(1, 3);
        if null {
            continue;
        }
        match nix::unistd::fchown(descriptor, Some(Uid::from_raw(uid)), None) {
            Ok(()) | Err(Errno::EPERM | Errno::EINVAL | Errno::EROFS) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Home directory of `uid` according to the `/etc/passwd` of this root, `/` if it has none.
pub fn home(uid: u32) -> String {
    passwd().ok().and_then(|text| home_in(&text, uid)).unwrap_or_else(|| "/".to_owned())
}

/// Reads the container's passwd file, which may be anything: a pipe must not block, a device must
/// not be read without end.
fn passwd() -> io::Result<String> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/etc/passwd")?;
    if !file.metadata()?.is_file() {
        return Err(Errno::EINVAL.into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_PASSWD_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Field 6 of the first line whose third field is `uid` (passwd(5)).
fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found: u32 = fields.next()?.parse().ok()?;
        let home = fields.nth(2)?;
        (found == uid && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nme:x:1000:100::/home/me:/bin/sh\n";

    #[test]
    fn home_is_the_sixth_field_of_the_users_line() {
        assert_eq!(home_in(PASSWD, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(PASSWD, 1000).as_deref(), Some("/home/me"));
    }

    #[test]
    fn an_unknown_user_has_no_home() {
        assert_eq!(home_in(PASSWD, 7), None);
    }
}
