//! The loop: lease, deliver, settle.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime},
};

use chassis::{Database, RunError};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    ahead::Ahead,
    deliver::Receiver,
    delivery::{Delivery, Failed},
    failures::Failures,
    fate::Fate,
    floor::RESCAN_INTERVAL,
    isolate::{Before, Call, Conclusion, Isolation, Step},
    lease::{BatchLimits, Lease, LeaseQuery, Scope, lease},
    leased_row::LeasedRow,
    measure,
    route::{Admission, Probe, Route},
    run::{LastTaken, wake_next},
    settings::Settings,
    settle::{Policy, settle},
    trace_events::{EndingEvents, FailedEvents},
    wake::Wake,
};

/// One of a route's workers. Any number of them, in any number of processes, share an outbox. Only leases keep them
/// apart: they know nothing of each other.
pub(crate) struct Worker {
    pub(crate) number: u32,
    pub(crate) database: Database,
    pub(crate) receiver: Receiver,
    pub(crate) settings: Settings,
    pub(crate) route: Route,
    pub(crate) lease_query: LeaseQuery,
    pub(crate) wake: Wake,
    /// The latest begin of a delivery on its connection of which the receiver took an event.
    pub(crate) taken: Option<Instant>,
    pub(crate) ahead: Ahead,
    /// Of all workers.
    pub(crate) lease_failures: Arc<Failures>,
    /// Stops leasing.
    pub(crate) shutdown: CancellationToken,
    /// Cancels the deliveries in flight.
    pub(crate) cancel_deliveries: CancellationToken,
}

/// The clocks of two sound machines differ by less.
const CLOCK_MARGIN: Duration = Duration::from_secs(3600);
/// Nor may the margin be more than this part of the age, or it would cover the age of a receiver that forgets soon. Its
/// events would then die by one clock alone.
const CLOCK_MARGIN_PART: u32 = 6;
/// The longest that an event waits before the clocks are compared again.
const DOUBT_PAUSE: Duration = Duration::from_secs(60);
const DOUBTFUL_AGE: &str = "too old by the database's clock, and not by the relay's: set the wrong one right";

/// How a round of the loop ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// Events were leased. Their successors may be free now, so the next round follows at once.
    Worked,
    /// No event is free any more, or the workers that notifications wake will lease the rest.
    Idle,
    /// The subscription was resumed slowly, and its pace allows nothing more for so long.
    TooFast(Duration),
    /// The database failed.
    Failed,
}

/// How far a batch got.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BatchOutcome {
    /// The receiver has answered every delivery, if only with a refusal. Events that are too old needed none. The
    /// settlement may have failed.
    Completed(Completed),
    /// Some events were not delivered, or the receiver did not take them. It was unavailable or barred this relay, the
    /// lease was nearly over, or this process is about to end.
    Interrupted,
    /// The database failed, so no events were leased.
    LeaseFailed,
}

impl BatchOutcome {
    /// How many events of at most `limit` may have been delivered.
    pub(crate) fn leased(&self, limit: u32) -> u32 {
        match self {
            Self::Completed(Completed { events, .. }) => u32::try_from(*events).unwrap_or(limit).min(limit),
            Self::Interrupted => limit,
            Self::LeaseFailed => 0,
        }
    }
}

/// A lease whose deliveries were all answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Completed {
    /// With none, the outbox had no free event.
    pub(crate) events: usize,
    /// Whether it had as many as a lease may have.
    pub(crate) is_full: bool,
    /// Whether the next lease may find events that no notification announces.
    pub(crate) leaves_events: bool,
}

/// Workers of a route that notifications wake. A worker that leases a full batch wakes another one. If every idle
/// worker woke on every notification, a steady stream of single events would be delivered in many small batches. Each
/// batch has a cost of its own.
const NOTIFIED_WORKERS: u32 = 2;

/// The receiver is asked for its types again when an event is of another type, but no more often than this.
const TYPES_AGE_MAX: Duration = Duration::from_secs(1);

