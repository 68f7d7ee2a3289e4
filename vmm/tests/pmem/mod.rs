//! Files of the host are memory of a Linux guest.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use tempfile::{NamedTempFile, TempDir};
use vmm::{PmemConfig, VmHandle};

use crate::assert_ended_by_guest;
use crate::guest::{Guest, wait};

/// Size of the file in most of these tests: not a whole number of MiB, nor of pages.
const FILE_BYTES: usize = (5 << 20) + 777;

/// A file of which no two pages are the same.
fn file() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let words: Vec<u8> = (0..FILE_BYTES.div_ceil(8) as u64).flat_map(u64::to_le_bytes).collect();
    file.write_all(&words[..FILE_BYTES]).unwrap();
    file
}

fn guest(script: &str, path: &Path, read_only: bool) -> Guest {
    // Without the driver the device's name would be that of a plain file.
    let missing = "echo no /dev/pmem0: the kernel needs CONFIG_NVDIMM_PFN or CONFIG_BTT";
    let script = format!("if [ -b /dev/pmem0 ]; then\n{script}\nelse {missing}; fi");
    let mut guest = Guest::new(&script);
    guest.config.pmem = vec![PmemConfig { id: "image".into(), path: path.into(), read_only }];
    guest
}

/// The checksum of `path`, as the guest prints that of the same bytes.
fn sum(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap().stdout;
    String::from_utf8(output).unwrap().split_whitespace().next().unwrap().to_owned()
}

/// `(resident, of these not of the page cache)` of where this process maps `path`, in KiB.
fn resident_kib(path: &Path) -> (u64, u64) {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
    let mut field = |name: &str| {
        let line = lines.find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("Rss:"), field("Anonymous:"))
}

#[track_caller]
fn await_word(vm: &VmHandle, word: &str) {
    while !vm.console_tail().contains(word) {
        let late = vm.has_ended() || vm.console_tail().contains("SCRIPT-ENDS");
        assert!(!late, "{}", vm.console_tail());
        std::thread::yield_now();
    }
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_reads_the_file_and_zeros_behind_it() {
    let file = file();
    let guest = guest(
        &format!(
            "cat /sys/block/pmem0/size
             head -c {FILE_BYTES} /dev/pmem0 | sha256sum
             tail -c +{} /dev/pmem0 | tr -d '\\0' | wc -c; echo READ; sleep 100",
            FILE_BYTES + 1
        ),
        file.path(),
        true,
    );
    let vm = guest.start();

    await_word(&vm, "READ");

    let output = vm.console_tail();
    let words: Vec<_> = output.split("SCRIPT-STARTS").last().unwrap().split_whitespace().collect();
    let sectors = (6 << 20) / 512;
    assert_eq!(words[..4], [&sectors.to_string()[..], &sum(file.path()), "-", "0"], "{output}");
    let (resident, own) = resident_kib(file.path());
    assert!(resident >= 5 << 10, "{resident} KiB are resident");
    assert_eq!(own, 0, "the guest made copies of pages it only read");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn what_the_guest_writes_stays_in_the_guest() {
    let file = file();
    let before = sum(file.path());
    let guest = guest(
        "echo written | dd of=/dev/pmem0 bs=4096 conv=sync,fsync 2>/dev/null
         echo 3 > /proc/sys/vm/drop_caches; head -c 7 /dev/pmem0",
        file.path(),
        false,
    );

    let ended = guest.run();

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("written"), "{ended:?}");
    assert_eq!(sum(file.path()), before);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_guest_that_writes_to_a_read_only_file_goes_on_without_effect() {
    let file = file();
    let guest = guest(
        "echo written | dd of=/dev/pmem0 bs=4096 conv=sync,fsync 2>/dev/null
         echo 3 > /proc/sys/vm/drop_caches; head -c 7 /dev/pmem0 | grep -c written; echo ALIVE
         sleep 100",
        file.path(),
        true,
    );
    let vm = guest.start();

    await_word(&vm, "ALIVE");

    assert!(vm.console_tail().contains("0\nALIVE"), "{}", vm.console_tail());
    assert_eq!(resident_kib(file.path()).1, 0, "the guest wrote");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_read_only_file_stays_as_it_is_whatever_becomes_of_who_writes_to_it() {
    let file = file();
    let before = sum(file.path());
    let guest = guest(
        "echo WRITES; echo written | dd of=/dev/pmem0 bs=4096 conv=sync,fsync 2>/dev/null",
        file.path(),
        true,
    );

    let ended = guest.run();

    assert!(ended.output.contains("WRITES"), "{ended:?}");
    assert_eq!(sum(file.path()), before);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_mounts_an_image_without_copying_it() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("hello"), "from the image").unwrap();
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(8 << 20).unwrap();
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-b", "4096", "-d"])
        .args([folder.path(), image.path()])
        .status()
        .unwrap();
    assert!(made.success());
    let guest = guest(
        "mount -t ext4 -o ro,dax=always /dev/pmem0 /mnt && cat /mnt/hello; grep pmem0 /proc/mounts",
        image.path(),
        true,
    );

    let vm = guest.start();
    let ended = wait(vm);

    assert_ended_by_guest(&ended);
    assert!(ended.output.contains("from the image"), "{ended:?}");
    assert!(ended.output.contains("dax=always"), "{ended:?}");
}
