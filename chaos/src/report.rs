//! The report of a run: the faults, the crashes, the findings, and one line to quote.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use super::{
    certificates::Certificates,
    check::Verdict,
    crash::kinds_without_crash,
    faults::CLASSES,
    history::Known,
    observe::Observed,
    points::{CrashPoint, Kind, Place},
    world::{Tally, World},
};

/// Findings that are printed one by one; the others are only counted.
const SHOWN: usize = 40;
/// The share of patient clients' orders that must be acknowledged.
const ACKNOWLEDGED_SHARE_MIN: f64 = 0.7;
/// The share of all points that a run of this many minutes reaches, rare ones or not, also on a machine with other work.
/// Fewer mean that the proxies do not recognize the statements any more.
const REACHED_SHARE_MIN: f64 = 1.0 / 3.0;
const REACHED_FROM_MINUTES: u64 = 4;
/// A run of this many minutes reaches each of the common points.
const COMMON_FROM_MINUTES: u64 = 8;

pub(super) struct Report {
    lines: Vec<String>,
    violations: usize,
    vacuous: Vec<String>,
    quote: String,
}

impl Report {
    /// `lasted` is how long faults were injected.
    pub(super) fn of(
        world: &World,
        observed: &Mutex<Observed>,
        verdict: &Verdict,
        seed: u64,
        lasted: Duration,
    ) -> Self {
        let observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
        let (known, tally, crashes) = (world.history.known(), world.tally(), world.crashes.counts());
        let duplicates = world.site.links().map(|link| link.duplicates.load(Ordering::Relaxed)).sum();
        let mut vacuous = vacuous(&tally, &crashes, &observed, &known, duplicates, lasted);
        vacuous.extend(vacuous_check(verdict));
        let renewals = world.site.certificates.as_ref().map(Certificates::renewals);
        vacuous.extend(renewals.and_then(|renewals| vacuous_renewal(renewals, &verdict.renewed)));

        let mut lines = table(&tally);
        lines.extend(crash_lines(&crashes));
        lines.extend(call_lines(&known));
        lines.extend(observed_lines(&observed, verdict));
        lines.extend(renewals.map(|renewals| {
            let used: usize = verdict.renewed.iter().map(|(_, used)| used).sum();
            format!("all certificates renewed {renewals} times; a running process began to use new ones {used} times")
        }));
        lines.extend(finding_lines(verdict));
        lines.extend(vacuous.iter().map(|why| format!("vacuous: {why}")));
        let violations = verdict.violations();
        if violations == 0 && !known.acknowledged.is_empty() {
            lines.push(confidence_line(known.acknowledged.len()));
        }
        let mut quote = quote(&tally, &known, verdict, duplicates, seed, lasted);
        if renewals.is_some() {
            quote.push_str(" secure=true");
        }
        if !vacuous.is_empty() {
            // The line of a run that shows nothing is not to be quoted.
            quote.push_str(" VACUOUS");
        }
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

fn table(tally: &Tally) -> Vec<String> {
    let mut lines = vec!["  class  injected  effective  fault".to_owned()];
    for (class, name) in (1..).zip(CLASSES) {
        let of = |counts: &BTreeMap<usize, u32>| counts.get(&class).copied().unwrap_or_default();
        let mut line = format!("  {class:>5}  {:>8}  {:>9}  {name}", of(&tally.injected), of(&tally.effective));
        if let Some(why) = tally.impossible.get(&class) {
            let _ = write!(line, ": NOT TRIED, {why}");
        }
        lines.push(line);
    }
    lines
}

/// How many points were reached, and which never, a line for each kind of process.
fn crash_lines(crashes: &[(CrashPoint, u32)]) -> Vec<String> {
    let total: u32 = crashes.iter().map(|(_, count)| count).sum();
    let reached = crashes.iter().filter(|(_, count)| *count > 0).count();
    let mut lines = vec![format!("{reached} of {} crash points reached, by {total} crashes", crashes.len())];
    for kind in Kind::ALL {
        let missed = crashes.iter().filter(|(point, count)| point.kind == kind && *count == 0);
        let missed: Vec<Place> = missed.map(|(point, _)| point.place).collect();
        if !missed.is_empty() {
            lines.push(format!("  not reached in {}: {}", kind.name(), describe(&missed)));
        }
    }
    lines
}

/// In the form "before `a`; after `a`, `b`", or "before and after" for what was missed on both sides.
fn describe(missed: &[Place]) -> String {
    let mut sides: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for place in missed {
        let (side, what) = place.words();
        sides.entry(what).or_default().push(side);
    }
    let mut whats: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (what, sides) in sides {
        whats.entry(sides.join(" and ")).or_default().push(what);
    }
    let groups: Vec<String> = whats.iter().map(|(sides, whats)| format!("{sides} {}", whats.join(", "))).collect();
    groups.join("; ")
}

fn call_lines(known: &Known) -> [String; 2] {
    let calls = |ending| known.endings.get(ending).copied().unwrap_or_default();
    let mut codes: Vec<_> = known.codes.iter().map(|(code, calls)| format!("{code} {calls}")).collect();
    codes.sort_unstable();
    [
        format!(
            "{} of {} orders acknowledged to clients that repeat a call; calls: {} succeeded, {} refused, {} of unknown \
             outcome",
            known.answered,
            known.asked,
            calls("ok"),
            calls("fail"),
            calls("unknown"),
        ),
        format!("calls that did not succeed, by code: {}", codes.join(", ")),
    ]
}

fn observed_lines(observed: &Observed, verdict: &Verdict) -> [String; 3] {
    let Verdict { drained, waited, points, .. } = verdict;
    let (awarded, cancelled) = points.as_ref().map_or((0, 0), |points| (points.awarded, points.cancelled));
    let memory: Vec<_> = observed.memory.iter().map(|(name, mib)| format!("{name} {mib}")).collect();
    [
        format!("peak memory in MiB: {}", memory.join(", ")),
        format!(
            "stock checked {} times, sessions {} times; all events delivered {drained:.1?} after the load ended",
            observed.balances, observed.sessions
        ),
        format!(
            "points awarded for {awarded} orders, and taken back for {cancelled}; {waited} events waited while \
             loyalty-service was away at the end"
        ),
    ]
}

fn finding_lines(verdict: &Verdict) -> Vec<String> {
    let findings = verdict.lost.iter().chain(&verdict.doubled).chain(&verdict.others);
    let mut lines: Vec<String> = findings.take(SHOWN).map(|finding| format!("violation: {finding}")).collect();
    let violations = verdict.violations();
    if violations > SHOWN {
        lines.push(format!("violation: … and {} more", violations - SHOWN));
    }
    lines
}

fn confidence_line(acknowledged: usize) -> String {
    #[expect(clippy::cast_precision_loss, reason = "orders that fit into memory")]
    let bound = 3.0 / acknowledged as f64;
    format!(
        "no violation among {acknowledged} acknowledged orders: at 95 % confidence, fewer than {bound:.1e} of all orders go \
         wrong under such faults (rule of three)"
    )
}

fn quote(tally: &Tally, known: &Known, verdict: &Verdict, duplicates: u64, seed: u64, lasted: Duration) -> String {
    let mut quote = format!(
        "chaos: seed={seed} minutes={:.1} orders={} faults={} duplicates_suppressed={duplicates} recovered={} lost={} \
         doubled={} violations={}",
        lasted.as_secs_f64() / 60.0,
        known.acknowledged.len(),
        tally.faults(),
        known.recovered,
        verdict.lost.len(),
        verdict.doubled.len(),
        verdict.violations(),
    );
    let not_tried: Vec<String> = tally.impossible.keys().map(usize::to_string).collect();
    if !not_tried.is_empty() {
        let _ = write!(quote, " not_tried={}", not_tried.join(","));
    }
    quote
}

/// Why the run shows nothing, if it does not.
fn vacuous(
    tally: &Tally,
    crashes: &[(CrashPoint, u32)],
    observed: &Observed,
    known: &Known,
    duplicates: u64,
    lasted: Duration,
) -> Vec<String> {
    let mut vacuous = Vec::new();
    let acknowledged = share(known.answered, known.asked);
    if acknowledged < ACKNOWLEDGED_SHARE_MIN {
        vacuous.push(format!("only {:.0} % of the orders were acknowledged", acknowledged * 100.0));
    }
    let without = tally.left().into_iter().map(|class| format!("class {class} had no effect: {}", CLASSES[class - 1]));
    vacuous.extend(without);
    vacuous.extend(vacuous_crashes(crashes, lasted));
    let seen = [
        (duplicates, "no duplicate was suppressed"),
        (known.recovered, "no repeated call was answered with an order"),
        (observed.balances, "stock was never checked"),
        (observed.sessions, "sessions were never checked"),
    ];
    vacuous.extend(seen.into_iter().filter(|(count, _)| *count == 0).map(|(_, why)| why.to_owned()));
    vacuous
}

/// Why the check at the end shows too little.
fn vacuous_check(verdict: &Verdict) -> Vec<String> {
    let mut vacuous = Vec::new();
    if verdict.waited == 0 {
        vacuous.push("no event waited for loyalty-service while it was away".into());
    }
    if verdict.points.as_ref().is_none_or(|points| points.awarded == 0) {
        vacuous.push("no points were compared".into());
    }
    vacuous
}

/// Why the certificates show nothing, if a run has any. A process that is started anew reads those that are there.
fn vacuous_renewal(renewals: u32, used: &[(&str, usize)]) -> Option<String> {
    let never: Vec<&str> = used.iter().filter(|(_, times)| *times == 0).map(|(name, _)| *name).collect();
    (renewals == 0 || !never.is_empty()).then(|| {
        format!("certificates were renewed {renewals} times, and these used none while they ran: {}", never.join(", "))
    })
}

/// Why the crashes show too little for a run of this length.
fn vacuous_crashes(crashes: &[(CrashPoint, u32)], lasted: Duration) -> Vec<String> {
    let without = kinds_without_crash(crashes).into_iter();
    let mut vacuous: Vec<String> = without.map(|kind| format!("{} never crashed at a point", kind.name())).collect();
    let lasted_minutes = |minutes: u64| lasted >= Duration::from_secs(60 * minutes);
    let reached = crashes.iter().filter(|(_, count)| *count > 0).count();
    if lasted_minutes(REACHED_FROM_MINUTES) && share(reached as u64, crashes.len() as u64) < REACHED_SHARE_MIN {
        vacuous.push(format!("processes crashed at only {reached} of {} points", crashes.len()));
    }
    if lasted_minutes(COMMON_FROM_MINUTES) {
        let missed = crashes.iter().filter(|(point, count)| point.is_common() && *count == 0);
        vacuous.extend(missed.map(|(point, _)| format!("no process crashed at a common point: {point}")));
    }
    vacuous
}

fn share(part: u64, whole: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts that fit into memory")]
    let (part, whole) = (part as f64, whole.max(1) as f64);
    part / whole
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use harness::audit::Points;

    use super::{describe, vacuous_check, vacuous_crashes, vacuous_renewal};
    use crate::{
        check::Verdict,
        points::{CrashPoint, Kind, Place, points},
    };

    /// All points, each with a crash if it was reached, judged as those of a run of that many minutes.
    fn judge(minutes: u64, is_reached: impl Fn(CrashPoint) -> bool) -> Vec<String> {
        let crashes: Vec<_> = points().into_iter().map(|point| (point, u32::from(is_reached(point)))).collect();
        vacuous_crashes(&crashes, Duration::from_secs(60 * minutes))
    }

    #[test]
    fn missed_points_are_grouped_by_the_side_of_the_statement() {
        let missed = [Place::Before("a: b"), Place::After("a: b"), Place::After("c: d"), Place::AfterReply];
        assert_eq!(describe(&missed), "after `c: d`, the reply to a delivery; before and after `a: b`");
    }

    #[test]
    fn a_check_compares_points_and_sees_events_wait_for_their_receiver_alone() {
        assert_eq!(vacuous_check(&Verdict::default()).len(), 2);
        let points = Points { awarded: 1, ..Points::default() };
        assert!(vacuous_check(&Verdict { waited: 1, points: Some(points), ..Verdict::default() }).is_empty());
    }

    #[test]
    fn renewed_certificates_are_used_or_the_run_shows_nothing() {
        assert!(vacuous_renewal(0, &[]).is_some());
        assert!(vacuous_renewal(6, &[("orders", 1), ("relay", 0)]).unwrap().ends_with(": relay"));
        assert_eq!(vacuous_renewal(6, &[("orders", 1), ("relay", 7)]), None);
    }

    #[test]
    fn a_run_of_any_length_crashes_each_kind_of_process() {
        assert_eq!(judge(1, |point| point.kind != Kind::OrdersRelay), ["orders-relay never crashed at a point"]);
        assert!(judge(1, |point| point.place == Place::After("COMMIT") || point.place == Place::AfterReply).is_empty());
    }

    #[test]
    fn a_run_of_some_minutes_reaches_a_third_of_the_points() {
        assert!(judge(3, CrashPoint::is_common).is_empty());
        let vacuous = judge(4, CrashPoint::is_common);
        assert_eq!(vacuous, [format!("processes crashed at only 32 of {} points", points().len())]);
    }

    #[test]
    fn a_longer_run_reaches_each_common_point() {
        let missed = CrashPoint { kind: Kind::InventoryService, place: Place::Before("COMMIT") };
        assert!(judge(7, |point| point != missed).is_empty());
        let vacuous = judge(8, |point| point != missed);
        assert_eq!(vacuous, ["no process crashed at a common point: inventory-service before `COMMIT`"]);
        let rare = CrashPoint { kind: Kind::InventoryService, place: Place::Before("inbox: prune") };
        assert!(judge(8, |point| point != rare).is_empty());
    }
}
