//! Costs that must not grow: a file says what they were, and by how much they may differ.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::Options;
use crate::costs::{self, Cost};

/// How much a cost may differ that the file says nothing of, in percent.
const TOLERANCE_PERCENT: f64 = 3.0;

/// What a cost was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    unit: String,
    value: f64,
    /// By how much it may grow before somebody has to look, in percent.
    tolerance_percent: f64,
}

type Baseline = BTreeMap<String, Entry>;

/// Compares the costs of a boot with those in `file`, or writes them into it.
pub fn check(options: &Options, file: &Path, update: bool) -> Result<()> {
    let known = match fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("read {file:?}"))?,
        Err(_) if update => Baseline::new(),
        Err(error) => return Err(error).with_context(|| format!("read {file:?}")),
    };
    let costs = costs::of_warm_boot(options)?;
    if update {
        let text = serde_json::to_string_pretty(&updated(&known, &costs))? + "\n";
        return fs::write(file, text).with_context(|| format!("write {file:?}"));
    }
    let mut grown = Vec::new();
    for cost in &costs {
        let Cost { name, unit, value, .. } = cost;
        match known.get(*name) {
            Some(entry) => {
                println!("{name}: {value:.1} {unit}, was {:.1}", entry.value);
                grown.extend(judge(cost, entry));
            }
            None => grown.push(format!("{name}: nobody wrote down what it was")),
        }
    }
    if grown.is_empty() {
        return Ok(());
    }
    let grown = grown.join("\n");
    bail!("{grown}\nif that is as it shall be, run `coracle-perf check --update` and say why")
}

/// What is wrong with a cost: it has grown, or shrunk so much that the file is of no use any more.
fn judge(cost: &Cost, entry: &Entry) -> Option<String> {
    let change_percent = (cost.value - entry.value) / entry.value * 100.0;
    let verb = if change_percent > 0.0 { "grown" } else { "shrunk" };
    (change_percent.abs() > entry.tolerance_percent)
        .then(|| format!("{}: {verb} by {:.1} %", cost.name, change_percent.abs()))
}

fn updated(known: &Baseline, costs: &[Cost]) -> Baseline {
    let entry = |cost: &Cost| {
        let tolerance_percent =
            known.get(cost.name).map_or(TOLERANCE_PERCENT, |entry| entry.tolerance_percent);
        Entry { unit: cost.unit.to_owned(), value: cost.value, tolerance_percent }
    };
    costs.iter().map(|cost| (cost.name.to_owned(), entry(cost))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits(value: f64) -> Cost {
        Cost { name: "exits", unit: "exits", value, goal: None }
    }

    fn entry() -> Entry {
        Entry { unit: "exits".to_owned(), value: 200.0, tolerance_percent: 2.0 }
    }

    #[test]
    fn a_cost_within_its_tolerance_is_as_it_was() {
        assert_eq!(judge(&exits(204.0), &entry()), None);
        assert_eq!(judge(&exits(196.0), &entry()), None);
    }

    #[test]
    fn a_cost_that_grew_or_shrank_is_told() {
        assert_eq!(judge(&exits(210.0), &entry()), Some("exits: grown by 5.0 %".to_owned()));
        assert_eq!(judge(&exits(180.0), &entry()), Some("exits: shrunk by 10.0 %".to_owned()));
    }

    #[test]
    fn an_update_keeps_tolerances() {
        let known = Baseline::from([("exits".to_owned(), entry())]);

        let updated = updated(&known, &[exits(100.0)]);

        assert_eq!(updated["exits"], Entry { value: 100.0, ..entry() });
    }
}
