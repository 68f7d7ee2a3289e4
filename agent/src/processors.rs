//! Processors of the guest come online when the host grants them, and go offline again.

use std::fs;
use std::io;
use std::path::Path;

use agent_protocol::Failed;

use crate::failure::{Context, failed};

/// Where the kernel lists processors (Documentation/core-api/cpu_hotplug.rst).
pub const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Leaves `online` of the processors listed in the folder `root` online: those with the lowest numbers.
pub fn set_online(root: &Path, online: u8) -> Result<(), Failed> {
    let mut numbers = list(root).context(format_args!("list processors in {root:?}"))?;
    numbers.sort_unstable();
    if online == 0 || usize::from(online) > numbers.len() {
        let most = numbers.len();
        return Err(failed(format!("cannot have {online} processors online, but 1 to {most}")));
    }
    for (index, number) in numbers.into_iter().enumerate() {
        set(root, number, index < usize::from(online))?;
    }
    Ok(())
}

fn list(root: &Path) -> io::Result<Vec<u32>> {
    let names = fs::read_dir(root)?.map(|entry| entry.map(|entry| entry.file_name()));
    let number = |name: &str| name.strip_prefix("cpu")?.parse().ok();
    names.filter_map(|name| name.map(|name| number(name.to_str()?)).transpose()).collect()
}

fn set(root: &Path, number: u32, online: bool) -> Result<(), Failed> {
    let file = root.join(format!("cpu{number}/online"));
    let wanted = if online { "1" } else { "0" };
    match fs::read_to_string(&file) {
        Ok(state) if state.trim() == wanted => Ok(()),
        // The kernel gives no such file to a processor that cannot go offline.
        Err(error) if online && error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => {
            let state = if online { "online" } else { "offline" };
            fs::write(&file, wanted).context(format_args!("bring processor {number} {state}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Processors 0 to 10, of which the first two are online, and the first always is.
    fn processors() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("online"), "0-1").unwrap();
        fs::create_dir(root.path().join("cpufreq")).unwrap();
        for number in 0..=10 {
            let folder = root.path().join(format!("cpu{number}"));
            fs::create_dir(&folder).unwrap();
            if number > 0 {
                fs::write(folder.join("online"), if number < 2 { "1\n" } else { "0\n" }).unwrap();
            }
        }
        root
    }

    fn state(root: &tempfile::TempDir) -> String {
        let read = |number| fs::read_to_string(root.path().join(format!("cpu{number}/online")));
        (1..=10).map(|number| read(number).unwrap().trim().to_owned()).collect()
    }

    #[test]
    fn the_lowest_numbers_come_online_and_the_highest_go() {
        let root = processors();

        set_online(root.path(), 4).unwrap();
        assert_eq!(state(&root), "1110000000");

        set_online(root.path(), 11).unwrap();
        assert_eq!(state(&root), "1111111111");

        set_online(root.path(), 1).unwrap();
        assert_eq!(state(&root), "0000000000");
    }

    #[test]
    fn no_processor_and_more_than_there_are_is_refused() {
        let root = processors();

        for online in [0, 12] {
            let error = set_online(root.path(), online).unwrap_err();
            assert!(error.message.contains("but 1 to 11"), "{error}");
        }
        assert_eq!(state(&root), "1000000000");
    }
}
