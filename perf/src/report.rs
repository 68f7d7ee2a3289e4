//! The figures of a run and the table they make.

use std::fmt;

use comfy_table::{CellAlignment, Table};
use serde::Serialize;

/// All figures of one run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    rows: Vec<Row>,
}

/// One figure.
#[derive(Debug, Serialize)]
struct Row {
    /// What was measured.
    what: String,
    /// In this unit.
    unit: &'static str,
    /// The value.
    value: f64,
    /// The peer it stands beside, and the value of that peer in the same run.
    peer: Option<(String, f64)>,
    /// The largest ratio to the peer, or the largest value where there is no peer, to be content.
    goal: Option<f64>,
}

impl Report {
    /// Adds a figure that stands beside a peer's; `goal` is a ratio.
    pub fn beside(
        &mut self,
        what: &str,
        (unit, value): (&'static str, f64),
        (peer, peer_value): (&str, f64),
        goal: Option<f64>,
    ) {
        let peer = Some((peer.to_owned(), peer_value));
        self.rows.push(Row { what: what.to_owned(), unit, value, peer, goal });
    }

    /// Adds a figure that stands alone; `goal` is in its unit.
    pub fn alone(&mut self, what: &str, unit: &'static str, value: f64, goal: Option<f64>) {
        self.rows.push(Row { what: what.to_owned(), unit, value, peer: None, goal });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.set_header(["figure", "unit", "coracle", "peer", "peer's", "ratio", "goal", ""]);
        for row in &self.rows {
            let ratio = row.peer.as_ref().map(|(_, value)| row.value / value);
            let met = row.goal.map(|goal| ratio.unwrap_or(row.value) <= goal);
            table.add_row([
                row.what.clone(),
                row.unit.to_owned(),
                format!("{:.1}", row.value),
                row.peer.as_ref().map(|(name, _)| name.clone()).unwrap_or_default(),
                row.peer.as_ref().map(|(_, value)| format!("{value:.1}")).unwrap_or_default(),
                ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
                row.goal.map(|goal| format!("<= {goal}")).unwrap_or_default(),
                met.map(|met| if met { "met" } else { "missed" }).unwrap_or_default().to_owned(),
            ]);
        }
        for column in [2, 4, 5, 6] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        write!(f, "{table}")
    }
}
