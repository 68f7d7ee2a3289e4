//! Plots of a run, as SVG files that a browser shows.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::containers::Phase;
use crate::report::Report;

/// Width of a plot, in pixels.
const WIDTH: u32 = 960;
/// Height of a bar with its gap, in pixels.
const BAR: u32 = 26;
/// Height of what is above and below the bars, in pixels.
const FRAME: u32 = 90;

const MET: RGBColor = RGBColor(46, 125, 50);
const MISSED: RGBColor = RGBColor(198, 40, 40);
const OTHER: RGBColor = RGBColor(84, 110, 122);

/// One bar: its label, where it begins and ends, its colour, and what is written behind it.
struct Bar {
    label: String,
    from: f64,
    to: f64,
    color: RGBColor,
    note: String,
}

/// Draws each figure that has a target as a part of it: what reaches beyond 1 misses it.
pub fn ratios(report: &Report, path: &Path) -> Result<()> {
    let bars: Vec<_> = report
        .rows()
        .iter()
        .filter_map(|row| {
            let target = row.target.filter(|target| *target > 0.0)?;
            let value = row.ratio.unwrap_or(row.ours);
            let color = if row.met == Some(true) { MET } else { MISSED };
            let note = format!("{value:.2} of {target}");
            Some(Bar { label: row.name.clone(), from: 0.0, to: value / target, color, note })
        })
        .collect();
    draw(&bars, "figures as parts of their targets", Some(1.0), path)
}

/// Draws the phases of a start below each other.
pub fn waterfall(phases: &[Phase], path: &Path) -> Result<()> {
    let ms = |ns: u64| ns as f64 / 1e6;
    let bar = |phase: &Phase| Bar {
        label: phase.name.clone(),
        from: ms(phase.start_ns),
        to: ms(phase.start_ns + phase.took_ns),
        color: OTHER,
        note: format!("{:.1} ms", ms(phase.took_ns)),
    };
    let bars: Vec<_> = phases.iter().map(bar).collect();
    draw(&bars, "phases of a start, in milliseconds", None, path)
}

fn draw(bars: &[Bar], title: &str, line: Option<f64>, path: &Path) -> Result<()> {
    let count = u32::try_from(bars.len())?;
    let area = SVGBackend::new(path, (WIDTH, FRAME + BAR * count)).into_drawing_area();
    let end = bars.iter().map(|bar| bar.to).fold(line.unwrap_or(0.0), f64::max);
    fill(&area, bars, title, line, end).map_err(|error| anyhow!("draw {}: {error}", path.display()))
}

type Drawn<T> = std::result::Result<T, DrawingAreaErrorKind<std::io::Error>>;

fn fill(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    bars: &[Bar],
    title: &str,
    line: Option<f64>,
    end: f64,
) -> Drawn<()> {
    area.fill(&WHITE)?;
    let rows = bars.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .margin_left(330)
        .x_label_area_size(28)
        .build_cartesian_2d(0.0..end * 1.25 + f64::EPSILON, rows..0.0)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().draw()?;
    for (row, bar) in bars.iter().enumerate() {
        let (top, middle) = (row as f64 + 0.2, row as f64 + 0.32);
        let corners = [(bar.from, top), (bar.to, row as f64 + 0.8)];
        chart.draw_series([Rectangle::new(corners, bar.color.filled())])?;
        let note = Text::new(bar.note.clone(), (bar.to, middle), ("sans-serif", 13));
        chart.draw_series([note])?;
        let (_, y) = chart.backend_coord(&(0.0, middle));
        area.draw_text(&bar.label, &("sans-serif", 13).into_text_style(area), (12, y))?;
    }
    if let Some(at) = line {
        chart.draw_series([PathElement::new([(at, 0.0), (at, rows)], BLACK)])?;
    }
    area.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waterfall_names_its_phases() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        let phases = [("boot", 0), ("exec", 5)].map(|(name, start_ns)| Phase {
            name: name.to_owned(),
            start_ns,
            took_ns: 5,
        });

        waterfall(&phases, &path).unwrap();

        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("boot") && svg.contains("exec"), "{svg}");
    }

    #[test]
    fn a_run_without_targets_is_an_empty_plot() {
        let folder = tempfile::tempdir().unwrap();
        let report = Report::new(crate::environment::Environment::of(&[]), 1);

        ratios(&report, &folder.path().join("plot.svg")).unwrap();
    }
}