/// Longest pause after the database failed. It is random, so that workers do not retry in step.
const DATABASE_PAUSE_MAX: Duration = Duration::from_secs(1);

impl Worker {
    /// Works until shutdown, or until the relay may not deliver to the receiver at all.
    pub(crate) async fn run(mut self) -> Result<(), RunError> {
        while !self.shutdown.is_cancelled() {
            match self.round().await? {
                Round::Worked => {}
                Round::Idle if self.is_notified() => self.wake.wait(self.poll()).await,
                Round::Idle => self.wake.wait_without_notifications(self.poll()).await,
                Round::TooFast(wait) => _ = self.shutdown.run_until_cancelled(sleep(wait)).await,
                Round::Failed => self.pause().await,
            }
        }
        Ok(())
    }

    fn is_notified(&self) -> bool {
        self.number <= NOTIFIED_WORKERS
    }

    async fn round(&mut self) -> Result<Round, RunError> {
        let route = self.route.clone();
        match self.shutdown.run_until_cancelled(route.admit()).await {
            None => Ok(Round::Idle),
            Some(Admission::Probe(probe)) => self.reopen(probe).await,
            Some(Admission::Open { .. }) => Ok(self.process_open().await),
        }
    }

    async fn process_open(&mut self) -> Round {
        let began = Instant::now();
        let limit = match self.route.pace().take(self.ahead.events(self.settings.batch), began) {
            Ok(limit) => limit,
            // Not here: a worker that delivers keeps others from probing.
            Err(wait) => return Round::TooFast(wait.min(self.poll())),
        };
        let outcome = self.process_batch(limit, None).await;
        self.route.pace().give_back(limit - outcome.leased(limit));
        let is_full = matches!(outcome, BatchOutcome::Completed(Completed { is_full: true, .. }));
        self.ahead = self.ahead.after(is_full, began.elapsed());
        match outcome {
            BatchOutcome::Completed(Completed { leaves_events: false, .. }) => Round::Idle,
            BatchOutcome::Completed(Completed { is_full: false, .. }) if !self.is_notified() => {
                self.wake.wake_notified();
                Round::Idle
            }
            BatchOutcome::Completed(_) | BatchOutcome::Interrupted => Round::Worked,
            BatchOutcome::LeaseFailed => Round::Failed,
        }
    }

    /// Leases, delivers and settles at most `limit` events. With a probe, no other worker of the route does so
    /// meanwhile.
    pub(crate) async fn process_batch(&mut self, limit: u32, probe: Option<&mut Probe<'_>>) -> BatchOutcome {
        // A route that is open, or probed, has described itself.
        let Some(max_age) = self.route.max_age() else { return BatchOutcome::Interrupted };
        let scope = Scope { limit, max_age };
        let lease = match lease(&self.database, &self.lease_query, scope).await {
            Ok(lease) => lease,
            Err(cause) => {
                if self.lease_failures.count() {
                    error!(%cause, "cannot lease; trying again about twice a second, as each worker of this relay does");
                }
                return BatchOutcome::LeaseFailed;
            }
        };
        let failures = self.lease_failures.end();
        if failures > 0 {
            info!(failures, "leasing again");
        }
        let Some(mut lease) = lease else { return BatchOutcome::Completed(Completed::default()) };
        if probe.is_none() && lease.is_full {
            self.wake.wake_any();
        }
        self.set_unknown_aside(&mut lease).await;
        let (fates, conclusion) = self.deliver(&mut lease, probe).await;
        let (events, is_full, last_look) = (lease.rows.len(), lease.is_full, lease.last_look);
        // First the route is closed, then the events are visible again. The other way round, other workers would
        // deliver them once more.
        let works = self.conclude(conclusion);
        self.settle(lease, &fates).await;
        if !works {
            return BatchOutcome::Interrupted;
        }
        let is_gone = fates.iter().all(|fate| *fate == Fate::Delete);
        let leaves_events = !is_gone || self.lease_query.may_leave_events(last_look);
        BatchOutcome::Completed(Completed { events, is_full, leaves_events })
    }

