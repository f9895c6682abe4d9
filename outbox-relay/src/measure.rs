//! Metrics of the relay, and of its outbox.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use chassis::Database;
use metrics::{SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    count::{Counted, Upkeep, count_by_subscription, read_upkeep},
    delivery::Delivery,
    failures::Failures,
    fate::Fate,
    floor::Floor,
    lease::{Lease, is_cut_off},
    park::Swept,
    route::Condition,
    settle::Settled,
};

const EVENTS: &str = "outbox_relay_events_total";
const CHARGED: &str = "outbox_relay_charged_total";
const DELIVERIES: &str = "outbox_relay_deliveries_total";
const ROUTE_STATE: &str = "outbox_relay_route_state";
const SETTLED: &str = "outbox_relay_event_settled_seconds";
const OUTBOX_EVENTS: &str = "outbox_events";
const UNROUTED: &str = "outbox_unrouted_events";
const ESTIMATED: &str = "outbox_events_estimated";
const OLDEST: &str = "outbox_oldest_event_age_seconds";
const EXPIRY: &str = "outbox_oldest_event_expires_in_seconds";
const PAUSED: &str = "outbox_paused_seconds";
const ENQUEUED: &str = "outbox_enqueued_total";
const HORIZON: &str = "outbox_horizon_age_seconds";
const DEAD_ROWS: &str = "outbox_vacuum_dead_rows";
const VACUUMED: &str = "outbox_vacuum_age_seconds";
const MEASURED: &str = "outbox_measured_timestamp_seconds";

/// How often the outbox is measured, unless that takes long.
const INTERVAL: Duration = Duration::from_secs(5);
/// A measurement is followed by a pause of so many times what it took: it is to cost the database next to nothing.
const PAUSE_FACTOR: u32 = 100;
/// Between two measurements, ages grow by themselves.
const AGE_INTERVAL: Duration = Duration::from_secs(1);
/// Reasons come from receivers. Each is a time series, so there are at most so many.
const REASONS_MAX: usize = 50;
const REASON_CHARS_MAX: usize = 60;

/// Says what each metric is.
pub(crate) fn describe() {
    describe_counter!(
        EVENTS,
        "Leased events by outcome: handled (deleted), retried (failed alone, charged or not), died (kept as dead), released (visible \
         again, no attempt spent), lost (the lease expired and another relay has them), unsettled (the database failed; the \
         lease expires)"
    );
    describe_counter!(CHARGED, "Attempts charged to events, by the code of the reason; a death counts, too");
    describe_counter!(
        DELIVERIES,
        "Deliveries by outcome: answered, unreachable (no connection), unavailable (receiver or proxy), silent (no \
         reply), refused (the whole batch), too_large (perhaps), barred (this relay may not deliver), unmatched (an \
         answer to other events)"
    );
    describe_gauge!(
        ROUTE_STATE,
        "1 for the state that the route is in, 0 for the others: STARTING, OPEN, DOWN (its receiver is unavailable), \
         BARRED (its receiver does not allow this relay to deliver)"
    );
    describe_histogram!(
        SETTLED,
        Unit::Seconds,
        "From the begin of the transaction that enqueued an event until it was deleted as handled"
    );
    describe_gauge!(
        OUTBOX_EVENTS,
        "Events by subscription and state: waiting, leased, backing_off, dead. Exact up to 5,000 of a state; see \
         outbox_events_estimated"
    );
    describe_gauge!(
        ESTIMATED,
        "1 if the subscription has too many events to count, so that their numbers are estimates"
    );
    describe_gauge!(UNROUTED, "Events that no subscription takes; they stay until one is made for them");
    describe_gauge!(
        OLDEST,
        Unit::Seconds,
        "Age of the oldest event that is not dead, by subscription; 0 if there is none. Too small at most, if the numbers \
         are estimates"
    );
    describe_gauge!(
        EXPIRY,
        Unit::Seconds,
        "Time until the oldest event is too old to be delivered and dies, if its receiver has said how long it remembers"
    );
    describe_gauge!(
        PAUSED,
        Unit::Seconds,
        "For how long the subscription is paused, alone or with all; 0 if it is not"
    );
    describe_counter!(ENQUEUED, "Rows ever enqueued, by the server's statistics, those that were rolled back included");
    describe_gauge!(
        HORIZON,
        Unit::Seconds,
        "Age of the oldest transaction of the database: VACUUM keeps what was deleted since. NaN without pg_read_all_stats"
    );
    describe_gauge!(
        DEAD_ROWS,
        "Versions of rows that were deleted or replaced and wait for VACUUM, by the server's statistics"
    );
    describe_gauge!(VACUUMED, Unit::Seconds, "Time since the last VACUUM of the outbox; NaN if there was none");
    describe_gauge!(MEASURED, Unit::Seconds, "When the outbox was measured last, by the database's clock");
}

