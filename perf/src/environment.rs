//! Where a run took place: figures mean nothing without it.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The machine and the programs of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Name of the processor.
    pub machine: String,
    /// How many processors there are.
    pub processors: usize,
    /// All memory, in MiB.
    pub memory_mib: u64,
    /// Version of the host's kernel.
    pub kernel: String,
    /// Whether the processor is emulated by QEMU: then times rank nothing but themselves.
    pub emulated: bool,
    /// Whether each instruction counts as a nanosecond.
    pub counts_instructions: bool,
    /// First line of `--version` of every program that is compared.
    pub versions: Vec<String>,
}

impl Environment {
    /// That of this process, for a run that compares `programs`.
    pub fn of(programs: &[&str]) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        // Machines that are described by a device tree have no such line.
        let model = fs::read_to_string("/sys/firmware/devicetree/base/model").unwrap_or_default();
        let model = Some(model.trim_end_matches('\0')).filter(|model| !model.is_empty());
        let machine = value(&cpuinfo, "model name").or(model).unwrap_or("unknown").to_owned();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory_kib = value(&meminfo, "MemTotal")
            .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Environment {
            emulated: counts_instructions()
                || ["QEMU", "TCG", "dummy-virt"].iter().any(|name| machine.contains(name)),
            machine,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib.unwrap_or(0) / 1024,
            kernel: kernel.trim().to_owned(),
            counts_instructions: counts_instructions(),
            versions: programs.iter().filter_map(|program| version(program)).collect(),
        }
    }
}

/// Whether the clock here counts instructions, one as a nanosecond.
pub fn counts_instructions() -> bool {
    std::env::var("LAB_ICOUNT").is_ok_and(|value| value == "1")
}

/// The value of the first line of `text` that is `key: value`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

/// What `program` says of itself, if it is there.
fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_by_its_key() {
        let text = "processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n";

        assert_eq!(value(text, "model name"), Some("QEMU TCG CPU version 2.5+"));
        assert_eq!(value(text, "model"), None);
    }

    #[test]
    fn a_program_that_is_not_there_has_no_version() {
        assert_eq!(version("/nonexistent/program"), None);
    }
}
