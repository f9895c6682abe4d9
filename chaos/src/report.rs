//! What a run has shown: a table of the faults, the findings, and one line to quote.

use std::{
    fmt::Write,
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use super::{Verdict, crash::POINTS, faults::CLASSES, history::Known, observe::Observed, world::World};

/// Findings printed one by one before the rest is only counted.
const SHOWN: usize = 40;
/// In so long every point is reached, several times.
const ALL_POINTS_FROM_MINUTES: u64 = 8;
/// Of the orders that clients asked for with patience, so many have to be acknowledged.
const OK_SHARE_MIN: f64 = 0.7;

/// All of it.
pub(super) struct Report {
    lines: Vec<String>,
    violations: usize,
    vacuous: Vec<String>,
    quote: String,
}

impl Report {
    pub(super) fn of(
        world: &World,
        observed: &Mutex<Observed>,
        verdict: &Verdict,
        seed: u64,
        struck: Duration,
    ) -> Self {
        let observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
        let known = world.history.known();
        let duplicates: u64 = world.site.links().map(|link| link.duplicates.load(Ordering::Relaxed)).sum();
        let mut lines = table(world);
        let acknowledged = known.acknowledged.len();
        lines.push(format!(
            "{} orders asked for with patience, {} answered; {} calls ok, {} refused, {} left open",
            known.asked,
            known.answered,
            known.endings.get("ok").copied().unwrap_or_default(),
            known.endings.get("fail").copied().unwrap_or_default(),
            known.endings.get("unknown").copied().unwrap_or_default(),
        ));
        let mut codes: Vec<_> = known.codes.iter().map(|(code, calls)| format!("{code} {calls}")).collect();
        codes.sort_unstable();
        lines.push(format!("calls that were not OK, by code: {}", codes.join(", ")));
        let memory: Vec<_> = observed.memory.iter().map(|(name, mib)| format!("{name} {mib}")).collect();
        lines.push(format!("most memory, MiB: {}", memory.join(", ")));
        lines.push(format!(
            "stock added up in {} snapshots, sessions looked at {} times; all delivered {:.1?} after healing",
            observed.balances, observed.sessions, verdict.drained
        ));
        let vacuous = vacuous(world, &observed, &known, duplicates, struck);
        let faults = world.tally().faults();
        let findings = verdict.lost.iter().chain(&verdict.doubled).chain(&verdict.others);
        lines.extend(findings.take(SHOWN).map(|finding| format!("violation: {finding}")));
        let violations = verdict.violations();
        if violations > SHOWN {
            lines.push(format!("violation: … and {} more", violations - SHOWN));
        }
        lines.extend(vacuous.iter().map(|why| format!("vacuous: {why}")));
        if violations == 0 && acknowledged > 0 {
            #[expect(clippy::cast_precision_loss, reason = "orders that fit into memory")]
            let bound = 3.0 / acknowledged as f64;
            lines.push(format!(
                "no violation among {acknowledged} acknowledged orders: with 95 % confidence fewer than {bound:.1e} of them are \
                 under such faults (rule of three)"
            ));
        }
        let quote = format!(
            "chaos: seed={seed} minutes={:.1} orders={acknowledged} faults={faults} duplicates_suppressed={duplicates} \
             recovered={} lost={} doubled={} violations={}",
            struck.as_secs_f64() / 60.0,
            known.recovered,
            verdict.lost.len(),
            verdict.doubled.len(),
            violations,
        );
        let tally = world.tally();
        let not_tried: Vec<String> = tally.impossible.keys().map(usize::to_string).collect();
        let quote = if not_tried.is_empty() { quote } else { format!("{quote} not_tried={}", not_tried.join(",")) };
        drop(tally);
        // Whoever quotes the line of such a run would quote nothing.
        let quote = if vacuous.is_empty() { quote } else { format!("{quote} VACUOUS") };
        Self { lines, violations, vacuous, quote }
    }

    pub(super) fn is_clean(&self) -> bool {
        self.violations == 0 && self.vacuous.is_empty()
    }

    pub(super) fn print(&self) {
        println!();
        for line in &self.lines {
            println!("{line}");
        }
        println!("{}", self.quote);
    }
}

fn table(world: &World) -> Vec<String> {
    let tally = world.tally();
    let mut lines = vec!["      struck   bit  class".to_owned()];
    for (class, name) in (1..).zip(CLASSES) {
        let of = |counts: &std::collections::BTreeMap<usize, u32>| counts.get(&class).copied().unwrap_or_default();
        let mut line = format!("  {class:>2}  {:>6} {:>5}  {name}", of(&tally.struck), of(&tally.bit));
        if let Some(why) = tally.impossible.get(&class) {
            let _ = write!(line, ": NOT TRIED, {why}");
        }
        lines.push(line);
    }
    let crashes: u32 = tally.crashes.values().sum();
    let least = POINTS.iter().map(|point| tally.crashes.get(point.name).copied().unwrap_or_default()).min();
    let least = least.unwrap_or_default();
    lines.push(format!(
        "{crashes} crashes at {} of {} named points, at each of them {least} times at least",
        tally.crashes.len(),
        POINTS.len()
    ));
    lines
}

/// Why the run shows nothing, if it does not.
fn vacuous(world: &World, observed: &Observed, known: &Known, duplicates: u64, struck: Duration) -> Vec<String> {
    let Known { asked, answered, recovered, .. } = known;
    let tally = world.tally();
    let mut vacuous = Vec::new();
    #[expect(clippy::cast_precision_loss, reason = "orders that fit into memory")]
    let share = *answered as f64 / (*asked).max(1) as f64;
    if share < OK_SHARE_MIN {
        vacuous.push(format!("only {:.0} % of the orders were acknowledged", share * 100.0));
    }
    let without = tally.left().into_iter().map(|class| format!("class {class}, {}, had no effect", CLASSES[class - 1]));
    vacuous.extend(without);
    let minutes = struck.as_secs() / 60;
    if minutes >= ALL_POINTS_FROM_MINUTES {
        let missed = POINTS.iter().filter(|point| !tally.crashes.contains_key(point.name));
        vacuous.extend(missed.map(|point| format!("nothing crashed at the point \"{}\"", point.name)));
    }
    let seen = [
        (duplicates, "no duplicate was suppressed"),
        (*recovered, "no order was acknowledged to a repeated call"),
        (observed.balances, "stock was never added up"),
        (observed.sessions, "sessions were never looked at"),
    ];
    vacuous.extend(seen.into_iter().filter(|(count, _)| *count == 0).map(|(_, why)| why.to_owned()));
    vacuous
}
