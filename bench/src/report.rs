//! The report of a bench: figures with their targets, the measurements behind them, and whether the run counts.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::requests::Failures;
use harness::audit::Audit;

/// The target of a figure, and a better value to reach for.
#[derive(Clone, Copy)]
enum Aim {
    AtLeast {
        target: f64,
        reach: f64,
    },
    AtMost {
        target: f64,
        reach: f64,
    },
    /// The figure has no target.
    None,
}

impl Aim {
    fn verdict(self, measured: f64) -> &'static str {
        let (meets, reaches) = match self {
            Self::AtLeast { target, reach } => (measured >= target, measured >= reach),
            Self::AtMost { target, reach } => (measured <= target, measured <= reach),
            Self::None => return "",
        };
        match (meets, reaches) {
            (true, true) => "reached",
            (true, false) => "met",
            _ => "MISSED",
        }
    }

    fn texts(self) -> [String; 2] {
        match self {
            Self::AtLeast { target, reach } => [format!("≥ {target}"), format!("≥ {reach}")],
            Self::AtMost { target, reach } => [format!("≤ {target}"), format!("≤ {reach}")],
            Self::None => [String::new(), String::new()],
        }
    }
}

const fn least(target: f64, reach: f64) -> Aim {
    Aim::AtLeast { target, reach }
}

const fn most(target: f64, reach: f64) -> Aim {
    Aim::AtMost { target, reach }
}

/// A figure: its part, its key, its name, its target.
type Figure = (u8, &'static str, &'static str, Aim);

const FIGURES: [Figure; 23] = [
    (1, "create64_over_pgbench64", "CreateOrder, 64 at once / pgbench, 64 at once", least(4.0, 6.0)),
    (1, "create256_over_pgbench64", "CreateOrder, 256 at once / pgbench, 64 at once", least(6.0, 9.0)),
    (1, "create64_twice_over_once", "CreateOrder, 64 at once: two subscriptions / one", least(0.75, 0.85)),
    (1, "create256_twice_over_once", "CreateOrder, 256 at once: two subscriptions / one", least(0.75, 0.85)),
    (1, "create256_over_bound", "CreateOrder, 256 at once / bound", least(0.75, 0.9)),
    (1, "lone_p50_over_plain", "p50 of a lone CreateOrder / of the plain transaction", most(1.0, 0.7)),
    (2, "drain_over_inventory_sql", "drain / SQL of inventory alone", least(0.5, 0.7)),
    (2, "drain_twice_over_once", "deliveries to two subscribers / drain", least(0.75, 0.9)),
    (2, "drain_over_single", "drain / one event at a time", least(15.0, 25.0)),
    (3, "stock_p50_ms_3000", "accept to stock at 3,000/s, p50, ms", most(5.0, 3.0)),
    (3, "stock_p99_ms_3000", "accept to stock at 3,000/s, p99, ms", most(25.0, 10.0)),
    (3, "confirmed_p50_ms_3000", "accept to CONFIRMED at 3,000/s, p50, ms", most(12.0, 7.0)),
    (3, "confirmed_p99_ms_3000", "accept to CONFIRMED at 3,000/s, p99, ms", most(50.0, 25.0)),
    (3, "max_rate_p99_100ms", "highest rate with p99 from due to stock < 100 ms, orders/s", Aim::None),
    (4, "hot_over_1000_skus", "drain of one hot SKU / of 1,000 SKUs", least(1.0, 1.0)),
    (5, "lease_1m_over_empty", "lease with 1,000,000 waiting / with 600 waiting", most(2.0, 1.2)),
    (5, "lease_backoff_over_empty", "lease beside 100,000 backed off / with 600 waiting", most(2.0, 1.2)),
    (5, "lease_held_over_empty", "lease behind 400,000 held dead tuples / with 600 waiting", most(2.0, 1.2)),
    (7, "create64_secure_over_plain", "CreateOrder, 64 at once: mutual TLS and a policy / neither", least(0.9, 0.97)),
    (7, "drain_secure_over_plain", "drain: mutual TLS and a policy / neither", least(0.9, 0.97)),
    (8, "overload_goodput_over_peak", "orders placed at three times the peak / at the peak", least(0.9, 1.0)),
    (
        8,
        "overload_p99_over_peak",
        "p99 of an order that is placed: at three times the peak / at the peak",
        most(2.0, 1.5),
    ),
    (8, "overload_health_ms", "slowest answer of health at three times the peak, ms", most(100.0, 20.0)),
];

/// Figures of every run, which also decide whether it counts.
const SOUNDNESS: [(&str, &str); 3] =
    [("deadlocks", "deadlocks"), ("errors", "failed calls and wrong answers"), ("audit_findings", "audit findings")];

#[derive(Debug, Default)]
pub(super) struct Report {
    figures: HashMap<&'static str, f64>,
    raw: Map<String, Value>,
    errors: u64,
    findings: u64,
    deadlocks: i64,
    /// The reasons why the run does not count.
    invalid: Vec<String>,
}

