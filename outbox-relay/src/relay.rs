//! The loop: lease, deliver, settle.

use std::time::Duration;

use chassis::Database;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::{
    Settings,
    deliver::{Delivery, Receiver, Verdict},
    lease::{Lease, lease},
    route::Route,
    settle::{Policy, settle},
    wake::Wake,
};

/// One of the relay's workers. Any number of them, in any number of processes, share an outbox: what keeps them apart is
/// the lease, not any knowledge of each other.
pub(crate) struct Worker {
    pub(crate) number: u32,
    pub(crate) database: Database,
    pub(crate) receiver: Receiver,
    pub(crate) settings: Settings,
    pub(crate) route: Route,
    pub(crate) wake: Wake,
    /// Lease nothing more.
    pub(crate) shutdown: CancellationToken,
    /// Wait for no reply any longer.
    pub(crate) hurry: CancellationToken,
}

/// How a round of the loop has ended.
#[derive(Debug, PartialEq, Eq)]
enum Round {
    /// Events were leased. What they held back may be free now, so the next round follows at once.
    Worked,
    /// There was nothing to lease.
    Idle,
    /// The database did not answer.
    Failed,
}

/// Pause after the database failed, so that it is not besieged; workers do not fail in step.
const DATABASE_PAUSE_MAX: Duration = Duration::from_secs(1);

impl Worker {
    pub(crate) async fn run(mut self) {
        while !self.shutdown.is_cancelled() {
            match self.round().await {
                Round::Worked => {}
                Round::Idle => self.wake.wait().await,
                Round::Failed => self.pause().await,
            }
        }
    }

    /// Leases a batch, delivers it, settles it.
    async fn round(&mut self) -> Round {
        let route = self.route.clone();
        let Some(admission) = self.shutdown.run_until_cancelled(route.admit()).await else {
            return Round::Idle;
        };
        let asked = admission.batch(self.settings.batch);
        let lease = match lease(&self.database, asked, self.settings.lease_seconds).await {
            Ok(Some(lease)) => lease,
            Ok(None) => return Round::Idle,
            Err(cause) => {
                error!(%cause, "cannot lease");
                return Round::Failed;
            }
        };
        if lease.rows.len() == asked as usize {
            self.wake.wake_another();
        }
        let verdicts = self.deliver_or_split(&lease).await;
        self.settle(lease, &verdicts).await;
        Round::Worked
    }

    /// Delivers the batch. If the receiver refuses it whole, though it is up, one of the events may be why: each is then
    /// delivered alone, and only one that is refused alone is charged with it.
    async fn deliver_or_split(&mut self, lease: &Lease) -> Vec<Verdict> {
        match self.deliver(lease, 0..lease.rows.len()).await {
            Delivery::Answered(verdicts) => verdicts,
            Delivery::Unknown => vec![Verdict::Release; lease.rows.len()],
            Delivery::Refused(reason) if lease.rows.len() == 1 => vec![Verdict::Retry(reason)],
            Delivery::Refused(reason) => {
                warn!(worker = self.number, events = lease.rows.len(), reason, "batch refused: delivering one by one");
                self.deliver_singly(lease).await
            }
        }
    }

    async fn deliver_singly(&mut self, lease: &Lease) -> Vec<Verdict> {
        let mut verdicts = Vec::with_capacity(lease.rows.len());
        for row in 0..lease.rows.len() {
            match self.deliver(lease, row..row + 1).await {
                Delivery::Answered(mut verdict) => verdicts.append(&mut verdict),
                Delivery::Refused(reason) => verdicts.push(Verdict::Retry(reason)),
                Delivery::Unknown => break,
            }
        }
        verdicts.resize(lease.rows.len(), Verdict::Release);
        verdicts
    }

    async fn deliver(&mut self, lease: &Lease, rows: std::ops::Range<usize>) -> Delivery {
        let delivery = self
            .hurry
            .run_until_cancelled(self.receiver.deliver(&lease.rows[rows], lease.deliver_before))
            .await
            .unwrap_or(Delivery::Unknown);
        match delivery {
            Delivery::Unknown => self.route.failed(),
            Delivery::Answered(_) | Delivery::Refused(_) => self.route.reached(),
        }
        delivery
    }

    /// A settlement that fails changes nothing that matters: the lease expires, the events are delivered again, and the
    /// receiver drops those it has had.
    async fn settle(&self, lease: Lease, verdicts: &[Verdict]) {
        let policy = Policy::of(&self.settings);
        let events = lease.rows.len();
        match settle(&self.database, lease, verdicts, policy).await {
            Ok(settled) => {
                debug!(
                    worker = self.number,
                    events,
                    handled = settled.handled,
                    retried = settled.retried,
                    died = settled.died,
                    released = settled.released,
                    "settled"
                );
                if settled.lost > 0 {
                    warn!(worker = self.number, events = settled.lost, "lease lost: another relay has these events");
                }
                if settled.died > 0 {
                    error!(worker = self.number, events = settled.died, "dead: kept in the outbox with their reason");
                }
            }
            Err(cause) => error!(%cause, events, "cannot settle; the lease will expire"),
        }
    }

    async fn pause(&self) {
        let pause = DATABASE_PAUSE_MAX.mul_f64(fastrand::f64());
        self.shutdown.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
}
