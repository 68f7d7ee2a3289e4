//! `kill`: send a signal.

use agent_protocol::INIT_PROCESS;
use anyhow::{bail, ensure};
use coracle::sandbox::{self, Client};
use coracle::state::Status;
use nix::sys::signal::Signal;

use super::Globals;

/// Largest signal number of Linux (SIGRTMAX).
const MAX_SIGNAL: i32 = 64;

#[derive(clap::Args)]
pub struct Args {
    /// Signal all processes of the container
    #[arg(long, short = 'a')]
    all: bool,
    /// Name of the container
    #[arg(value_name = "CONTAINER-ID")]
    id: String,
    /// Number, or name with or without SIG
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<()> {
    let (dir, state) = globals.container(&args.id)?;
    let signal = parse(&args.signal)?;
    if state.status == Status::Stopped {
        // Engines sweep up with `--all` after the container has ended: there is nothing left.
        ensure!(args.all, "container not running");
        return Ok(());
    }
    // As in kill(2), 0 only asks whether there is somebody.
    if signal == 0 {
        return Ok(());
    }
    let client = Client::connect(&dir);
    let connected = client.is_ok();
    match client.and_then(|client| client.signal(INIT_PROCESS, signal, args.all)) {
        Ok(()) => Ok(()),
        // It ended in between; of SIGKILL, perhaps.
        Err(_) if !state.is_alive() && (args.all || connected && signal == libc::SIGKILL) => Ok(()),
        Err(_) if !state.is_alive() => bail!("container not running"),
        // A guest that does not answer can still be pulled the plug of.
        Err(error) if signal == libc::SIGKILL => {
            log::warn!("guest does not take SIGKILL, ending its machine: {error}");
            Ok(sandbox::end(&state)?)
        }
        Err(error) => Err(error.into()),
    }
}

/// A signal by number, or by name with or without `SIG`, in any case.
fn parse(text: &str) -> anyhow::Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        ensure!(
            (0..=MAX_SIGNAL).contains(&number),
            "unknown signal {text:?}: use 0 to 64 or a name"
        );
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(number) = realtime(name) {
        return Ok(number);
    }
    match format!("SIG{name}").parse::<Signal>() {
        Ok(signal) => Ok(signal as i32),
        Err(_) => bail!("unknown signal {text:?}"),
    }
}

/// `RTMIN`, `RTMIN+n` and `RTMAX-n`, as the C library counts them.
fn realtime(name: &str) -> Option<i32> {
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        libc::SIGRTMIN() + if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse().ok()? }
    } else {
        let rest = name.strip_prefix("RTMAX")?;
        libc::SIGRTMAX() - if rest.is_empty() { 0 } else { rest.strip_prefix('-')?.parse().ok()? }
    };
    (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_a_number_and_a_name_with_or_without_sig() {
        for text in ["10", "USR1", "SIGUSR1", "sigusr1"] {
            assert_eq!(parse(text).unwrap(), libc::SIGUSR1, "{text}");
        }
    }

    #[test]
    fn real_time_signals_are_counted_from_either_end() {
        assert_eq!(parse("SIGRTMIN+3").unwrap(), libc::SIGRTMIN() + 3);
        assert_eq!(parse("RTMAX").unwrap(), 64);
        assert!(parse("RTMIN+31").is_err());
    }

    #[test]
    fn an_unknown_signal_is_refused_in_the_words_of_runc() {
        assert_eq!(parse("FOO").unwrap_err().to_string(), "unknown signal \"FOO\"");
        assert!(parse("65").is_err() && parse("-9").is_err());
    }
}
