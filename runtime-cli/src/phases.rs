//! What a container's start spent its time on: kept by the processes that carry it out, told by `logs`.

use std::fs;
use std::io::{self, ErrorKind};

use serde::{Deserialize, Serialize};
use vmm::now_ns;

use crate::state::ContainerDir;

const PHASES_FILE: &str = "phases.json";

/// Width of the drawing, in characters.
const WIDTH: u64 = 48;

/// The phases of one start, in their order: each begins where the one before it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// When the first one began, in nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
    /// Name and end of each, on the same clock.
    pub ends: Vec<(String, u64)>,
}

/// One phase, in nanoseconds since the first one began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Phase<'a> {
    /// What was done.
    pub name: &'a str,
    /// When it began.
    pub start_ns: u64,
    /// How long it took.
    pub took_ns: u64,
}

impl Phases {
    /// None yet, of a start that began at `started_ns`.
    pub fn since(started_ns: u64) -> Self {
        Self { started_ns, ends: Vec::new() }
    }

    /// Those of a start that began at `started_ns` and has come as far as to this process.
    pub fn of_process(started_ns: u64) -> Self {
        let mut phases = Self::since(started_ns);
        phases.end("start the sandbox process");
        phases
    }

    /// Ends phase `name` now.
    pub fn end(&mut self, name: &str) {
        self.end_at(name, now_ns());
    }

    /// Ends phase `name` at `end_ns` of the clock, or where the last one ended if that is later: a guest
    /// says some of these times.
    pub fn end_at(&mut self, name: &str, end_ns: u64) {
        let last_ns = self.ends.last().map_or(self.started_ns, |(_, end_ns)| *end_ns);
        self.ends.push((name.to_owned(), end_ns.max(last_ns)));
    }

    /// All phases.
    pub fn iter(&self) -> impl Iterator<Item = Phase<'_>> {
        let starts = std::iter::once(self.started_ns).chain(self.ends.iter().map(|(_, end)| *end));
        self.ends.iter().zip(starts).map(|((name, end_ns), start_ns)| Phase {
            name,
            start_ns: start_ns.saturating_sub(self.started_ns),
            took_ns: end_ns.saturating_sub(start_ns),
        })
    }

    /// Keeps them in the folder of their container.
    pub fn save(&self, dir: &ContainerDir) -> io::Result<()> {
        fs::write(dir.path().join(PHASES_FILE), serde_json::to_vec(self)?)
    }

    /// Those of a container, if its start has come as far as to keep any.
    pub fn load(dir: &ContainerDir) -> io::Result<Option<Self>> {
        match fs::read(dir.path().join(PHASES_FILE)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A line for each phase, drawn as a waterfall.
    pub fn waterfall(&self) -> String {
        let total_ns = self.iter().map(|phase| phase.start_ns + phase.took_ns).max().unwrap_or(0);
        let column = |ns: u64| ns.saturating_mul(WIDTH).checked_div(total_ns).unwrap_or(0);
        let lines = self.iter().map(|Phase { name, start_ns, took_ns }| {
            let (from, to) = (column(start_ns), column(start_ns + took_ns));
            let indent = usize::try_from(from).unwrap_or(0);
            let bar = "#".repeat(usize::try_from(to - from).unwrap_or(0).max(1));
            let (start, took) = (milliseconds(start_ns), milliseconds(took_ns));
            format!("{name:<26}{start:>10}{took:>10}  {:indent$}{bar}\n", "")
        });
        let heading = format!("{:<26}{:>10}{:>10}\n", "PHASE", "START MS", "TOOK MS");
        std::iter::once(heading).chain(lines).collect()
    }
}

fn milliseconds(ns: u64) -> String {
    let us = ns / 1000;
    format!("{}.{:03}", us / 1000, us % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{ContainerId, StateRoot};

    fn two() -> Phases {
        let mut phases = Phases::since(1_000_000);
        phases.end_at("first", 2_000_000);
        phases.end_at("second", 5_000_000);
        phases
    }

    #[test]
    fn a_phase_begins_where_the_one_before_it_ended() {
        let phases = two();

        let second = phases.iter().nth(1).unwrap();

        assert_eq!((second.start_ns, second.took_ns), (1_000_000, 3_000_000));
    }

    #[test]
    fn no_phase_ends_before_it_begins() {
        let mut phases = two();

        phases.end_at("third", 4_000_000);

        assert_eq!(phases.iter().nth(2).unwrap().took_ns, 0);
    }

    #[test]
    fn the_waterfall_falls() {
        let text = two().waterfall();

        let bars: Vec<_> = text.lines().skip(1).filter_map(|line| line.find('#')).collect();
        assert_eq!(bars[1] - bars[0], 12);
        assert!(text.contains("second                         1.000     3.000"), "{text}");
    }

    #[test]
    fn nothing_at_all_is_a_heading() {
        assert_eq!(Phases::default().waterfall().lines().count(), 1);
    }

    #[test]
    fn they_are_kept_with_their_container() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateRoot::new(root.path()).create(&ContainerId::parse("a").unwrap()).unwrap();
        assert_eq!(Phases::load(&dir).unwrap(), None);

        two().save(&dir).unwrap();

        assert_eq!(Phases::load(&dir).unwrap(), Some(two()));
    }
}
