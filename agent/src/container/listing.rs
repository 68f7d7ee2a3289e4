//! What there is to know about a running process, from `/proc` (proc(5)).

use std::fs::File;
use std::io::{self, Read};

use agent_protocol::ProcessInfo;
use nix::unistd::{SysconfVar, sysconf};

/// Longest command line told; the process chooses its own.
const MAX_COMMAND_BYTES: usize = 4096;

/// Most bytes all command lines of a list share; together with the rest they have to fit a frame.
const MAX_COMMANDS_BYTES: usize = 1 << 20;

/// Largest `stat` or `status`; the latter has some 60 lines.
const MAX_FILE_BYTES: usize = 16 << 10;

/// Describes those of the processes `pids` that are not gone.
pub fn describe(pids: &[i32]) -> Vec<ProcessInfo> {
    let most = command_bytes(pids.len());
    pids.iter().filter_map(|pid| describe_one(*pid, most)).collect()
}

/// Longest command line in a list of `count` processes.
fn command_bytes(count: usize) -> usize {
    MAX_COMMAND_BYTES.min(MAX_COMMANDS_BYTES / count.max(1))
}

fn describe_one(pid: i32, command_bytes: usize) -> Option<ProcessInfo> {
    // A name need not be UTF-8, and the command line is as long as the process likes: it chooses
    // the part of its memory that is read here (prctl(2), PR_SET_MM_MAP).
    let file = |name: &str, most| read(&format!("/proc/{pid}/{name}"), most).ok();
    let text = |name| Some(String::from_utf8_lossy(&file(name, MAX_FILE_BYTES)?).into_owned());
    let (stat, status) = (text("stat")?, text("status")?);
    let arguments = file("cmdline", command_bytes)?;
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|hz| u64::try_from(hz).ok());
    parse(pid, &stat, &status, &arguments, ticks.unwrap_or(100))
}

fn read(path: &str, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Field numbers in `stat` count from the state, which is field 3 of proc(5).
fn parse(pid: i32, stat: &str, status: &str, arguments: &[u8], hz: u64) -> Option<ProcessInfo> {
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let ticks = number(14)?.saturating_add(number(15)?);
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    Some(ProcessInfo {
        pid,
        ppid: fields.get(1)?.parse().ok()?,
        uid: uids.split_whitespace().nth(1)?.parse().ok()?,
        cpu_ms: ticks.saturating_mul(1000) / hz,
        tty: terminal(fields.get(4)?.parse().ok()?),
        command: command(arguments, name),
    })
}

/// Name of a terminal by its device number (Documentation/admin-guide/devices.txt: 136 and up are
/// Unix98 slaves).
fn terminal(number: i32) -> String {
    // Printed as signed, but all 32 bits are used.
    let number = u32::from_ne_bytes(number.to_ne_bytes());
    let (major, minor) = ((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xfff00));
    match major {
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        _ => String::new(),
    }
}

fn command(arguments: &[u8], name: &str) -> String {
    let text = String::from_utf8_lossy(arguments).replace('\0', " ");
    match text.trim_end() {
        "" => format!("[{name}]"),
        text => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "42 (a) (b) S 7 42 42 34816 42 4194304 1 2 3 4 150 50 0 0 20 0 1 0 9";
    const STATUS: &str = "Name:\ta\nUid:\t1000\t1001\t1002\t1003\n";

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let found = parse(42, STAT, STATUS, b"sleep\x0010\0", 100).unwrap();

        assert_eq!((found.ppid, found.uid, found.cpu_ms), (7, 1001, 2000));
        assert_eq!(found.tty, "pts/0");
        assert_eq!(found.command, "sleep 10");
    }

    #[test]
    fn without_arguments_the_name_is_told() {
        assert_eq!(parse(42, STAT, STATUS, b"", 100).unwrap().command, "[a) (b]");
    }

    #[test]
    fn the_more_processes_the_shorter_are_their_command_lines() {
        assert_eq!(command_bytes(1), MAX_COMMAND_BYTES);
        assert_eq!(command_bytes(1 << 15), 32);
    }

    #[test]
    fn a_cut_line_is_no_process() {
        assert_eq!(parse(42, "42 (a) S 7", STATUS, b"", 100), None);
    }
}
