//! Draws the plots as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::{backlog::Drained, latency::Measured, quantiles::Latencies, report::number, soak::Sample};

const SIZE: (u32, u32) = (900, 480);
const FONT: (&str, u32) = ("sans-serif", 18);
const COLOURS: [RGBColor; 3] = [RGBColor(31, 119, 180), RGBColor(255, 127, 14), RGBColor(44, 160, 44)];
/// Bins of the histogram per factor of ten.
const BINS_A_DECADE: f64 = 20.0;

/// A plot of lines with linear axes.
struct Lines<'l> {
    file: &'l str,
    title: &'l str,
    x: &'l str,
    y: &'l str,
    /// Formats a label of the x axis.
    label: fn(&f64) -> String,
    /// A corner without lines.
    legend: SeriesLabelPosition,
    /// The lines with their names.
    lines: Vec<(String, Vec<(f64, f64)>)>,
}

/// Orders per second by concurrency.
pub(super) fn throughput(directory: &Path, service: &[(u32, f64)], pgbench: &[(u32, f64)]) -> Result<()> {
    // The axis is logarithmic: on a linear one, all points but the last would be at the left edge.
    let points = |points: &[(u32, f64)]| points.iter().map(|(x, y)| (f64::from(*x).log2(), *y)).collect();
    let lines =
        vec![("CreateOrder".into(), points(service)), ("pgbench, one order per transaction".into(), points(pgbench))];
    let (title, x) = ("Orders per second by concurrency", "concurrent calls");
    let (label, legend) = (|x: &f64| number(x.exp2().round()), SeriesLabelPosition::UpperLeft);
    draw_lines(directory, &Lines { file: "throughput.svg", title, x, y: "orders/s", label, legend, lines })
}

/// The rest of the backlog over time.
pub(super) fn backlog(directory: &Path, drains: &[Drained]) -> Result<()> {
    let line = |(number, drained): (usize, &Drained)| {
        let points = drained.samples.iter().map(|(seconds, left)| (*seconds, *left as f64)).collect();
        (format!("round {}", number + 1), points)
    };
    let lines = drains.iter().enumerate().map(line).collect();
    let (title, x, y) = ("Backlog during a drain", "s", "events left");
    let (label, legend) = (|x: &f64| number(*x), SeriesLabelPosition::UpperRight);
    draw_lines(directory, &Lines { file: "backlog.svg", title, x, y, label, legend, lines })
}

/// The size of the outbox and the time of a lease, over time.
pub(super) fn soak(directory: &Path, samples: &[Sample]) -> Result<()> {
    let sizes = samples.iter().map(|sample| (sample.seconds, sample.kilobytes)).collect();
    let lines = vec![("table and indexes".into(), sizes)];
    let (title, x) = ("Size of the outbox", "s");
    let label = |x: &f64| number(*x);
    let legend = || SeriesLabelPosition::LowerRight;
    draw_lines(directory, &Lines { file: "soak_size.svg", title, x, y: "kB", label, legend: legend(), lines })?;
    let leases = samples.iter().map(|sample| (sample.seconds, sample.lease_ms)).collect();
    let lines = vec![("median of 10 s".into(), leases)];
    let title = "Time of a lease";
    draw_lines(directory, &Lines { file: "soak_lease.svg", title, x, y: "ms", label, legend: legend(), lines })
}

fn draw_lines(directory: &Path, plot: &Lines<'_>) -> Result<()> {
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        let path = directory.join(plot.file);
        let root = SVGBackend::new(&path, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let points = || plot.lines.iter().flat_map(|(_, points)| points);
        let highest = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(1e-9, f64::max) * 1.05;
        let (width, height) = (highest(|point| point.0), highest(|point| point.1));
        let mut chart = ChartBuilder::on(&root)
            .caption(plot.title, FONT)
            .margin(15)
            .x_label_area_size(45)
            .y_label_area_size(85)
            .build_cartesian_2d(0.0..width, 0.0..height)?;
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(TRANSPARENT).x_desc(plot.x).y_desc(plot.y).label_style(FONT);
        mesh.x_label_formatter(&plot.label).y_label_formatter(&|y| number(*y)).draw()?;
        for ((name, points), colour) in plot.lines.iter().zip(COLOURS.iter().cycle()) {
            let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
            let legend = move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2));
            chart.draw_series(line)?.label(name).legend(legend);
        }
        let mut labels = chart.configure_series_labels();
        labels.position(plot.legend.clone()).border_style(BLACK).background_style(WHITE).label_font(FONT).draw()?;
        Ok(root.present()?)
    };
    draw().map_err(|error| anyhow!("cannot plot {}: {error}", plot.file))
}

/// A histogram of the latencies of all rounds.
pub(super) fn latencies(directory: &Path, runs: &[Measured]) -> Result<()> {
    let pool = |of: fn(&Measured) -> &Latencies| bins(runs.iter().flat_map(|run| of(run).all()));
    let series =
        [("accept to stock", pool(|run| &run.to_stock)), ("accept to CONFIRMED", pool(|run| &run.to_confirmed))];
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        let path = directory.join("latency.svg");
        let root = SVGBackend::new(&path, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let all = || series.iter().flat_map(|(_, bins)| bins);
        let from = all().map(|bin| bin.from).fold(f64::MAX, f64::min).min(1.0);
        let to = all().map(|bin| bin.to).fold(10.0, f64::max);
        let highest = all().map(|bin| bin.percent).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(&root)
            .caption("Latency at 3,000 orders/s", FONT)
            .margin(15)
            .x_label_area_size(45)
            .y_label_area_size(85)
            .build_cartesian_2d((from..to).log_scale(), 0.0..highest * 1.05)?;
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(TRANSPARENT).x_desc("ms").y_desc("% of orders").label_style(FONT);
        mesh.x_label_formatter(&|x| number(*x)).y_label_formatter(&|y| number(*y)).draw()?;
        for ((name, bins), colour) in series.iter().zip(COLOURS) {
            let style = colour.mix(0.5).filled();
            let bars = bins.iter().map(|bin| Rectangle::new([(bin.from, 0.0), (bin.to, bin.percent)], style));
            let legend = move |(x, y)| Rectangle::new([(x, y - 5), (x + 20, y + 5)], style);
            chart.draw_series(bars)?.label(*name).legend(legend);
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperRight);
        labels.border_style(BLACK).background_style(WHITE).label_font(FONT).draw()?;
        Ok(root.present()?)
    };
    draw().map_err(|error| anyhow!("cannot plot latency.svg: {error}"))
}

struct Bin {
    from: f64,
    to: f64,
    percent: f64,
}

/// Bins of equal width on a logarithmic axis.
fn bins<'l>(latencies: impl Iterator<Item = &'l f64>) -> Vec<Bin> {
    // Two processes take the timestamps of commits, so a latency may be zero, which has no logarithm.
    let mut places: Vec<f64> = latencies.map(|latency| (latency.max(0.01).log10() * BINS_A_DECADE).floor()).collect();
    places.sort_unstable_by(f64::total_cmp);
    let edge = |place: f64| 10_f64.powf(place / BINS_A_DECADE);
    let bin = |of: &[f64]| {
        let percent = 100.0 * of.len() as f64 / places.len() as f64;
        Bin { from: edge(of[0]), to: edge(of[0] + 1.0), percent }
    };
    places.chunk_by(|one, other| one.total_cmp(other).is_eq()).map(bin).collect()
}
