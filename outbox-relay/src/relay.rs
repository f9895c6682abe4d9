//! The loop: lease, deliver, settle.

use std::{collections::HashMap, ops::Range, time::Duration};

use chassis::{Database, RunError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::{
    Settings,
    deliver::{Answer, Delivery, Failed, Failure, Receiver, Verdict},
    floor::RESCAN_INTERVAL,
    lease::{Lease, LeaseQuery, lease},
    measure,
    reopen::FIRST_BATCH,
    route::{Admission, Probe, Route},
    settle::{Policy, settle},
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
    /// Stops leasing.
    pub(crate) shutdown: CancellationToken,
    /// Cancels the deliveries in flight.
    pub(crate) cancel_deliveries: CancellationToken,
}

/// How a round of the loop ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// Events were leased. Their successors may be free now, so the next round follows at once.
    Worked,
    /// No event was free, or the workers that notifications wake will lease the rest.
    Idle,
    /// The database failed.
    Failed,
}

/// How far a batch got.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BatchOutcome {
    /// The receiver has answered every delivery, if only with a refusal. Events that are too old needed none. The
    /// settlement may have failed. The batch held this many events; with none, the outbox had no free event.
    Completed(usize),
    /// Some events were not delivered, or the receiver did not take them. It was unavailable or barred this relay, the
    /// lease was nearly over, or this process is about to end.
    Interrupted,
    /// The database failed, so no events were leased.
    LeaseFailed,
}

