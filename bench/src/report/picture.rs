//! The picture: latency by percentile, native and remote on one axis, a panel for each case.
//!
//! To the right of "99" lies the slowest hundredth: a line that stays flat up to there and rises to 30 us at 99.9 says that one command
//! in a thousand took that long. Both axes are logarithmic, the percentiles by how many commands are slower.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use thiserror::Error;

use super::machine::Machine;
use super::table::duration;
use crate::measure::Latencies;

/// The two sides of one case.
#[derive(Clone, Debug)]
pub struct Distribution {
    /// "randread-4k-qd1", say.
    pub name: String,
    /// All latencies of the device in this process.
    pub native: Latencies,
    /// All latencies of the borrowed device.
    pub remote: Latencies,
}

/// Why the picture could not be made.
#[derive(Debug, Error)]
pub enum PictureError {
    /// The file could not be written.
    #[error("cannot write the picture to {path}: {source}")]
    Write {
        /// The file.
        path: String,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The plotting library failed.
    #[error("cannot draw the picture: {0}")]
    Draw(String),
}

const PANEL: (u32, u32) = (460, 300);
const TITLE_HEIGHT: u32 = 84;
/// Where the line of the legend is.
const LEGEND: i32 = 68;
const COLUMNS: usize = 2;
const NATIVE: RGBColor = RGBColor(0x1b, 0x6c, 0xa8);
const REMOTE: RGBColor = RGBColor(0xd9, 0x5f, 0x0e);
const GRID: RGBColor = RGBColor(0xe2, 0xe2, 0xe2);
const TEXT: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FONT: &str = "sans-serif";
/// Percentiles that are labelled.
const TICKS: [f64; 6] = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99];

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws all `distributions` (those with latencies on both sides) into an SVG file, under a title and the machine they are of.
///
/// # Errors
/// [`PictureError`].
pub fn latency_picture(path: &Path, title: &str, machine: &Machine, distributions: &[Distribution]) -> Result<(), PictureError> {
    let mut svg = String::new();
    draw(&mut svg, title, machine, distributions).map_err(PictureError::Draw)?;
    std::fs::write(path, svg).map_err(|source| PictureError::Write { path: path.display().to_string(), source })
}

fn draw(svg: &mut String, title: &str, machine: &Machine, distributions: &[Distribution]) -> Result<(), String> {
    let shown: Vec<_> =
        distributions.iter().filter(|distribution| distribution.native.count() > 0 && distribution.remote.count() > 0).collect();
    let rows = shown.len().div_ceil(COLUMNS).max(1);
    let size = (PANEL.0 * COLUMNS as u32, TITLE_HEIGHT + PANEL.1 * rows as u32);
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE).map_err(text)?;
    let (head, body) = root.split_vertically(TITLE_HEIGHT);
    draw_head(&head, title, machine)?;
    for (panel, distribution) in body.split_evenly((rows, COLUMNS)).iter().zip(&shown) {
        draw_panel(panel, distribution)?;
    }
    root.present().map_err(text)
}

fn draw_head(head: &Panel<'_>, title: &str, machine: &Machine) -> Result<(), String> {
    let style = (FONT, 20).into_font().color(&TEXT);
    head.draw(&Text::new(title.to_owned(), (16, 10), style)).map_err(text)?;
    let centered = |size| (FONT, size).into_font().color(&TEXT).pos(Pos::new(HPos::Left, VPos::Center));
    head.draw(&Text::new(machine.to_string(), (16, 44), centered(12))).map_err(text)?;
    for (at, (name, color)) in [("native", NATIVE), ("remote", REMOTE)].into_iter().enumerate() {
        let x = 16 + 110 * at as i32;
        head.draw(&PathElement::new(vec![(x, LEGEND), (x + 28, LEGEND)], color.stroke_width(3))).map_err(text)?;
        head.draw(&Text::new(name, (x + 36, LEGEND), centered(14))).map_err(text)?;
    }
    let legend = "across: percentile of commands; up: latency (both axes logarithmic)";
    head.draw(&Text::new(legend, (240, LEGEND), centered(12))).map_err(text)
}

