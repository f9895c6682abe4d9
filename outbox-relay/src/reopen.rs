//! Opens a route: asks its receiver whether it is up and remembers long enough, and brings its load back step by step.

use std::time::Duration;

use chassis::RunError;
use tokio::time::timeout_at;
use tracing::error;

use crate::{
    deliver::Description,
    lease::Lease,
    relay::{Carried, Round, Worker},
    route::{Condition, Turn},
};

/// Events in the first batch for a receiver that was away: few, since they are likely to come back. Each further batch is
/// twice as large. The others wait meanwhile: a receiver that has just started is not met by all of the backlog at once,
/// and if there is an event it does not survive, that is found here.
pub(crate) const FIRST_BATCH: u32 = 8;

impl Worker {
    /// Works alone until the receiver has taken a full batch, or all there is; then opens the route for all.
    ///
    /// # Errors
    /// When nothing may be delivered to this receiver at all.
    pub(crate) async fn reopen(&mut self, mut turn: Turn<'_>) -> Result<Round, RunError> {
        let shutdown = self.shutdown.clone();
        match shutdown.run_until_cancelled(self.until_described(&mut turn)).await {
            None => return Ok(Round::Idle),
            Some(described) => described?,
        }
        if turn.is_first() {
            turn.open();
            return Ok(Round::Worked);
        }
        let mut asked = FIRST_BATCH.min(self.settings.batch);
        loop {
            let events = match self.carry(asked, Some(&mut turn)).await {
                Carried::NotLeased => return Ok(Round::Failed),
                Carried::Stopped => return Ok(Round::Worked),
                Carried::Through(_) if self.shutdown.is_cancelled() => return Ok(Round::Idle),
                Carried::Through(events) => events,
            };
            let all = events < asked as usize;
            if all && !turn.is_alone() {
                // What others took while the route was open is likely to be given back: this is not all there is.
                self.wake.wait(self.poll()).await;
                turn.described = false;
            } else if all || asked == self.settings.batch {
                turn.open();
                self.wake.call_another();
                return Ok(if events == 0 { Round::Idle } else { Round::Worked });
            } else {
                asked = asked.saturating_mul(2).min(self.settings.batch);
            }
        }
    }

    /// Waits until the receiver is up, and sees to it that what is left of the lease is enough to judge an event by: one
    /// over which the receiver hangs is known by nothing but its time.
    ///
    /// The lease is renewed meanwhile, within limits. Given back, its events would come again as if nothing were known of
    /// them; and where a receiver takes longer to start than a lease lasts, the one that crashes it would never be found.
    pub(crate) async fn is_ready(&mut self, turn: &mut Turn<'_>, lease: &mut Lease) -> bool {
        let shutdown = self.shutdown.clone();
        loop {
            let waiting = timeout_at(lease.deliver_before(), self.until_described(turn));
            match shutdown.run_until_cancelled(waiting).await {
                Some(Ok(Ok(()))) => break,
                // From one that does not let it deliver, this relay has nothing to learn of these events.
                Some(Err(_elapsed)) if self.route.condition() == Condition::Barred || lease.is_overlong() => {
                    return false;
                }
                Some(Err(_elapsed)) if self.renew(lease).await => {}
                // A receiver that is unfit is found to be so again, with nothing leased, by the next turn.
                None | Some(_) => return false,
            }
        }
        // Good for one delivery.
        turn.described = false;
        !lease.is_worn() || self.renew(lease).await
    }

    async fn renew(&self, lease: &mut Lease) -> bool {
        lease.renew(&self.database).await.unwrap_or_else(|cause| {
            error!(%cause, "cannot renew a lease");
            false
        })
    }

    /// Waits until the receiver has described itself since the last delivery. An answer is all that is asked of it: it
    /// tells a receiver that is up from one that is away, without an event that might be at fault.
    async fn until_described(&mut self, turn: &mut Turn<'_>) -> Result<(), RunError> {
        while !turn.described {
            turn.pause().await;
            match self.receiver.describe().await {
                Description::Retention(retention) => {
                    turn.described = self.check_retention(retention)?;
                }
                Description::Unknown(fault) => self.refuse_receiver(fault)?,
                Description::Away { reason, retry_after } => self.route.fail(&reason, retry_after),
                Description::Barred { reason } => self.route.bar(&reason),
            }
        }
        Ok(())
    }

    fn check_retention(&self, retention: Duration) -> Result<bool, RunError> {
        let hours = self.settings.max_age.max_age_hours;
        if retention > Duration::from_secs(u64::from(hours) * 3600) {
            return Ok(true);
        }
        self.refuse_receiver(&format!(
            "remembers for {} h what it has applied, and this relay delivers events up to {hours} h old, which would be \
             applied twice: lengthen the receiver's retention, or shorten --max-age-hours (RELAY_MAX_AGE_HOURS)",
            retention.as_secs_f64() / 3600.0
        ))?;
        Ok(false)
    }

    /// Nothing may be delivered to this receiver. A relay that has not begun to does not; one that has serves its other
    /// routes on, and bars this one.
    fn refuse_receiver(&self, fault: &str) -> Result<(), RunError> {
        let route = self.route.settings();
        if !self.route.was_open() {
            let (pattern, receiver) = (&route.pattern, &route.receiver);
            return Err(RunError::Unusable(format!("route {pattern}: the receiver at {receiver} {fault}")));
        }
        self.route.bar(&format!("the receiver {fault}"));
        Ok(())
    }
}