/// Workers of a route that notifications wake. A worker that leases a full batch wakes another one. If every idle
/// worker woke on every notification, a steady stream of single events would be delivered in many small batches. Each
/// batch has a cost of its own.
const NOTIFIED_WORKERS: u32 = 2;

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
            Some(Admission::Open { .. }) => Ok(match self.process_batch(self.settings.batch, None).await {
                BatchOutcome::Completed(0) => Round::Idle,
                BatchOutcome::Completed(events) if events < self.settings.batch as usize && !self.is_notified() => {
                    self.wake.wake_notified();
                    Round::Idle
                }
                BatchOutcome::Completed(_) | BatchOutcome::Interrupted => Round::Worked,
                BatchOutcome::LeaseFailed => Round::Failed,
            }),
        }
    }

    /// Leases, delivers and settles at most `limit` events. With a probe, no other worker of the route does so
    /// meanwhile.
    pub(crate) async fn process_batch(&mut self, limit: u32, probe: Option<&mut Probe<'_>>) -> BatchOutcome {
        let mut lease = match lease(&self.database, &self.lease_query, limit).await {
            Ok(Some(lease)) => lease,
            Ok(None) => return BatchOutcome::Completed(0),
            Err(cause) => {
                error!(%cause, "cannot lease");
                return BatchOutcome::LeaseFailed;
            }
        };
        let events = lease.rows.len();
        if probe.is_none() && events == limit as usize {
            self.wake.wake_any();
        }
        let mut verdicts = self.verdicts_by_age(&lease);
        let completed = self.deliver(&mut lease, &mut verdicts, probe).await;
        self.settle(lease, &verdicts).await;
        if completed { BatchOutcome::Completed(events) } else { BatchOutcome::Interrupted }
    }

    /// The verdicts before any delivery. An event that is too old is dead, undelivered: its receiver may have applied
    /// it long ago, and forgotten that.
    fn verdicts_by_age(&self, lease: &Lease) -> Vec<Verdict> {
        let hours = self.settings.max_age.max_age_hours;
        let too_old = || Verdict::Dead(format!("EXPIRED: older than {hours} h, the age limit for delivery"));
        lease.rows.iter().map(|row| if row.expired { too_old() } else { Verdict::Release }).collect()
    }

    /// Delivers the lease's batches, and writes the results into `verdicts`. Returns whether it completed all of them.
    /// An event that was not delivered keeps its verdict.
    ///
    /// One event can be the cause when a whole batch fails, so the events are then delivered one by one:
    ///
    /// - After a *refusal* the receiver is up, so this happens at once.
    /// - After *silence* the receiver may have crashed, and with it every delivery in flight. So only a probe delivers
    ///   one by one, and before each delivery it waits until the receiver is up.
    ///
    /// An event spends an attempt only on a failure that it alone can have caused. A refusal counts whenever the event
    /// was alone. Silence counts only if it was alone in a probe, with no other delivery in flight. An *outage* never
    /// counts. But a probe defers an event that alone meets an outage twice, if the receiver took others in between.
    /// Otherwise the event would keep the route down.
    async fn deliver(
        &mut self,
        lease: &mut Lease,
        verdicts: &mut [Verdict],
        mut probe: Option<&mut Probe<'_>>,
    ) -> bool {
        let mut batches = lease.batches();
        batches.reverse();
        let mut completed = true;
        // `accepted` counts the batches that the receiver took. `outages` maps each event that alone met an outage to
        // that count at the time.
        let (mut accepted, mut outages, mut outages_in_a_row) = (0, HashMap::new(), 0);
        while let Some(batch) = batches.pop() {
            // Deliveries one by one may take longer than the lease. That must not look like silence of the receiver.
            if probe.is_none() && Instant::now() > lease.split_before() {
                return false;
            }
            let (mut alone, mut deadline) = (false, lease.deliver_before());
            if let Some(probe) = probe.as_deref_mut() {
                if !self.is_ready(probe, lease).await {
                    return false;
                }
                alone = probe.is_alone();
                deadline = if batch.len() > 1 { lease.split_before() } else { lease.deliver_before() };
            }
            let Some(delivery) = self.call(lease, batch.clone(), deadline).await else { return false };
            if let Some(reason) = reason_to_split(&delivery, batch.len(), probe.is_some()) {
                warn!(worker = self.number, events = batch.len(), reason, "batch failed: delivering one by one");
                batches.extend(batch.rev().map(|row| row..row + 1));
                continue;
            }
            let Failed { failure, reason, retry_after } = match delivery {
                Delivery::Answered(answers) => {
                    for (row, answer) in batch.zip(answers) {
                        verdicts[row] = verdict(answer);
                    }
                    accepted += 1;
                    outages_in_a_row = 0;
                    continue;
                }
                Delivery::Failed(failed) => failed,
            };
            match failure {
                Failure::Refused | Failure::TooLarge | Failure::Unmatched => {
                    verdicts[batch.start] = Verdict::Retry { reason, after: retry_after };
                }
                Failure::Silent if alone => {
                    verdicts[batch.start] =
                        Verdict::Retry { reason: format!("NO_REPLY: {reason}"), after: Duration::ZERO };
                    completed = false;
                }
                Failure::Unreachable | Failure::Unavailable if probe.is_some() && batch.len() == 1 => {
                    completed = false;
                    outages_in_a_row += 1;
                    match outages.insert(batch.start, accepted) {
                        // So many in a row do not depend on single events. Released, they are leased after all others.
                        _ if outages_in_a_row == FIRST_BATCH => return false,
                        // Deliver it once more, after all others.
                        None => batches.insert(0, batch),
                        Some(before) if accepted > before => {
                            verdicts[batch.start] = Verdict::Defer { after: retry_after };
                        }
                        Some(_) => {}
                    }
                }
                Failure::Silent | Failure::Unreachable | Failure::Unavailable => {
                    verdicts[batch].fill(Verdict::Suspect);
                    return false;
                }
                Failure::Barred => return false,
            }
        }
        completed
    }

    /// One call of the receiver; `None` if it was cancelled.
    async fn call(&mut self, lease: &Lease, batch: Range<usize>, deadline: Instant) -> Option<Delivery> {
        let calling = self.receiver.deliver(&lease.rows[batch], deadline);
        let delivery = self.cancel_deliveries.run_until_cancelled(calling).await?;
        measure::delivered(self.route.pattern(), delivery.as_str());
        let Delivery::Failed(Failed { failure, reason, retry_after }) = &delivery else {
            self.route.answered();
            return Some(delivery);
        };
        match failure {
            Failure::Refused | Failure::TooLarge | Failure::Unmatched => self.route.answered(),
            Failure::Unreachable | Failure::Unavailable | Failure::Silent => {
                self.route.mark_down(reason, *retry_after);
            }
            Failure::Barred => self.route.bar(reason),
        }
        Some(delivery)
    }

    /// A settlement that fails does no harm: the lease expires, the events are delivered again, and the receiver
    /// answers DUPLICATE for those it has applied.
    async fn settle(&self, lease: Lease, verdicts: &[Verdict]) {
        let policy = Policy::of(&self.settings);
        let (events, oldest) = (lease.rows.len(), lease.oldest);
        let settled = settle(&self.database, lease, verdicts, policy, &self.shutdown).await;
        self.lease_query.floor.lower(oldest);
        measure::settled(self.route.pattern(), &settled);
        debug!(worker = self.number, events, handled = settled.handled, ?settled, "settled");
        if settled.lost > 0 {
            warn!(worker = self.number, events = settled.lost, "lease lost: another relay has these events");
        }
        if settled.unsettled > 0 {
            error!(
                worker = self.number,
                events = settled.unsettled,
                "events may not be settled: their lease will expire"
            );
        }
        if settled.died > 0 {
            error!(worker = self.number, events = settled.died, "events are dead: kept in the outbox with the reason");
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

fn verdict(answer: Answer) -> Verdict {
    match answer {
        Answer::Taken => Verdict::Handled,
        Answer::Rejected(reason) => Verdict::Dead(reason),
        Answer::Retry(reason) => Verdict::Retry { reason, after: Duration::ZERO },
    }
}

/// The reason to deliver the events of a failed batch one by one; `None` not to. A larger batch that met an outage in a
/// probe is not split, since the receiver may be overloaded. The next probe begins with a small batch of the same
/// events.
fn reason_to_split(delivery: &Delivery, events: usize, in_probe: bool) -> Option<&str> {
    let Delivery::Failed(Failed { failure, reason, .. }) = delivery else { return None };
    let splits = match failure {
        Failure::Refused | Failure::TooLarge | Failure::Unmatched => true,
        Failure::Silent => in_probe,
        Failure::Unreachable | Failure::Unavailable => in_probe && events <= FIRST_BATCH as usize,
        Failure::Barred => false,
    };
    (splits && events > 1).then_some(reason)
}