    /// Sets events aside whose type the receiver does not know: it may be upgraded later. It is asked once more before
    /// that, at most once a second.
    async fn set_unknown_aside(&mut self, lease: &mut Lease) {
        let route = self.route.clone();
        let unknown = lease.set_unknown_aside(|event_type| route.knows(event_type));
        if !unknown {
            return;
        }
        let asked = route.types_age() > TYPES_AGE_MAX && self.describes().await;
        let still_unknown = !asked || lease.set_unknown_aside(|event_type| route.knows(event_type));
        if let Some(row) = lease.rows.iter().find(|row| still_unknown && row.unknown)
            && route.may_warn_of_types()
        {
            let (route, event_type) = (route.name(), &row.event_type);
            warn!(
                route,
                event_type,
                "events wait: the receiver does not know their type; upgrade it, correct the route, or narrow the subscription"
            );
        }
    }

    /// Delivers the lease's events, and returns the fate of each. An event that was not delivered goes back.
    async fn deliver(&mut self, lease: &mut Lease, mut probe: Option<&mut Probe<'_>>) -> (Vec<Fate>, Conclusion) {
        let unwitnessed = self.route.unwitnessed();
        let before = Before {
            probe: probe.is_some(),
            taken: self.taken,
            others_fail: unwitnessed.is_some_and(|event_id| lease.rows.iter().all(|row| row.event_id != event_id)),
        };
        let ordered = self.route.is_ordered();
        let events = self.settings.batch as usize;
        let batches = lease.batches(BatchLimits { events, bytes: self.route.message_bytes_max(), ordered });
        let mut isolation = Isolation::of(lease.cases(), batches, before);
        let conclusion = loop {
            match isolation.next() {
                Step::End(conclusion) => break conclusion,
                Step::Describe => {
                    let answered = match probe.as_deref_mut() {
                        // It may be about to start again.
                        Some(probe) => self.is_ready(probe, lease).await,
                        None => self.describes().await,
                    };
                    isolation.described(answered);
                }
                Step::Deliver(batch) => {
                    let Some((call, delivery)) = self.call(lease, batch.clone(), probe.as_deref_mut()).await else {
                        break Conclusion::Unknown;
                    };
                    isolation.learn(batch, call, delivery);
                }
            }
        };
        self.note(lease, &isolation);
        let fates = isolation.fates().into_iter().zip(&lease.rows);
        (fates.map(|(fate, row)| self.fate_aside(row).unwrap_or(fate)).collect(), conclusion)
    }

    /// Keeps what a lease has shown of the receiver.
    fn note(&mut self, lease: &Lease, isolation: &Isolation) {
        if let Some(event) = isolation.taken_out_of_sequence() {
            let LeasedRow { event_id, aggregate_id, sequence, .. } = &lease.rows[event];
            error!(
                route = self.route.name(), %event_id, %aggregate_id, sequence,
                "the receiver applied an event though it did not apply the one before: it says that it is ordered, so it \
                 has to answer RETRY for this one"
            );
        }
        self.taken = isolation.taken();
        if isolation.took() {
            self.route.took();
        }
        if let Some(event) = isolation.failed_without_witness() {
            self.route.failed_without_witness(lease.rows[event].event_id);
        }
        if let Some(bytes) = isolation.message_bytes_max() {
            self.route.limit_messages(bytes);
        }
    }

