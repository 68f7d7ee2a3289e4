//! What must hold for the whole tree and no compiler checks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const MOST_LINES_OF_A_FILE: usize = 500;
const MOST_LINES_OF_A_FUNCTION: usize = 60;

/// One source file without its test module.
struct Source {
    path: String,
    lines: Vec<String>,
    is_test: bool,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in the tree").to_owned()
}

fn sources() -> Vec<Source> {
    let root = repository();
    let mut found = Vec::new();
    let members = ["agent", "arch", "devices", "perf", "rootfs", "runtime-cli", "tests", "vmm"];
    let mut folders: Vec<PathBuf> = members.iter().map(|member| root.join(member)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of the tree").flatten() {
            let path = entry.path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(read(&root, &path));
            }
        }
    }
    found
}

fn read(root: &Path, path: &Path) -> Source {
    let text = fs::read_to_string(path).expect("a file of the tree");
    let name = path.strip_prefix(root).expect("it is in the tree").display().to_string();
    let stem = path.file_stem().expect("it has a name").to_string_lossy();
    let is_test = name.contains("tests/") || stem.ends_with("tests") || stem == "testing";
    let all: Vec<String> = text.lines().map(str::to_owned).collect();
    let end = all
        .windows(2)
        .position(|pair| {
            pair[0] == "#[cfg(test)]" && pair[1].contains("mod ") && pair[1].ends_with('{')
        })
        .unwrap_or(all.len());
    Source { path: name, lines: all[..end].to_vec(), is_test }
}

#[track_caller]
fn assert_none(rule: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{rule}:\n{}", offenders.join("\n"));
}

/// `path:line` of every line of product code that `wrong` points at.
fn offending(wrong: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    sources()
        .iter()
        .filter(|source| !source.is_test)
        .flat_map(|source| {
            let lines = source.lines.iter().zip(1..);
            lines
                .filter(|(line, _)| wrong(source, line))
                .map(|(line, number)| format!("{}:{number}: {}", source.path, line.trim()))
                .collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn every_file_opens_with_what_it_is() {
    let offenders: Vec<String> = sources()
        .iter()
        .filter(|source| !source.lines.first().is_some_and(|line| line.starts_with("//! ")))
        .map(|source| source.path.clone())
        .collect();

    assert_none("the first line is `//! ` and a sentence", &offenders);
}

#[test]
fn no_file_is_longer_than_one_can_read() {
    let offenders: Vec<String> = sources()
        .iter()
        .filter(|source| !source.is_test && source.lines.len() > MOST_LINES_OF_A_FILE)
        .map(|source| format!("{}: {} lines", source.path, source.lines.len()))
        .collect();

    assert_none("a file is too long", &offenders);
}

#[test]
fn no_function_is_longer_than_one_can_see() {
    let mut offenders = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test) {
        for (start, line) in source.lines.iter().enumerate() {
            let text = line.trim_start();
            let indent = &line[..line.len() - text.len()];
            let is_function = ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn ", "const fn "]
                .iter()
                .any(|head| text.starts_with(head));
            let closing = format!("{indent}}}");
            if !is_function || text.ends_with(';') {
                continue;
            }
            let length = source.lines[start..].iter().position(|line| *line == closing);
            if length.is_some_and(|length| length + 1 > MOST_LINES_OF_A_FUNCTION) {
                offenders.push(format!("{}:{}", source.path, start + 1));
            }
        }
    }

    assert_none("a function is too long", &offenders);
}

#[test]
fn only_arch_knows_architectures() {
    // The CLI's own data on architectures is the OCI's: seccomp profiles name them.
    let offenders =
        offending(|source, line| line.contains("target_arch") && !source.path.starts_with("arch/"));

    assert_none("cfg(target_arch) outside arch/", &offenders);
}

#[test]
fn the_architectures_have_the_same_files() {
    let files = |folder: &str| -> BTreeSet<String> {
        fs::read_dir(repository().join("arch/src").join(folder))
            .expect("the architecture has a folder")
            .flatten()
            .filter(|entry| entry.path().is_file())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    };

    assert_eq!(files("aarch64"), files("x86_64"));
    assert_eq!(files("ppc64le"), files("x86_64"));
}

#[test]
fn nothing_is_unwrapped_or_put_off() {
    let offenders = offending(|_, line| {
        let code = line.split("//").next().unwrap_or_default();
        code.contains(".unwrap()") || line.contains("todo!") || line.contains("TODO")
    });

    assert_none("unwrap() or TODO in product code", &offenders);
}

/// Cargo drops a patch without a word if its version does not fit any more.
#[test]
fn no_crate_brings_the_large_regular_expressions() {
    let lock = fs::read_to_string(repository().join("Cargo.lock")).expect("the tree has one");

    assert!(!lock.contains("\"regex-automata\""), "the version in runtime-cli/regex does not fit");
}

#[test]
fn crates_depend_in_one_direction() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("agent/protocol", &[][..]),
        ("agent", &["agent-protocol"][..]),
        ("arch", &[]),
        ("devices", &[]),
        ("vmm", &["arch", "devices"]),
        ("runtime-cli", &["agent-protocol", "vmm"]),
        ("rootfs", &[]),
    ]);
    let ours = ["agent-protocol", "arch", "coracle", "devices", "vmm"];
    let mut offenders = Vec::new();
    for (folder, allowed) in allowed {
        let manifest = fs::read_to_string(repository().join(folder).join("Cargo.toml"))
            .expect("the crate has a manifest");
        for name in ours {
            let used = manifest.lines().any(|line| line.starts_with(&format!("{name}.workspace")));
            if used && !allowed.contains(&name) {
                offenders.push(format!("{folder} depends on {name}"));
            }
        }
    }

    assert_none("a dependency against the direction", &offenders);
}
