//! `ps`: the processes of a container.

use agent_protocol::ProcessInfo;
use anyhow::bail;
use coracle::sandbox::Client;

use super::{Globals, require_running, table};
use coracle::state::Status;

#[derive(clap::Args)]
pub struct Args {
    /// table (processes of the guest) or json (pids of the host)
    #[arg(long, short = 'f', value_name = "FORMAT", default_value = "table")]
    format: String,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Accepted as runc has them; the guest's processes are not those of the host's ps
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PS-OPTIONS")]
    options: Vec<String>,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    let (dir, state) = globals.container(&args.id)?;
    match args.format.as_str() {
        // Engines give these pids to the host's ps, which knows the sandbox process only.
        "json" => {
            let pids: Vec<_> = state.pid.filter(|_| state.is_alive()).into_iter().collect();
            super::print(&format!("{}\n", serde_json::to_string(&pids)?))
        }
        "table" => {
            if state.status != Status::Paused {
                require_running(&state)?;
            }
            super::print(&listing(&Client::connect(&dir)?.processes()?))
        }
        _ => bail!("invalid format option"),
    }
}

fn listing(processes: &[ProcessInfo]) -> String {
    let heading = ["UID", "PID", "PPID", "TTY", "TIME", "CMD"].map(String::from).to_vec();
    let rows: Vec<_> = std::iter::once(heading).chain(processes.iter().map(row)).collect();
    table::format(&rows)
}

fn row(process: &ProcessInfo) -> Vec<String> {
    let tty = if process.tty.is_empty() { "?" } else { &process.tty };
    vec![
        process.uid.to_string(),
        process.pid.to_string(),
        process.ppid.to_string(),
        printable(tty),
        cpu_time(process.cpu_ms),
        printable(&process.command),
    ]
}

/// A guest chooses these texts; they must not move the reader's cursor.
fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

/// Hours, minutes and seconds.
fn cpu_time(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_a_line_under_its_headings() {
        let process = ProcessInfo {
            pid: 1,
            ppid: 0,
            uid: 1000,
            cpu_ms: 3_661_999,
            tty: String::new(),
            command: "sh -c x\u{1b}[2J".into(),
        };

        let text = listing(&[process]);

        let line = text.lines().nth(1).unwrap();
        let cells: Vec<_> = line.split_whitespace().collect();
        assert_eq!(cells, ["1000", "1", "0", "?", "01:01:01", "sh", "-c", "x?[2J"]);
    }
}