/// Creates a route's metrics with zeros, since Prometheus can take no rate of a metric that does not exist yet.
pub(crate) fn register(subscription: &str) {
    settled(subscription, &Settled::default());
    for outcome in Delivery::LABELS {
        counter!(DELIVERIES, "subscription" => subscription.to_owned(), "outcome" => outcome).increment(0);
    }
    route_state(subscription, Some(Condition::Starting));
}

pub(crate) fn delivered(subscription: &str, outcome: &'static str) {
    counter!(DELIVERIES, "subscription" => subscription.to_owned(), "outcome" => outcome).increment(1);
}

pub(crate) fn settled(subscription: &str, settled: &Settled) {
    let Settled { handled, retried, died, released, lost, unsettled, .. } = *settled;
    let counts = [
        ("handled", handled),
        ("retried", retried),
        ("died", died),
        ("released", released),
        ("lost", lost),
        ("unsettled", unsettled),
    ];
    for (outcome, events) in counts {
        let events = u64::try_from(events).unwrap_or(u64::MAX);
        counter!(EVENTS, "subscription" => subscription.to_owned(), "outcome" => outcome).increment(events);
    }
}

/// What a settlement does, if nothing of it is lost.
pub(crate) struct Outcomes {
    leased_at: Instant,
    /// How old the handled events were when they were leased.
    ages: Vec<f64>,
    charged: Vec<SharedString>,
}

impl Outcomes {
    pub(crate) fn of(lease: &Lease, fates: &[Fate]) -> Self {
        let mut outcomes = Self { leased_at: lease.leased_at, ages: Vec::new(), charged: Vec::new() };
        for (row, fate) in lease.rows.iter().zip(fates) {
            match fate {
                Fate::Delete => outcomes.ages.push(row.age_seconds),
                Fate::Dead(reason) | Fate::Failed { charge: true, reason, .. } => {
                    outcomes.charged.push(reason_label(reason));
                }
                Fate::Failed { charge: false, .. } | Fate::Held { .. } | Fate::Back(_) => {}
            }
        }
        outcomes
    }

    pub(crate) fn tell(self, subscription: &str) {
        let subscription: SharedString = subscription.to_owned().into();
        let (durations, held) =
            (histogram!(SETTLED, "subscription" => subscription.clone()), self.leased_at.elapsed().as_secs_f64());
        for age in self.ages {
            // A clock may have been set back. A negative sum would look like a restart.
            durations.record((age + held).max(0.0));
        }
        for reason in self.charged {
            counter!(CHARGED, "subscription" => subscription.clone(), "reason" => reason).increment(1);
        }
    }
}

/// The code of a reason, or `_OTHER`.
fn reason_label(reason: &str) -> SharedString {
    static SEEN: LazyLock<Mutex<BTreeSet<Arc<str>>>> = LazyLock::new(Mutex::default);
    label_of(reason, &mut SEEN.lock().unwrap_or_else(PoisonError::into_inner))
}

fn label_of(reason: &str, seen: &mut BTreeSet<Arc<str>>) -> SharedString {
    let code = reason.split(':').next().unwrap_or_default();
    if let Some(known) = seen.get(code) {
        return known.clone().into();
    }
    let is_code = !code.is_empty()
        && code.len() <= REASON_CHARS_MAX
        && code.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !is_code || seen.len() >= REASONS_MAX {
        return "_OTHER".into();
    }
    let code: Arc<str> = code.into();
    seen.insert(code.clone());
    code.into()
}

/// `None`: the route has ended.
pub(crate) fn route_state(subscription: &str, condition: Option<Condition>) {
    for state in [Condition::Starting, Condition::Open, Condition::Down, Condition::Barred] {
        let is_in = if Some(state) == condition { 1.0 } else { 0.0 };
        gauge!(ROUTE_STATE, "subscription" => subscription.to_owned(), "state" => state.as_str()).set(is_in);
    }
}

/// Measures the outbox until shutdown. Each relay tells of all subscriptions, so one that no relay serves is seen, too.
pub(crate) async fn measure_outbox(database: Database, floors: Vec<(i16, Arc<Floor>)>, shutdown: CancellationToken) {
    let failures = Failures::default();
    let mut measured = Measured::default();
    let mut next = Instant::now();
    let mut ticks = interval(AGE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        if Instant::now() < next {
            measured.tell_ages();
            continue;
        }
        let began = Instant::now();
        let below = floors.iter().filter_map(|(id, floor)| Some((*id, floor.sweeps_below()?)));
        let (subscription_ids, below) = below.unzip();
        let swept = Swept { subscription_ids, below };
        let reading = database.run(move |connection| {
            Box::pin(async move {
                // Not the wait for a connection: it costs the database nothing, and a busy start would blind the relay for long.
                let began = Instant::now();
                let (counted, upkeep) =
                    (count_by_subscription(connection, &swept).await?, read_upkeep(connection).await?);
                Ok::<_, sqlx::Error>((counted, upkeep, began.elapsed()))
            })
        });
        // The database's work ends by itself.
        let Some(read) = shutdown.run_until_cancelled(reading).await else { break };
        let took = match read {
            Ok((counted, upkeep, took)) => {
                failures.end();
                measured.renew(counted, began);
                measured.tell_upkeep(upkeep);
                took
            }
            Err(cause) => {
                if failures.count() {
                    warn!(%cause, "cannot measure the outbox");
                }
                // After an outage the first answer matters more than what it costs.
                if is_cut_off(&cause) { began.elapsed() } else { Duration::ZERO }
            }
        };
        measured.tell_ages();
        next = Instant::now() + INTERVAL.max(took * PAUSE_FACTOR);
    }
}

