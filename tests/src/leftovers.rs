//! Finds what a container must not leave on the host.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::RESULT_TIMEOUT;

/// Fails with the list of what is still there when a test has been done with it for a while.
pub fn assert_nothing_left() {
    let deadline = Instant::now() + RESULT_TIMEOUT;
    let mut left = leftovers();
    while !left.is_empty() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(200));
        left = leftovers();
    }
    assert!(left.is_empty(), "left behind: {left:#?}");
}

/// Processes, mounts, taps, cgroups and state folders of Coracle that exist right now.
fn leftovers() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let executable = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        if executable.file_name().is_some_and(|name| name == "coracle") {
            let command = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            let pid = entry.file_name();
            found.push(format!(
                "process {}: {}",
                pid.to_string_lossy(),
                command.replace('\0', " ")
            ));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    found.extend(
        mounts.lines().filter(|line| line.contains("/run/coracle/")).map(|m| format!("mount {m}")),
    );
    let links = fs::read_dir("/sys/class/net").expect("/sys is mounted").flatten();
    found.extend(
        links
            .map(|link| link.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("tap"))
            .map(|name| format!("interface {name}")),
    );
    if let Ok(states) = fs::read_dir("/run/coracle") {
        found.extend(states.flatten().map(|state| format!("state {}", state.path().display())));
    }
    found.extend(cgroups("/sys/fs/cgroup".as_ref(), 3));
    found
}

fn cgroups(directory: &std::path::Path, depth: u32) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .flat_map(|entry| {
            let mut found = Vec::new();
            if entry.file_name().to_string_lossy().starts_with("coracle-test") {
                found.push(format!("cgroup {}", entry.path().display()));
            }
            if depth > 0 {
                found.extend(cgroups(&entry.path(), depth - 1));
            }
            found
        })
        .collect()
}
