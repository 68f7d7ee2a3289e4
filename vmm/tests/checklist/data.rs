//! What is in files, and where.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::ptr;

use super::{c, create, directory, fd, fresh, outcome};

const MIB: usize = 1 << 20;

#[test]
#[ignore = "part of the checklist"]
fn space_is_allocated_punched_out_and_zeroed() {
    let path = fresh("fallocate");
    let file = create(&path);
    // SAFETY: takes numbers only.
    let fallocate =
        |mode, offset, length| outcome(unsafe { libc::fallocate(fd(&file), mode, offset, length) });

    assert_eq!(fallocate(0, 0, 8192), 0);
    file.write_all_at(&[7; 16384], 0).unwrap();
    assert_eq!(fallocate(libc::FALLOC_FL_KEEP_SIZE, 0, 1 << 20), 0);
    assert_eq!(fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 4096, 4096), 0);
    assert_eq!(fallocate(libc::FALLOC_FL_ZERO_RANGE, 12288, 8192), 0);

    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 20480);
    assert!(bytes[..4096].iter().chain(&bytes[8192..12288]).all(|byte| *byte == 7));
    assert!(bytes[4096..8192].iter().chain(&bytes[12288..]).all(|byte| *byte == 0));
    assert!(file.metadata().unwrap().blocks() >= 2000);
}

#[test]
#[ignore = "part of the checklist"]
fn holes_are_found_between_data() {
    let file = create(&fresh("sparse"));
    file.write_all_at(b"end", MIB as u64).unwrap();
    file.sync_all().unwrap();
    // SAFETY: takes numbers only.
    let seek = |offset, whence| outcome(unsafe { libc::lseek(fd(&file), offset, whence) });

    assert_eq!(seek(0, libc::SEEK_HOLE), 0);
    assert_eq!(seek(0, libc::SEEK_DATA), MIB as i64);
    assert_eq!(seek(MIB as i64, libc::SEEK_HOLE), MIB as i64 + 3);
    assert_eq!(seek(MIB as i64 + 3, libc::SEEK_DATA), -i64::from(libc::ENXIO));
}

#[test]
#[ignore = "part of the checklist"]
fn a_range_is_copied_from_file_to_file() {
    let (from, to) = (create(&fresh("copy-from")), create(&fresh("copy-to")));
    let data: Vec<u8> = (0..3 * MIB).map(|at| u8::try_from(at / 1000 % 251).unwrap()).collect();
    from.write_all_at(&data, 0).unwrap();
    let (mut offset_in, mut offset_out, mut left) = (1000_i64, 5_i64, 2 * MIB);

    while left > 0 {
        // SAFETY: the offsets outlive the call.
        let copied = unsafe {
            let (in_, out) = (&raw mut offset_in, &raw mut offset_out);
            libc::copy_file_range(fd(&from), in_, fd(&to), out, left, 0)
        };
        left -= usize::try_from(copied).unwrap();
    }

    let mut copy = vec![0; 2 * MIB];
    to.read_exact_at(&mut copy, 5).unwrap();
    assert!(copy == data[1000..1000 + 2 * MIB]);
    assert_eq!((offset_in, offset_out), (1000 + 2 * MIB as i64, 5 + 2 * MIB as i64));
    assert_eq!(to.metadata().unwrap().len(), 5 + 2 * MIB as u64);
}

#[test]
#[ignore = "part of the checklist"]
fn a_file_without_a_name_gets_one_when_it_is_done() {
    let path = fresh("named-later");
    let mut file = File::options()
        .read(true)
        .write(true)
        .mode(0o640)
        .custom_flags(libc::O_TMPFILE)
        .open(directory(super::DIRECTORY))
        .unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.write_all(b"done").unwrap();
    let magic = c(format!("/proc/self/fd/{}", fd(&file)).as_ref());

    // SAFETY: both paths outlive the call.
    let linked = outcome(unsafe {
        let (from, to) = (magic.as_ptr(), c(&path));
        libc::linkat(libc::AT_FDCWD, from, libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW)
    });

    assert_eq!(linked, 0);
    assert_eq!(fs::read(&path).unwrap(), b"done");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    file.write_all(b", and more").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 14);
}