/// The last measurement.
#[derive(Default)]
struct Measured {
    counted: Vec<Counted>,
    at: Option<Instant>,
    /// The subscriptions that were ever told of. One that has ended has no events, and no age.
    told: HashSet<String>,
    /// The server's count of rows at the last measurement.
    enqueued: u64,
}

impl Measured {
    fn renew(&mut self, counted: Vec<Counted>, at: Instant) {
        for name in self.told.iter().filter(|name| counted.iter().all(|of| of.name != **name)) {
            tell_counts(&Counted { name: name.clone(), ..Counted::default() });
            let max_age_seconds = Some(f64::INFINITY);
            tell_ages(&Counted { name: name.clone(), max_age_seconds, ..Counted::default() }, 0.0);
        }
        for of in &counted {
            tell_counts(of);
            self.told.insert(of.name.clone());
        }
        (self.counted, self.at) = (counted, Some(at));
    }

    fn tell_upkeep(&mut self, upkeep: Upkeep) {
        let Upkeep { horizon_seconds, dead_rows, vacuumed_seconds, enqueued, at } = upkeep;
        for (name, seconds) in [(HORIZON, horizon_seconds), (VACUUMED, vacuumed_seconds)] {
            gauge!(name).set(seconds.unwrap_or(f64::NAN));
        }
        gauge!(DEAD_ROWS).set(dead_rows as f64);
        // The statistics of a server begin anew after a crash, and at another server.
        let enqueued = enqueued.unsigned_abs();
        counter!(ENQUEUED).increment(enqueued.checked_sub(self.enqueued).unwrap_or(enqueued));
        self.enqueued = enqueued;
        gauge!(MEASURED).set(at);
    }

    /// Also while the database cannot be read: an alert about an old event must not end with an outage.
    fn tell_ages(&self) {
        let passed = self.at.map_or(0.0, |at| at.elapsed().as_secs_f64());
        for of in &self.counted {
            tell_ages(of, passed);
        }
    }
}

fn tell_counts(of: &Counted) {
    let Counted { name, waiting, leased, backing_off, dead, estimated, .. } = of;
    if name.is_empty() {
        gauge!(UNROUTED).set((waiting + leased + backing_off + dead) as f64);
        return;
    }
    for (state, events) in [("waiting", waiting), ("leased", leased), ("backing_off", backing_off), ("dead", dead)] {
        gauge!(OUTBOX_EVENTS, "subscription" => name.clone(), "state" => state).set(*events as f64);
    }
    gauge!(ESTIMATED, "subscription" => name.clone()).set(if estimated.any() { 1.0 } else { 0.0 });
}

fn tell_ages(of: &Counted, passed: f64) {
    let Counted { name, oldest_seconds, max_age_seconds, paused_seconds, .. } = of;
    if name.is_empty() {
        return;
    }
    let age = oldest_seconds.map_or(0.0, |age| age.max(0.0) + passed);
    gauge!(OLDEST, "subscription" => name.clone()).set(age);
    if let Some(max_age) = max_age_seconds {
        gauge!(EXPIRY, "subscription" => name.clone()).set(max_age - age);
    }
    let paused = if *paused_seconds > 0.0 { paused_seconds + passed } else { 0.0 };
    gauge!(PAUSED, "subscription" => name.clone()).set(paused);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{REASONS_MAX, label_of};

    #[test]
    fn a_receiver_cannot_make_any_number_of_time_series() {
        let mut seen = BTreeSet::new();
        assert_eq!(&*label_of("UNKNOWN_SKU: there is no SKU a\"b", &mut seen), "UNKNOWN_SKU");
        let long = "X".repeat(61);
        for reason in ["no code: at all", "", ": nothing before it", "a\"b", "a\nb", &long] {
            assert_eq!(&*label_of(reason, &mut seen), "_OTHER", "{reason}");
        }
        let labels: BTreeSet<_> = (0..1000).map(|number| label_of(&format!("R{number}: x"), &mut seen)).collect();
        assert_eq!(labels.len(), REASONS_MAX);
        assert_eq!(&*label_of("UNKNOWN_SKU", &mut seen), "UNKNOWN_SKU");
    }
}
