//! What is known about files.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use devices::testing::in_a_child;

use super::{c, create, fresh, outcome};

fn set_xattr(path: &Path, name: &str, value: &[u8], flags: i32) -> i64 {
    let (path, name) = (c(path), c(name.as_ref()));
    // SAFETY: all three outlive the call.
    outcome(unsafe {
        let value_ptr = value.as_ptr().cast();
        libc::lsetxattr(path.as_ptr(), name.as_ptr(), value_ptr, value.len(), flags)
    })
}

fn xattr(path: &Path, name: &str) -> Result<Vec<u8>, i64> {
    let (path, name, mut value) = (c(path), c(name.as_ref()), vec![0; 65536]);
    // SAFETY: all three outlive the call, which fills `value`.
    let length = outcome(unsafe {
        libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) as i64
    });
    value.truncate(usize::try_from(length).map_err(|_| length)?);
    Ok(value)
}

#[test]
#[ignore = "part of the checklist"]
fn attributes_of_users_are_set_replaced_listed_and_removed() {
    let path = fresh("xattr");
    create(&path);

    assert_eq!(set_xattr(&path, "user.one", b"1", libc::XATTR_CREATE), 0);
    let again = set_xattr(&path, "user.one", b"2", libc::XATTR_CREATE);
    assert_eq!(again, -i64::from(libc::EEXIST));
    assert_eq!(set_xattr(&path, "user.one", &[7; 3000], libc::XATTR_REPLACE), 0);
    assert_eq!(xattr(&path, "user.one").unwrap(), [7; 3000]);
    let (c_path, mut names) = (c(&path), [0_u8; 1000]);
    // SAFETY: both outlive the call, which fills `names`.
    let length = unsafe { libc::listxattr(c_path.as_ptr(), names.as_mut_ptr().cast(), 1000) };
    let listed = &names[..usize::try_from(length).unwrap()];
    // SAFETY: both strings outlive the call.
    let removed = unsafe { libc::removexattr(c_path.as_ptr(), c"user.one".as_ptr()) };

    assert!(listed.split(|byte| *byte == 0).any(|name| name == b"user.one"));
    assert_eq!(removed, 0);
    assert_eq!(xattr(&path, "user.one"), Err(-i64::from(libc::ENODATA)));
}

#[test]
#[ignore = "part of the checklist"]
fn capabilities_of_a_program_are_kept_until_it_is_written() {
    let path = fresh("capability");
    let file = create(&path);
    // struct vfs_cap_data, revision 2 and effective: CAP_NET_RAW is permitted.
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();

    assert_eq!(set_xattr(&path, "security.capability", &value, 0), 0);
    let kept = xattr(&path, "security.capability");
    std::os::unix::fs::FileExt::write_all_at(&file, b"changed", 0).unwrap();

    assert_eq!(kept.unwrap(), value);
    assert_eq!(xattr(&path, "security.capability"), Err(-i64::from(libc::ENODATA)));
}

#[test]
#[ignore = "part of the checklist"]
fn an_access_list_is_kept_and_shows_in_the_mode() {
    let path = fresh("acl");
    create(&path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    // Version 2, then tag, permissions and id of: owner, user 1000, group, mask, others
    // (linux/posix_acl_xattr.h).
    let entries = [
        (1, 6, u32::MAX),
        (2, 4, 1000),
        (4, 0, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 0, u32::MAX),
    ];
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend([tag, permissions].map(u16::to_le_bytes).concat());
        value.extend(u32::to_le_bytes(id));
    }

    assert_eq!(set_xattr(&path, "system.posix_acl_access", &value, 0), 0);

    assert_eq!(xattr(&path, "system.posix_acl_access").unwrap(), value);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
}

#[test]
#[ignore = "part of the checklist"]
fn times_are_kept_to_the_nanosecond() {
    let path = fresh("times");
    let file = create(&path);
    let accessed = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let modified = SystemTime::UNIX_EPOCH + Duration::new(2_000_000_000, 1);

    file.set_times(fs::FileTimes::new().set_accessed(accessed).set_modified(modified)).unwrap();

    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.accessed().unwrap(), metadata.modified().unwrap()), (accessed, modified));
}

#[test]
#[ignore = "part of the checklist"]
fn a_symbolic_link_has_an_owner_and_times_of_its_own() {
    let (path, target) = (fresh("own-link"), fresh("own-target"));
    create(&target);
    symlink(&target, &path).unwrap();
    let c_path = c(&path);
    let times = [libc::timespec { tv_sec: 1_000_000_000, tv_nsec: 5 }; 2];

    std::os::unix::fs::lchown(&path, Some(1234), Some(1234)).unwrap();
    // SAFETY: path and times outlive the call.
    let set = outcome(unsafe {
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        libc::utimensat(libc::AT_FDCWD, c_path.as_ptr(), times.as_ptr(), flags)
    });

    assert_eq!(set, 0);
    let (link, file) = (fs::symlink_metadata(&path).unwrap(), fs::metadata(&path).unwrap());
    assert_eq!((link.uid(), link.mtime(), link.mtime_nsec()), (1234, 1_000_000_000, 5));
    assert_ne!((file.uid(), file.mtime()), (1234, 1_000_000_000));
}

#[test]
#[ignore = "part of the checklist"]
fn a_new_owner_does_not_inherit_the_right_to_act_as_the_old_one() {
    let path = fresh("suid-chown");
    create(&path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();

    chown(&path, Some(1234), Some(1234)).unwrap();

    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 1234));
    assert_eq!(metadata.mode() & 0o7777, 0o755);
}

#[test]
#[ignore = "part of the checklist"]
fn a_write_of_somebody_else_takes_the_right_to_act_as_the_owner_away() {
    let path = fresh("suid-write");
    create(&path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4777)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();

    let written = in_a_child(|| {
        // SAFETY: numbers, and a byte that outlives the call. The plain system call changes the child.
        unsafe {
            libc::syscall(libc::SYS_setresuid, 1234, 1234, 1234) == 0
                && libc::write(super::fd(&file), c"x".as_ptr().cast(), 1) == 1
        }
    });

    assert!(written);
    // A moment may pass until everybody knows.
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777);
}

#[test]
#[ignore = "part of the checklist"]
fn the_file_system_says_how_large_and_how_full_it_is() {
    let path = c(&super::directory(super::DIRECTORY));
    // SAFETY: plain numbers, of which zeros are valid.
    let mut status: libc::statvfs = unsafe { std::mem::zeroed() };

    // SAFETY: both outlive the call, which fills `status`.
    assert_eq!(unsafe { libc::statvfs(path.as_ptr(), &raw mut status) }, 0);

    assert!(status.f_blocks > 0 && status.f_bfree <= status.f_blocks);
    assert!(status.f_files > 0 && status.f_bsize >= 512);
    assert_eq!(status.f_namemax, 255);
}