    /// One call of the receiver; `None` if there may be none, or if it was cancelled.
    async fn call(
        &mut self,
        lease: &mut Lease,
        batch: Range<usize>,
        mut probe: Option<&mut Probe<'_>>,
    ) -> Option<(Call, Delivery)> {
        let deadline = self.may_deliver(lease, batch.len(), probe.as_deref_mut()).await?;
        let (is_probing, alone) = (probe.is_some(), probe.is_some_and(|probe| probe.is_alone()));
        let (events, began) = (batch.len(), Instant::now());
        let calling = self.receiver.deliver(&lease.rows[batch], deadline);
        let delivery = self.cancel_deliveries.run_until_cancelled(calling).await?;
        measure::delivered(self.route.name(), delivery.as_str());
        if let Delivery::Failed(Failed { reason, .. }) = &delivery {
            let (route, worker) = (self.route.name(), self.number);
            // While it probes, the log has said already that the route is down. A probe calls many times a second.
            if is_probing {
                debug!(route, worker, events, reason, "delivery failed");
            } else {
                warn!(route, worker, events, reason, "delivery failed");
            }
        }
        Some((Call { began, ended: Instant::now(), alone }, delivery))
    }

    /// The deadline of the next delivery; `None` if there may be none. Deliveries in parts may take longer than the
    /// lease. That must not look like silence of the receiver, so the lease is renewed.
    async fn may_deliver(
        &mut self,
        lease: &mut Lease,
        events: usize,
        probe: Option<&mut Probe<'_>>,
    ) -> Option<Instant> {
        let Some(probe) = probe else {
            let may = Instant::now() <= lease.split_before() || (!lease.is_overlong() && self.renew(lease).await);
            return may.then(|| lease.deliver_before());
        };
        let ready = self.is_ready(probe, lease).await;
        ready.then(|| if events > 1 { lease.split_before() } else { lease.deliver_before() })
    }

    /// The fate of an event that is set aside.
    fn fate_aside(&self, row: &LeasedRow) -> Option<Fate> {
        if row.expired {
            let max_age = self.route.max_age().unwrap_or_default();
            #[expect(clippy::disallowed_methods, reason = "a witness, and only against the death of an event")]
            let fate = fate_of_expired(SystemTime::now(), row.created_at.into(), max_age);
            if matches!(fate, Fate::Held { .. }) && self.route.may_warn_of_clocks() {
                warn!(route = self.route.name(), event_id = %row.event_id, "events wait: {DOUBTFUL_AGE}");
            }
            return Some(fate);
        }
        row.unknown.then(|| Fate::Held {
            wait: hold_time(row.age_seconds),
            reason: format!("UNKNOWN_TYPE: the receiver does not know {}", row.event_type),
        })
    }

    /// Closes the route if the receiver does not work. Returns whether all events were answered.
    fn conclude(&self, conclusion: Conclusion) -> bool {
        match conclusion {
            Conclusion::Works => return true,
            Conclusion::Outage { reason, retry_after } => self.route.mark_down(&reason, retry_after),
            Conclusion::Barred { reason } => self.route.bar(&reason),
            Conclusion::Unknown => {}
        }
        false
    }

    /// A settlement that fails does no harm: the lease expires, the events are delivered again, and the receiver
    /// answers DUPLICATE for those it has applied.
    async fn settle(&self, lease: Lease, fates: &[Fate]) {
        let policy = Policy::of(&self.settings);
        let (events, oldest) = (lease.rows.len(), lease.oldest);
        let last = LastTaken::of(lease.subscription_id, &lease.rows, fates);
        let outcomes = measure::Outcomes::of(&lease, fates);
        let failed = FailedEvents::of(&lease.rows, fates);
        let ending = EndingEvents::of(&lease, fates, self.receiver.destination());
        let settled = settle(&self.database, lease, fates, policy, &self.shutdown).await;
        if let Err(cause) = wake_next(&self.database, last).await {
            warn!(%cause, "later events of an aggregate may wait until their time is over");
        }
        self.lease_query.floor.lower(oldest);
        measure::settled(self.route.name(), &settled);
        self.route.count_delivered(settled.handled);
        if settled.lost + settled.unsettled == 0 {
            outcomes.tell(self.route.name());
        }
        ending.tell(&settled);
        let route = self.route.name();
        debug!(route, worker = self.number, events, handled = settled.handled, ?settled, "settled");
        if settled.lost > 0 {
            warn!(route, worker = self.number, events = settled.lost, "lease lost: another relay has these events");
        }
        if settled.unsettled > 0 {
            error!(
                route,
                worker = self.number,
                events = settled.unsettled,
                "events may not be settled: their lease will expire"
            );
        }
        if settled.retried > 0 {
            warn!(route, worker = self.number, events = settled.retried, "events failed, and are retried");
        }
        if settled.died > 0 {
            error!(
                route,
                worker = self.number,
                events = settled.died,
                "events are dead: kept in the outbox with the reason"
            );
        }
        if settled.retried + settled.died > 0 {
            failed.log(route);
        }
    }

