//! `list`: the containers of a root.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::bail;
use coracle::state::{ContainerDir, State, Status};
use serde::Serialize;

use super::{Globals, table};

#[derive(clap::Args)]
pub struct Args {
    /// table or json
    #[arg(long, short = 'f', value_name = "FORMAT", default_value = "table")]
    format: String,
    /// Only the ids
    #[arg(long, short = 'q')]
    quiet: bool,
}

/// Users of this host, one a line (passwd(5)).
const PASSWORDS: &str = "/etc/passwd";

/// A container in runc's order of fields.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    oci_version: String,
    id: String,
    pid: i32,
    status: Status,
    bundle: PathBuf,
    rootfs: PathBuf,
    created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    owner: String,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    let entries = entries(globals)?;
    let text = match (args.quiet, args.format.as_str()) {
        (true, _) => entries.iter().map(|entry| format!("{}\n", entry.id)).collect(),
        (_, "table") => table(&entries),
        // An empty list is null in runc's Go; both forms are read the same way.
        (_, "json") => format!("{}\n", serde_json::to_string(&entries)?),
        _ => bail!("invalid format option"),
    };
    super::print(&text)
}

fn entries(globals: &Globals) -> anyhow::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for id in globals.root.list()? {
        // A container may be deleted while we look.
        let loaded = globals.root.open(&id).and_then(|dir| dir.load().map(|state| (dir, state)));
        match loaded {
            Ok((dir, state)) => entries.push(entry(&dir, state)),
            Err(error) => log::warn!("{id}: {error}"),
        }
    }
    Ok(entries)
}

fn entry(dir: &ContainerDir, state: State) -> Entry {
    Entry {
        pid: state.shown_pid(),
        oci_version: state.oci_version,
        id: state.id,
        status: state.status,
        bundle: state.bundle,
        rootfs: state.rootfs,
        created: state.created,
        annotations: state.annotations,
        owner: owner(dir),
    }
}

/// Name of whoever owns the state folder, or `#uid`.
fn owner(dir: &ContainerDir) -> String {
    let Ok(metadata) = dir.path().metadata() else { return String::new() };
    let passwords = std::fs::read_to_string(PASSWORDS).unwrap_or_default();
    user_name(&passwords, metadata.uid()).map_or_else(|| format!("#{}", metadata.uid()), Into::into)
}

/// Name of a user in the text of passwd(5). getpwuid(3) is no way to it: a static program would load
/// the host's modules for name services, which need not fit its C library.
fn user_name(passwords: &str, uid: u32) -> Option<&str> {
    passwords.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(name)
    })
}

fn table(entries: &[Entry]) -> String {
    let heading = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(String::from).to_vec();
    let row = |entry: &Entry| {
        vec![
            entry.id.clone(),
            entry.pid.to_string(),
            entry.status.to_string(),
            entry.bundle.display().to_string(),
            entry.created.clone(),
            entry.owner.clone(),
        ]
    };
    let rows: Vec<_> = std::iter::once(heading).chain(entries.iter().map(row)).collect();
    table::format(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_named_by_the_host_s_file_of_users() {
        let passwords = "root:x:0:0:root:/root:/bin/bash\nbroken\n\nbin:x:2:2::/bin:\n";

        assert_eq!(user_name(passwords, 0), Some("root"));
        assert_eq!(user_name(passwords, 2), Some("bin"));
        assert_eq!(user_name(passwords, 7), None);
    }
}
