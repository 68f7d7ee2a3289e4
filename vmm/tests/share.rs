//! A guest's programs find in a share what they find in a file system of the host.

mod checklist;
mod guest;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use checklist::{DIRECTORY, FILES, MANY};
use guest::{Ended, Guest, wait};
use tempfile::TempDir;
use vmm::{CachePolicy, Exit, ShareConfig, VmHandle};

/// Generous, because the lab emulates a processor.
const PATIENCE: Duration = Duration::from_secs(900);

/// Room for what a guest knows of tens of thousands of files.
const MEMORY_MIB: u32 = 1024;

/// A guest that mounts a share with `options` and runs the checklist in it, or what of it `filter` says.
fn check(share: ShareConfig, options: &str, filter: &str) {
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    fs::create_dir_all(share.path.join("work")).unwrap();
    let path = share.path.clone();
    let script = format!(
        "mount -t virtiofs {options} share /mnt || echo cannot mount
         mkdir /tmp; export {DIRECTORY}=/mnt/work {MANY}=/mnt/many
         /checklist --ignored --test-threads=1 {filter} > /mnt/log 2>&1",
    );
    let mut guest = Guest::with_program(&script, "checklist", &program);
    guest.patience = PATIENCE;
    guest.config.memory.size_mib = MEMORY_MIB;
    guest.config.shares = vec![share];

    let ended = guest.run();

    let log = fs::read_to_string(path.join("log")).unwrap_or_default();
    assert!(log.contains("test result: ok."), "{log}\n{ended:?}");
    assert!(!log.contains("running 0 tests"), "{log}");
    assert!(matches!(ended.exit, Exit::PowerOff | Exit::Reset), "{ended:?}");
}

fn share(folder: &TempDir) -> ShareConfig {
    ShareConfig::new("share", folder.path().into())
}

/// All of the checklist but what needs many files.
const SMALL: &str = "checklist:: --skip many";

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_checklist_holds_in_a_share() {
    let folder = TempDir::new().unwrap();

    check(share(&folder), "", SMALL);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_checklist_holds_through_a_window() {
    let folder = TempDir::new().unwrap();

    check(ShareConfig { dax_mib: 64, ..share(&folder) }, "-o dax=always", SMALL);
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_checklist_holds_whatever_is_cached() {
    for cache in [CachePolicy::Never, CachePolicy::Always] {
        let folder = TempDir::new().unwrap();
        // Without a cache there are no shared mappings that can be written.
        let skip = if cache == CachePolicy::Never { "--skip mapping" } else { "" };

        check(ShareConfig { cache, ..share(&folder) }, "", &format!("{SMALL} {skip}"));
    }
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_checklist_holds_with_writes_kept_back() {
    let folder = TempDir::new().unwrap();
    let share = ShareConfig { writeback: true, ..share(&folder) };

    // The guest goes by the mode that it knows, for a second.
    check(share, "", &format!("{SMALL} --skip access_list"));
}

/// A directory with as many files as the checklist wants.
fn with_many_files() -> TempDir {
    let folder = TempDir::new().unwrap();
    let many = folder.path().join("many");
    fs::create_dir(&many).unwrap();
    for n in 0..FILES {
        fs::write(many.join(n.to_string()), n.to_string()).unwrap();
    }
    folder
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn twenty_thousand_files_are_listed_and_8192_are_open_at_once() {
    check(share(&with_many_files()), "", "checklist::many");
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn what_is_read_through_a_window_is_not_in_the_guests_memory() {
    const MIB: usize = 64;
    let folder = TempDir::new().unwrap();
    let large = folder.path().join("large");
    fs::write(&large, vec![7; MIB << 20]).unwrap();
    let mut guest = Guest::new(
        "mount -t virtiofs -o dax=always share /mnt; cat /mnt/large | md5sum
         grep -E '^(Cached|MemFree):' /proc/meminfo",
    );
    // Smaller than the file, so that places in it are used again.
    guest.config.shares = vec![ShareConfig { dax_mib: 16, ..share(&folder) }];

    let ended = guest.run();

    let sum = Command::new("md5sum").arg(&large).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap();
    assert!(ended.output.contains(sum.split(' ').next().unwrap()), "{ended:?}");
    assert!(kib(&ended, "Cached:") < 16 << 10, "{ended:?}");
    assert!(kib(&ended, "MemFree:") > (256 - 80) << 10, "{ended:?}");
}

fn kib(ended: &Ended, field: &str) -> usize {
    let rest = ended.output.split(field).nth(1).expect("the field is printed");
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn a_file_that_the_host_truncates_is_zeros_to_a_guest_that_has_it_mapped() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, vec![b'x'; 3 << 20]).unwrap();
    let mut guest = Guest::new(
        "mount -t virtiofs -o dax=always share /mnt; tr -d '\\0' < /mnt/file | wc -c
         echo > /mnt/read; until [ -e /mnt/truncated ]; do sleep 1; done
         tr -d '\\0' < /mnt/file | wc -c; echo grown > /mnt/other; cat /mnt/other",
    );
    // For a day the guest goes by the size that it knows.
    let cache = CachePolicy::Always;
    guest.config.shares = vec![ShareConfig { dax_mib: 16, cache, ..share(&folder) }];

    let vm = guest.start();
    await_file(&folder.path().join("read"), &vm);
    fs::File::options().write(true).open(&file).unwrap().set_len(4096).unwrap();
    fs::write(folder.path().join("truncated"), "").unwrap();
    let ended = wait(vm);

    let words: Vec<_> = ended.output.split_whitespace().collect();
    assert_eq!(words[..3], ["3145728", "4096", "grown"], "{ended:?}");
}

fn await_file(path: &Path, vm: &VmHandle) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < PATIENCE, "the guest printed: {}", vm.console_tail());
        std::thread::sleep(Duration::from_millis(50));
    }
}