fn draw_panel(panel: &Panel<'_>, distribution: &Distribution) -> Result<(), String> {
    let (native, remote) = (curve(&distribution.native), curve(&distribution.remote));
    let right = [&native, &remote].into_iter().flatten().map(|point| point.0).fold(2.0, f64::max);
    let latencies = || [&native, &remote].into_iter().flatten().map(|point| point.1);
    // A whole step of 1, 2, 5 on both sides, so that at least two labels stand beside the axis.
    let low = steps(latencies().fold(f64::INFINITY, f64::min), Step::Down);
    let high = steps(latencies().fold(1.0, f64::max), Step::Up);

    let mut chart = ChartBuilder::on(panel)
        .caption(&distribution.name, (FONT, 15).into_font().color(&TEXT))
        .margin_right(20)
        .margin_left(6)
        .x_label_area_size(26)
        .y_label_area_size(58)
        .build_cartesian_2d((1.0..right).log_scale(), (low..high).log_scale())
        .map_err(text)?;
    for percentile in TICKS {
        let x = rank(percentile);
        if x <= right {
            let line = vec![(x, low), (x, high)];
            chart.draw_series(LineSeries::new(line, GRID)).map_err(text)?;
            label(panel, chart.backend_coord(&(x, low)), &percentile.to_string(), Pos::new(HPos::Center, VPos::Top), (0, 6))?;
        }
    }
    let mut latency = low;
    while latency <= high * 1.001 {
        let line = vec![(1.0, latency), (right, latency)];
        chart.draw_series(LineSeries::new(line, GRID)).map_err(text)?;
        let at = chart.backend_coord(&(1.0, latency));
        label(panel, at, &duration(latency), Pos::new(HPos::Right, VPos::Center), (-6, 0))?;
        latency = steps(latency * 1.01, Step::Up);
    }
    for (points, color) in [(native, NATIVE), (remote, REMOTE)] {
        chart.draw_series(LineSeries::new(points, color.stroke_width(2))).map_err(text)?;
    }
    Ok(())
}

/// Text beside a place in backend coordinates.
fn label(panel: &Panel<'_>, at: (i32, i32), words: &str, pos: Pos, shift: (i32, i32)) -> Result<(), String> {
    let style = (FONT, 11).into_font().color(&TEXT).pos(pos);
    let origin = panel.get_base_pixel();
    let place = (at.0 - origin.0 + shift.0, at.1 - origin.1 + shift.1);
    panel.draw(&Text::new(words.to_owned(), place, style)).map_err(text)
}

/// How many commands there are for one that is slower than the percentile: 1 at 0, 100 at 99.
fn rank(percentile: f64) -> f64 {
    100.0 / (100.0 - percentile)
}

/// Rank and latency, up to where ten commands are left: beyond, a line would only draw outliers.
fn curve(latencies: &Latencies) -> Vec<(f64, f64)> {
    let last = (latencies.count() as f64 / 10.0).clamp(2.0, 100_000.0);
    let points = 240;
    (0..=points)
        .map(|point| {
            let rank = last.powf(f64::from(point) / f64::from(points));
            let percentile = 100.0 - 100.0 / rank;
            (rank, latencies.percentile_ns(percentile).max(1) as f64)
        })
        .collect()
}

#[derive(Clone, Copy)]
enum Step {
    Up,
    Down,
}

/// The next of 1, 2, 5, 10, 20, 50, … from `figure` on in that direction; itself where it is one.
fn steps(figure: f64, direction: Step) -> f64 {
    let decade = 10_f64.powf(figure.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * decade);
    let found = match direction {
        Step::Up => steps.into_iter().find(|step| *step >= figure * 0.9999),
        Step::Down => steps.into_iter().rev().find(|step| *step <= figure * 1.0001),
    };
    found.unwrap_or(figure)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latencies(base_ns: f64, seed: u64) -> Latencies {
        let mut latencies = Latencies::new();
        let mut random = <rand::rngs::SmallRng as rand::SeedableRng>::seed_from_u64(seed);
        for _ in 0..100_000 {
            let uniform: f64 = rand::Rng::random_range(&mut random, 0.0..1.0);
            latencies.record_ns((base_ns * (1.0 + 0.1 * uniform + 0.02 / (1.0 - uniform).powf(0.6))) as u64);
        }
        latencies
    }

    #[test]
    fn the_picture_names_both_sides_every_case_and_the_axes() {
        let distributions: Vec<_> = crate::workload::CASES
            .iter()
            .zip(1..)
            .map(|(case, seed)| Distribution {
                name: case.name.to_owned(),
                native: latencies(900.0 * seed as f64, seed),
                remote: latencies(1300.0 * seed as f64, seed + 10),
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("latency.svg");
        let machine = Machine::here();
        latency_picture(&path, "farbus over shm: latency", &machine, &distributions).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        // To be looked at: FARBUS_KEEP_PICTURE=/some/where.svg.
        if let Some(keep) = std::env::var_os("FARBUS_KEEP_PICTURE") {
            std::fs::copy(&path, keep).unwrap();
        }
        for words in ["native", "remote", "randread-4k-qd1", "write-128k", "99.9", "1.0 us", "farbus over shm"] {
            assert!(svg.contains(words), "{words}");
        }
        for words in [&machine.date, &machine.cpu, &machine.kernel, &format!("farbus {}", machine.farbus)] {
            assert!(svg.contains(words), "{words}");
        }
        assert!(svg.len() < 1 << 20);
        let nowhere = Path::new("/nonexistent/latency.svg");
        assert!(matches!(latency_picture(nowhere, "", &machine, &[]), Err(PictureError::Write { .. })));
    }

    #[test]
    fn axis_steps_are_those_people_expect() {
        assert_eq!([steps(340.0, Step::Up), steps(340.0, Step::Down)], [500.0, 200.0]);
        assert_eq!([steps(2000.0, Step::Up), steps(2000.0, Step::Down)], [2000.0, 2000.0]);
    }
}
