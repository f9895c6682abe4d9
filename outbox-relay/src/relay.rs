//! The loop: lease, deliver, settle.

use std::{collections::HashMap, ops::Range, time::Duration};

use chassis::{Database, RunError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::{
    Settings,
    deliver::{Delivery, Receiver, Verdict},
    floor::RESCAN_INTERVAL,
    lease::{Lease, Terms, lease},
    measure,
    reopen::FIRST_BATCH,
    route::{Admission, Route, Turn},
    settle::{Policy, settle},
    wake::Wake,
};

/// One of a route's workers. Any number of them, in any number of processes, share an outbox: what keeps them apart is
/// the lease, not any knowledge of each other.
pub(crate) struct Worker {
    pub(crate) number: u32,
    pub(crate) database: Database,
    pub(crate) receiver: Receiver,
    pub(crate) settings: Settings,
    pub(crate) route: Route,
    pub(crate) terms: Terms,
    pub(crate) wake: Wake,
    /// Lease nothing more.
    pub(crate) shutdown: CancellationToken,
    /// Wait for no reply any longer.
    pub(crate) hurry: CancellationToken,
}

/// How a round of the loop has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// Events were leased. What they held back may be free now, so the next round follows at once.
    Worked,
    /// There was nothing to lease, or what may be left is for those who watch.
    Idle,
    /// The database did not answer.
    Failed,
}

/// How far a batch was carried.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Carried {
    /// To its end: the outbox gave so many events, and the receiver is up.
    Through(usize),
    /// Not to its end: the receiver is away, or this process is about to end.
    Stopped,
    /// Nowhere: the database did not answer.
    NotLeased,
}

/// Workers of a route that notifications wake; the others are called when there is more than one can carry. Were a
/// notification to wake any that is idle, a steady stream of single events would be delivered in batches so small that the
/// processor is busy with their number (see ARCHITECTURE.md for how much that is).
const WATCHERS: u32 = 2;

/// Pause after the database failed, so that it is not besieged; workers do not fail in step.
const DATABASE_PAUSE_MAX: Duration = Duration::from_secs(1);

impl Worker {
    /// Works until shutdown, or until the receiver turns out to be one that nothing may be delivered to.
    pub(crate) async fn run(mut self) -> Result<(), RunError> {
        while !self.shutdown.is_cancelled() {
            match self.round().await? {
                Round::Worked => {}
                Round::Idle if self.watches() => self.wake.wait(self.poll()).await,
                Round::Idle => self.wake.wait_for_call(self.poll()).await,
                Round::Failed => self.pause().await,
            }
        }
        Ok(())
    }

    fn watches(&self) -> bool {
        self.number <= WATCHERS
    }

    async fn round(&mut self) -> Result<Round, RunError> {
        let route = self.route.clone();
        match self.shutdown.run_until_cancelled(route.admit()).await {
            None => Ok(Round::Idle),
            Some(Admission::Turn(turn)) => self.reopen(turn).await,
            Some(Admission::Open { .. }) => Ok(match self.carry(self.settings.batch, None).await {
                Carried::Through(0) => Round::Idle,
                Carried::Through(events) if events < self.settings.batch as usize && !self.watches() => {
                    self.wake.look_again();
                    Round::Idle
                }
                Carried::Through(_) | Carried::Stopped => Round::Worked,
                Carried::NotLeased => Round::Failed,
            }),
        }
    }

    /// Leases a batch, delivers it, settles it; in a turn, as the only worker that does.
    pub(crate) async fn carry(&mut self, asked: u32, turn: Option<&mut Turn<'_>>) -> Carried {
        let mut lease = match lease(&self.database, &self.terms, asked).await {
            Ok(Some(lease)) => lease,
            Ok(None) => return Carried::Through(0),
            Err(cause) => {
                error!(%cause, "cannot lease");
                return Carried::NotLeased;
            }
        };
        let events = lease.rows.len();
        if turn.is_none() && events == asked as usize {
            self.wake.call_another();
        }
        let mut verdicts = self.verdicts_of_age(&lease);
        let through = self.deliver(&mut lease, &mut verdicts, turn).await;
        self.settle(lease, &verdicts).await;
        if through { Carried::Through(events) } else { Carried::Stopped }
    }

    /// What is known before anything is delivered: what is too old dies, undelivered, since the receiver may have
    /// forgotten that it has applied it long ago.
    fn verdicts_of_age(&self, lease: &Lease) -> Vec<Verdict> {
        let hours = self.settings.max_age.max_age_hours;
        let too_old = || Verdict::Dead(format!("EXPIRED: older than {hours} h, the most for an event to be delivered"));
        lease.rows.iter().map(|row| if row.expired { too_old() } else { Verdict::Release }).collect()
    }