impl Report {
    pub(super) fn figure(&mut self, key: &'static str, value: f64) {
        self.figures.insert(key, value);
    }

    /// Adds the single measurements behind a figure.
    pub(super) fn raw(&mut self, key: &str, value: Value) {
        self.raw.insert(key.into(), value);
    }

    pub(super) fn failed(&mut self, what: &str, failures: &Failures) {
        if let Some(first) = &failures.first {
            self.errors += failures.count;
            self.invalidate(format!("{what}: {} calls failed, the first one: {first}", failures.count));
        }
    }

    /// Adds answers that turned out to be wrong later.
    pub(super) fn wrong(&mut self, what: &str, count: u64) {
        self.errors += count;
        self.invalidate(what.to_owned());
    }

    pub(super) fn audited(&mut self, audit: &Audit) {
        audit.print();
        self.findings += audit.findings.len() as u64;
        if let Some(first) = audit.findings.first() {
            self.invalidate(format!("an audit found something: {first}"));
        }
        if audit.dead > 0 {
            self.wrong(&format!("{} events died", audit.dead), audit.dead as u64);
        }
    }

    pub(super) fn deadlocked(&mut self, deadlocks: i64) {
        self.deadlocks = deadlocks;
        if deadlocks > 0 {
            self.invalidate(format!("there were {deadlocks} deadlocks"));
        }
    }

    pub(super) fn invalidate(&mut self, reason: String) {
        println!("bench: INVALID: {reason}");
        self.invalid.push(reason);
    }

    /// Adds the figures that every run has, and reports those of the parts that are missing. Returns whether the run
    /// counts.
    pub(super) fn conclude(&mut self, parts: &[u8]) -> bool {
        let missing: Vec<&str> = FIGURES
            .iter()
            .filter(|(part, key, ..)| {
                parts.contains(part) && !self.figures.get(key).is_some_and(|value| value.is_finite())
            })
            .map(|(_, key, ..)| *key)
            .collect();
        if !missing.is_empty() {
            self.invalidate(format!("not measured: {}", missing.join(", ")));
        }
        for ((key, _), value) in SOUNDNESS.iter().zip([self.deadlocks as f64, self.errors as f64, self.findings as f64])
        {
            self.figures.insert(key, value);
        }
        self.invalid.is_empty()
    }

    /// Prints the figures with their targets.
    pub(super) fn print(&self) {
        let mut table = Table::new("Figures", &["", "measured", "target", "reach for", ""]);
        let sound = SOUNDNESS.iter().map(|(key, name)| (*key, *name, most(0.0, 0.0)));
        for (key, name, aim) in FIGURES.iter().map(|(_, key, name, aim)| (*key, *name, *aim)).chain(sound) {
            if let Some(measured) = self.figures.get(key) {
                let [target, reach] = aim.texts();
                table.row([name.into(), number(*measured), target, reach, aim.verdict(*measured).into()]);
            }
        }
        table.print();
    }

    pub(super) fn write(&self, path: &Path, machine: &Value, quick: bool) -> Result<()> {
        let figures: BTreeMap<_, _> = self.figures.iter().filter(|(_, value)| value.is_finite()).collect();
        let (invalid, raw) = (&self.invalid, &self.raw);
        let summary = json!({ "figures": figures, "invalid": invalid, "quick": quick, "machine": machine, "raw": raw });
        fs::write(path, format!("{summary:#}\n")).with_context(|| path.display().to_string())
    }
}

/// A table for people. The first column is aligned to the left, the others to the right.
pub(super) struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(title: &str, header: &[&str]) -> Self {
        Self { title: title.into(), rows: vec![header.iter().map(|&name| name.into()).collect()] }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(super) fn print(&self) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        println!("\n{}", self.title);
        for row in &self.rows {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
                0 => format!("  {cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
        println!();
    }
}

/// Formats a number with its significant digits.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        _ if value.is_nan() => "–".into(),
        size if size >= 1000.0 => thousands(value),
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::{least, most, number};

    #[test]
    fn numbers_have_their_significant_digits() {
        let numbers = [1_234_567.8, 999.6, 12.345, 1.234, 0.0, 3.0].map(number);
        assert_eq!(numbers, ["1,234,568", "1000", "12.3", "1.23", "0", "3"]);
    }

    #[test]
    fn a_figure_reaches_meets_or_misses_its_target() {
        assert_eq!([3.9, 4.0, 6.0].map(|ratio| least(4.0, 6.0).verdict(ratio)), ["MISSED", "met", "reached"]);
        assert_eq!([1.1, 1.0, 0.7].map(|ratio| most(1.0, 0.7).verdict(ratio)), ["MISSED", "met", "reached"]);
        assert_eq!(most(1.0, 0.7).verdict(f64::NAN), "MISSED");
    }
}