    /// Longest wait for a notification. The first lease after a notification usually scans only above the floor, and
    /// the new event may lie below. Then the next poll comes as soon as a full scan is due.
    pub(crate) fn poll(&self) -> Duration {
        let poll = Duration::from_millis(self.settings.poll_ms);
        if self.lease_query.floor.may_hide_events() { poll.min(RESCAN_INTERVAL) } else { poll }
    }

    async fn pause(&self) {
        let pause = DATABASE_PAUSE_MAX.mul_f64(fastrand::f64());
        self.shutdown.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
}

/// What becomes of an event that is too old by the database's clock.
///
/// It is dead, undelivered: its receiver may have applied it long ago, and forgotten that. But a clock that jumps makes
/// all events old at once. So the clock of this process has to agree. Otherwise one of them is wrong, and the event waits:
/// to deliver it could apply it twice, if this one is.
fn fate_of_expired(now: SystemTime, created_at: SystemTime, max_age: Duration) -> Fate {
    let margin = CLOCK_MARGIN.min(max_age / CLOCK_MARGIN_PART);
    if now.duration_since(created_at).is_ok_and(|age| age + margin > max_age) {
        let hours = max_age.as_secs_f64() / 3600.0;
        return Fate::Dead(format!("EXPIRED: older than {hours:.0} h: the receiver may have forgotten it"));
    }
    Fate::Held { wait: jittered(DOUBT_PAUSE), reason: format!("CLOCK: {DOUBTFUL_AGE}") }
}

/// How long to hold an event that its receiver does not know: a part of its age, so that many of them cost little.
fn hold_time(age_seconds: f64) -> Duration {
    jittered(Duration::from_secs_f64((age_seconds / 4.0).clamp(15.0, 300.0)))
}

/// At least half of it. Events that are held together should not come back together.
fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::{DOUBTFUL_AGE, fate_of_expired};
    use crate::fate::Fate;

    #[test]
    fn an_event_dies_of_age_only_if_both_clocks_say_so() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_hours(500_000);
        // Those of receivers that remember for a week, for two hours, and for one.
        for (max_age, margin) in [(6 * 24 * 60, 60), (2 * 60 * 6 / 7, 17), (60 * 6 / 7, 8)] {
            let [max_age, margin] = [max_age, margin].map(Duration::from_mins);
            let at_age = |age| fate_of_expired(now, now - age, max_age);
            for age in [max_age * 2, max_age, max_age - margin / 2] {
                let fate = at_age(age);
                assert!(matches!(&fate, Fate::Dead(reason) if reason.starts_with("EXPIRED")), "{age:?}: {fate:?}");
            }
            for age in [Duration::ZERO, Duration::from_secs(5), max_age - margin * 2] {
                let fate = at_age(age);
                assert!(
                    matches!(&fate, Fate::Held { reason, .. } if reason.ends_with(DOUBTFUL_AGE)),
                    "{age:?}: {fate:?}"
                );
            }
            // The relay's clock lies before the event was enqueued.
            assert!(matches!(fate_of_expired(now, now + max_age, max_age), Fate::Held { .. }));
        }
    }
}