    /// Delivers the lease's batches and writes what became of each event into `verdicts`. Returns whether it got to the
    /// end; what it did not get to is as it was.
    ///
    /// A batch that fails whole, though the receiver is up, may fail for one of its events, so its events are then
    /// delivered each alone. If it was *refused*, the receiver is up, and that is done at once. If there was *silence*,
    /// the receiver may have crashed, and with it every delivery under way: then only a worker in its turn does it, which
    /// waits before each delivery until the receiver is up. An event is charged with what happened to it alone: with a
    /// refusal always, with silence only in a turn, when nobody else's event can have been the cause. An *outage* is
    /// charged to nobody; but an event that meets one before and after others were taken is put off, in a turn: it would
    /// keep the route shut.
    async fn deliver(&mut self, lease: &mut Lease, verdicts: &mut [Verdict], mut turn: Option<&mut Turn<'_>>) -> bool {
        let mut batches = lease.batches();
        batches.reverse();
        let mut through = true;
        // Batches the receiver took, and of each event that alone met an outage, how many those were at that time; and
        // outages in a row.
        let (mut taken, mut outages, mut in_a_row) = (0, HashMap::new(), 0);
        while let Some(batch) = batches.pop() {
            // Those that are delivered one by one may be too many for one lease: that is no silence of the receiver's.
            if turn.is_none() && Instant::now() > lease.split_before() {
                return false;
            }
            let (mut alone, mut deadline) = (false, lease.deliver_before());
            if let Some(turn) = turn.as_deref_mut() {
                if !self.is_ready(turn, lease).await {
                    return false;
                }
                alone = turn.is_alone();
                deadline = if batch.len() > 1 { lease.split_before() } else { lease.deliver_before() };
            }
            let Some(delivery) = self.call(lease, batch.clone(), deadline).await else { return false };
            if let Some(reason) = why_split(&delivery, batch.len(), turn.is_some()) {
                warn!(worker = self.number, events = batch.len(), reason, "batch failed: delivering one by one");
                batches.extend(batch.rev().map(|row| row..row + 1));
                continue;
            }
            match delivery {
                Delivery::Answered(answers) => {
                    verdicts[batch].clone_from_slice(&answers);
                    taken += 1;
                    in_a_row = 0;
                }
                Delivery::Refused { reason, retry_after } => {
                    verdicts[batch.start] = Verdict::Retry { reason, after: retry_after };
                }
                Delivery::Silent { reason } if alone => {
                    verdicts[batch.start] =
                        Verdict::Retry { reason: format!("NO_REPLY: {reason}"), after: Duration::ZERO };
                    through = false;
                }
                Delivery::Outage { retry_after, .. } if turn.is_some() && batch.len() == 1 => {
                    through = false;
                    in_a_row += 1;
                    match outages.insert(batch.start, taken) {
                        // So many are no matter of single events. They go to the end of the line, and others get a turn.
                        _ if in_a_row == FIRST_BATCH => return false,
                        // Once more, after all others.
                        None => batches.insert(0, batch),
                        Some(before) if taken > before => {
                            verdicts[batch.start] = Verdict::PutOff { after: retry_after };
                        }
                        Some(_) => {}
                    }
                }
                Delivery::Silent { .. } | Delivery::Outage { .. } => {
                    verdicts[batch].fill(Verdict::Suspect);
                    return false;
                }
                Delivery::Barred { .. } => return false,
            }
        }
        through
    }

    /// One call of the receiver; `None` when its reply is not to be waited for any longer.
    async fn call(&mut self, lease: &Lease, batch: Range<usize>, deadline: Instant) -> Option<Delivery> {
        let calling = self.receiver.deliver(&lease.rows[batch], deadline);
        let delivery = self.hurry.run_until_cancelled(calling).await?;
        measure::delivered(self.route.pattern(), delivery.as_str());
        match &delivery {
            Delivery::Answered(_) | Delivery::Refused { .. } => self.route.answered(),
            Delivery::Outage { reason, retry_after } => self.route.fail(reason, *retry_after),
            Delivery::Silent { reason } => self.route.fail(reason, Duration::ZERO),
            Delivery::Barred { reason } => self.route.bar(reason),
        }
        Some(delivery)
    }

    /// A settlement that fails changes nothing that matters: the lease expires, the events are delivered again, and the
    /// receiver drops those it has had.
    async fn settle(&self, lease: Lease, verdicts: &[Verdict]) {
        let policy = Policy::of(&self.settings);
        let (events, oldest) = (lease.rows.len(), lease.oldest);
        let settled = settle(&self.database, lease, verdicts, policy, &self.shutdown).await;
        self.terms.floor.lower(oldest);
        measure::settled(self.route.pattern(), &settled);
        debug!(worker = self.number, events, handled = settled.handled, ?settled, "settled");
        if settled.lost > 0 {
            warn!(worker = self.number, events = settled.lost, "lease lost: another relay has these events");
        }
        if settled.unsettled > 0 {
            error!(worker = self.number, events = settled.unsettled, "not known to be settled; the lease will expire");
        }
        if settled.died > 0 {
            error!(worker = self.number, events = settled.died, "dead: kept in the outbox with their reason");
        }
    }

    /// How long to wait for a notification at most. The first look after one is as a rule above the floor only, and what it
    /// was about may lie below: then the next look comes as soon as one is to go everywhere.
    pub(crate) fn poll(&self) -> Duration {
        let poll = Duration::from_millis(self.settings.poll_ms);
        if self.terms.floor.may_hide_something() { poll.min(RESCAN_INTERVAL) } else { poll }
    }

    async fn pause(&self) {
        let pause = DATABASE_PAUSE_MAX.mul_f64(fastrand::f64());
        self.shutdown.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
}

/// Why the events of a batch that failed are to be delivered one by one, if they are. A larger batch that met an outage in a
/// turn is not: the receiver may be overloaded, and the next turn begins small, with the same events.
fn why_split(delivery: &Delivery, events: usize, in_turn: bool) -> Option<&str> {
    match delivery {
        Delivery::Refused { reason, .. } if events > 1 => Some(reason),
        Delivery::Silent { reason } if events > 1 && in_turn => Some(reason),
        Delivery::Outage { reason, .. } if events > 1 && events <= FIRST_BATCH as usize && in_turn => Some(reason),
        _ => None,
    }
}
