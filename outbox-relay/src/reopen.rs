//! Probes a route that is not open. A probe asks the receiver whether it is up and remembers long enough. Then it
//! raises the load step by step, and opens the route.

use std::time::Duration;

use chassis::RunError;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::error;

use crate::{
    deliver::Description,
    isolate::FIRST_BATCH,
    lease::Lease,
    relay::{BatchOutcome, Completed, Round, Worker},
    route::{Condition, Probe},
};

/// The shortest retention of a receiver.
const RETENTION_LEAST: Duration = Duration::from_hours(1);

impl Worker {
    /// Delivers alone until the receiver has taken a full batch, or all free events. Then it opens the route for all
    /// workers.
    ///
    /// # Errors
    /// When the relay may not deliver to this receiver at all.
    pub(crate) async fn reopen(&mut self, mut probe: Probe<'_>) -> Result<Round, RunError> {
        let shutdown = self.shutdown.clone();
        match shutdown.run_until_cancelled(self.until_described(&mut probe)).await {
            None => return Ok(Round::Idle),
            Some(described) => described?,
        }
        if probe.is_first() {
            probe.open();
            return Ok(Round::Worked);
        }
        let mut limit = FIRST_BATCH.min(self.settings.batch);
        loop {
            let allowed = match self.route.pace().take(limit, Instant::now()) {
                Ok(allowed) => allowed,
                Err(wait) if shutdown.run_until_cancelled(sleep(wait)).await.is_some() => continue,
                Err(_) => return Ok(Round::Idle),
            };
            let outcome = self.process_batch(allowed, Some(&mut probe)).await;
            self.route.pace().give_back(allowed - outcome.leased(allowed));
            let (events, all) = match outcome {
                BatchOutcome::LeaseFailed => return Ok(Round::Failed),
                BatchOutcome::Interrupted => return Ok(Round::Worked),
                BatchOutcome::Completed(_) if self.shutdown.is_cancelled() => return Ok(Round::Idle),
                BatchOutcome::Completed(Completed { events, is_full, .. }) => (events, !is_full),
            };
            if all && !probe.is_alone() {
                // Deliveries from before are still in flight, and are likely to release their events. Those are free
                // then.
                self.wake.wait(self.poll()).await;
                probe.described = false;
            } else if all || limit == self.settings.batch {
                probe.open();
                self.wake.wake_any();
                return Ok(if events == 0 { Round::Idle } else { Round::Worked });
            } else {
                limit = limit.saturating_mul(2).min(self.settings.batch);
            }
        }
    }

    /// Waits until the receiver is up, and makes sure that enough of the lease is left to judge an event. If the
    /// receiver hangs over an event, only time can show it.
    ///
    /// The lease is renewed while it waits, within limits. If it released the events instead, all that is known about
    /// them would be lost. And if a receiver takes longer to start than a lease lasts, the event that crashes it would
    /// never be found.
    pub(crate) async fn is_ready(&mut self, probe: &mut Probe<'_>, lease: &mut Lease) -> bool {
        let shutdown = self.shutdown.clone();
        loop {
            let waiting = timeout_at(lease.deliver_before(), self.until_described(probe));
            match shutdown.run_until_cancelled(waiting).await {
                Some(Ok(Ok(()))) => break,
                // From a receiver that bars this relay, it can learn nothing about these events.
                Some(Err(_elapsed)) if self.route.condition() == Condition::Barred || lease.is_overlong() => {
                    return false;
                }
                Some(Err(_elapsed)) if self.renew(lease).await => {}
                // If the receiver is unfit, the next probe finds that again, with nothing leased.
                None | Some(_) => return false,
            }
        }
        // One answer to Describe is good for one delivery.
        probe.described = false;
        !lease.has_little_left() || self.renew(lease).await
    }

    pub(crate) async fn renew(&self, lease: &mut Lease) -> bool {
        lease.renew(&self.database).await.unwrap_or_else(|cause| {
            error!(%cause, "cannot renew a lease");
            false
        })
    }

    /// Waits until the receiver has answered Describe since the last delivery. The answer shows that the receiver is
    /// up, without an event that might be at fault.
    async fn until_described(&mut self, probe: &mut Probe<'_>) -> Result<(), RunError> {
        while !probe.described {
            probe.back_off().await;
            probe.described = self.describe().await?;
            probe.is_up = probe.described;
        }
        Ok(())
    }

    /// Whether the receiver answers Describe now. If it does not, the route is closed.
    pub(crate) async fn describes(&mut self) -> bool {
        // If the receiver is unfit, the next probe finds that again, with nothing leased.
        self.describe().await.unwrap_or(false)
    }

    async fn describe(&mut self) -> Result<bool, RunError> {
        match self.receiver.describe().await {
            Description::Ready { retention, types, sources, ordered } => {
                let fits = self.check_source(&sources)? && self.check_retention(retention)?;
                // What an unfit receiver says counts for nothing. Another worker may be about to lease.
                if fits {
                    self.route.set_types(types);
                    self.route.set_ordered(ordered);
                    self.route.set_retention(retention);
                }
                return Ok(fits);
            }
            Description::Unknown(fault) => self.refuse_receiver(fault)?,
            Description::Unavailable { reason, retry_after } => self.route.mark_down(&reason, retry_after),
            Description::Barred { reason } => self.route.bar(&reason),
        }
        Ok(false)
    }

    fn check_source(&self, accepted: &[String]) -> Result<bool, RunError> {
        let source = &self.settings.source;
        if accepted.is_empty() || accepted.contains(source) {
            return Ok(true);
        }
        self.refuse_receiver(&format!(
            "accepts events of {} only, and this relay delivers those of {source}: correct --source (RELAY_SOURCE), or add \
             {source} to the receiver's --accept-sources (ACCEPT_SOURCES)",
            accepted.join(", ")
        ))?;
        Ok(false)
    }

    /// A receiver that forgets soon would leave hardly any time for an outage, before all events are too old for it.
    fn check_retention(&self, retention: Duration) -> Result<bool, RunError> {
        if retention >= RETENTION_LEAST {
            return Ok(true);
        }
        self.refuse_receiver(&format!(
            "remembers applied events for {} min only: make its Describe answer at least an hour",
            retention.as_secs() / 60
        ))?;
        Ok(false)
    }

    /// The relay may not deliver to this receiver. If this route was never open, the relay ends with an error.
    /// Otherwise it bars this route, and goes on with the others.
    fn refuse_receiver(&self, fault: &str) -> Result<(), RunError> {
        let route = self.route.settings();
        if !self.route.was_open() {
            let (name, receiver) = (&route.subscription, &route.receiver);
            return Err(RunError::Unusable(format!("route {name}: the receiver at {receiver} {fault}")));
        }
        self.route.bar(&format!("the receiver {fault}"));
        Ok(())
    }
}
