//! The figures of a run and the table they make.

use std::fmt;

use comfy_table::{CellAlignment, Table};
use serde::{Deserialize, Serialize};

use crate::environment::Environment;
use crate::samples::{Samples, Spread};

/// All figures of one run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    environment: Environment,
    rows: Vec<Row>,
    #[serde(skip)]
    runs: usize,
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// In this unit.
    pub unit: String,
    /// Our value.
    pub ours: f64,
    /// The value of the peer in the same run, if there is one.
    pub peer: Option<f64>,
    /// Who that is.
    pub peer_name: Option<String>,
    /// Our value divided by the peer's.
    pub ratio: Option<f64>,
    /// The largest ratio, or the largest value where there is no peer, to be content.
    pub target: Option<f64>,
    /// Whether it is reached.
    pub met: Option<bool>,
    /// How often it was measured.
    pub runs: usize,
    /// How far our values lie apart, where all of them are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ours_spread: Option<Spread>,
    /// How far the peer's values lie apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_spread: Option<Spread>,
}

impl Report {
    /// Without figures yet, of measurements that are taken `runs` times.
    pub fn new(environment: Environment, runs: usize) -> Self {
        Report { environment, rows: Vec::new(), runs }
    }

    /// Whether a millisecond is a million instructions.
    pub fn counts_instructions(&self) -> bool {
        self.environment.counts_instructions
    }

    /// All figures so far.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Adds the figures of a run that took place somewhere else.
    pub fn add(&mut self, other: Report) {
        let machine = other.environment.machine;
        let named = |row: Row| Row { name: format!("{}, on {machine}", row.name), ..row };
        self.rows.extend(other.rows.into_iter().map(named));
    }

    /// Adds a figure that stands beside a peer's; `target` is a ratio.
    pub fn beside(
        &mut self,
        name: &str,
        (unit, ours): (&'static str, f64),
        (peer_name, peer): (&str, f64),
        target: Option<f64>,
    ) {
        let ratio = ours / peer;
        self.rows.push(Row {
            peer: Some(peer),
            peer_name: Some(peer_name.to_owned()),
            ratio: Some(ratio),
            met: target.map(|target| ratio <= target),
            ..self.row(name, unit, ours, target)
        });
    }

    /// Adds a figure that stands alone; `target` is in its unit.
    pub fn alone(&mut self, name: &str, unit: &'static str, ours: f64, target: Option<f64>) {
        let row = self.row(name, unit, ours, target);
        self.rows.push(Row { runs: 1, ..row });
    }

    /// Adds a figure of which each run gave a pair. What is said of each side is its median, and the
    /// ratio is the median of those of the pairs: whatever drifts, drifts for both of one pair.
    pub fn pairs(
        &mut self,
        name: &str,
        (unit, ours): (&'static str, &Samples),
        (peer_name, peers): (&str, &Samples),
        target: Option<f64>,
    ) {
        let spreads = (ours.spread(), peers.spread(), ours.ratios(peers).spread());
        let (Some(our), Some(peer), Some(ratios)) = spreads else { return };
        self.rows.push(Row {
            peer: Some(peer.median),
            peer_name: Some(peer_name.to_owned()),
            ratio: Some(ratios.median),
            met: target.map(|target| ratios.median <= target),
            runs: ours.runs(),
            ours_spread: Some(our),
            peer_spread: Some(peer),
            ..self.row(name, unit, our.median, target)
        });
    }

    /// Adds a figure that stands alone, of which all values are kept.
    pub fn samples(
        &mut self,
        name: &str,
        (unit, ours): (&'static str, &Samples),
        target: Option<f64>,
    ) {
        let Some(our) = ours.spread() else { return };
        let row = self.row(name, unit, our.median, target);
        self.rows.push(Row { runs: ours.runs(), ours_spread: Some(our), ..row });
    }

    fn row(&self, name: &str, unit: &'static str, ours: f64, target: Option<f64>) -> Row {
        Row {
            name: name.to_owned(),
            unit: unit.to_owned(),
            ours,
            peer: None,
            peer_name: None,
            ratio: None,
            target,
            met: target.map(|target| ours <= target),
            runs: self.runs,
            ours_spread: None,
            peer_spread: None,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Environment { machine, processors, kernel, emulated, .. } = &self.environment;
        let how = if *emulated { ", emulated" } else { "" };
        writeln!(f, "{machine} x {processors}{how}, Linux {kernel}")?;
        let mut table = Table::new();
        table.set_header([
            "figure", "unit", "coracle", "p99", "peer", "peer's", "ratio", "goal", "",
        ]);
        for row in &self.rows {
            let number = |value: f64| format!("{value:.1}");
            table.add_row([
                row.name.clone(),
                row.unit.clone(),
                number(row.ours),
                row.ours_spread.map(|spread| number(spread.p99)).unwrap_or_default(),
                row.peer_name.clone().unwrap_or_default(),
                row.peer.map(number).unwrap_or_default(),
                row.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
                row.target.map(|target| format!("<= {target}")).unwrap_or_default(),
                row.met
                    .map(|met| if met { "met" } else { "missed" })
                    .unwrap_or_default()
                    .to_owned(),
            ]);
        }
        for column in [2, 3, 5, 6, 7] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        write!(f, "{table}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::new(Environment::of(&[]), 3)
    }

    #[test]
    fn a_goal_beside_a_peer_is_a_ratio() {
        let mut report = report();

        report.beside("a", ("ms", 6.0), ("runc", 2.0), Some(2.5));
        report.alone("b", "ms", 6.0, Some(6.0));

        assert_eq!(report.rows()[0].ratio, Some(3.0));
        assert_eq!(
            report.rows().iter().map(|row| row.met).collect::<Vec<_>>(),
            [Some(false), Some(true)]
        );
    }

    #[test]
    fn a_figure_from_elsewhere_says_where_it_was_taken() {
        let mut elsewhere = report();
        elsewhere.alone("a", "ms", 6.0, None);
        elsewhere.environment.machine = "another".to_owned();
        let text = serde_json::to_string(&elsewhere).unwrap();
        let mut report = report();

        report.add(serde_json::from_str(&text).unwrap());

        assert_eq!(report.rows()[0].name, "a, on another");
    }

    #[test]
    fn the_ratio_of_pairs_is_not_that_of_the_medians() {
        let mut report = report();
        let ours: Samples = [2.0, 20.0, 3.0].into_iter().collect();
        let peers: Samples = [1.0, 10.0, 6.0].into_iter().collect();

        report.pairs("a", ("ms", &ours), ("runc", &peers), None);

        assert_eq!((report.rows()[0].ours, report.rows()[0].peer), (3.0, Some(6.0)));
        assert_eq!(report.rows()[0].ratio, Some(2.0));
    }
}