#[test]
#[ignore = "part of the checklist"]
fn a_file_that_never_gets_a_name_is_used_like_any_other() {
    let path = directory(super::DIRECTORY);
    let flags = libc::O_TMPFILE | libc::O_EXCL;
    let mut file = File::options().read(true).write(true).custom_flags(flags).open(&path).unwrap();

    file.write_all(&[7; 10000]).unwrap();
    file.set_len(5000).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    let again = fs::read(format!("/proc/self/fd/{}", fd(&file))).unwrap();
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    file.sync_all().unwrap();

    assert_eq!(bytes, [7; 5000]);
    assert_eq!(again, [7; 5000]);
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
}

#[test]
#[ignore = "part of the checklist"]
fn data_goes_past_the_page_cache_when_it_is_to() {
    let path = fresh("direct");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    let mut pages = vec![0_u8; 3 * 4096];
    let skip = pages.as_ptr().align_offset(4096);
    let page = &mut pages[skip..skip + 8192];
    page.fill(7);

    file.write_all_at(page, 0).unwrap();
    page.fill(0);
    file.read_exact_at(page, 0).unwrap();

    assert!(page.iter().all(|byte| *byte == 7));
    assert_eq!(fs::read(&path).unwrap(), [7; 8192]);
}

#[test]
#[ignore = "part of the checklist"]
fn what_is_written_to_a_shared_mapping_is_in_the_file() {
    let path = fresh("mapped");
    let file = create(&path);
    file.set_len(3 * MIB as u64).unwrap();
    let protection = libc::PROT_READ | libc::PROT_WRITE;

    // SAFETY: a new mapping at an address of the kernel's choice, which only this test knows, of a
    // file as long as the accesses to it reach.
    unsafe {
        let map = libc::mmap(ptr::null_mut(), 3 * MIB, protection, libc::MAP_SHARED, fd(&file), 0);
        assert_ne!(map, libc::MAP_FAILED);
        let bytes = std::slice::from_raw_parts_mut(map.cast::<u8>(), 3 * MIB);
        bytes[0] = 1;
        bytes[3 * MIB - 1] = 2;
        assert_eq!(libc::msync(map, 3 * MIB, libc::MS_SYNC), 0);
        file.write_all_at(&[3], MIB as u64).unwrap();
        assert_eq!(bytes[MIB], 3);
        libc::munmap(map, 3 * MIB);
    }

    let bytes = fs::read(&path).unwrap();
    assert_eq!((bytes[0], bytes[MIB], bytes[3 * MIB - 1], bytes[1]), (1, 3, 2, 0));
}

#[test]
#[ignore = "part of the checklist"]
fn a_file_that_is_gone_can_be_used_by_who_has_it_open() {
    let path = fresh("unlinked");
    let file = create(&path);
    file.write_all_at(b"kept", 0).unwrap();

    fs::remove_file(&path).unwrap();

    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"kept");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.set_len(2).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2);
    assert!(!path.exists());
}

#[test]
#[ignore = "part of the checklist"]
fn appends_go_to_the_end_wherever_that_is() {
    let path = fresh("appended");
    let mut writer = create(&path);
    let mut appender = File::options().append(true).open(&path).unwrap();

    writer.write_all(b"one ").unwrap();
    appender.write_all(b"two ").unwrap();
    writer.write_all_at(b"ONE", 0).unwrap();
    appender.write_all(b"three").unwrap();

    assert_eq!(fs::read(&path).unwrap(), b"ONE two three");
}

#[test]
#[ignore = "part of the checklist"]
fn a_file_that_shrinks_and_grows_has_zeros_at_its_end() {
    let path = fresh("truncated");
    let file = create(&path);
    file.write_all_at(&[7; 10000], 0).unwrap();

    file.set_len(5000).unwrap();
    file.set_len(3 * MIB as u64).unwrap();

    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 3 * MIB);
    assert!(bytes[..5000].iter().all(|byte| *byte == 7));
    assert!(bytes[5000..].iter().all(|byte| *byte == 0));
}
