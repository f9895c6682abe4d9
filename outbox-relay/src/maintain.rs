//! Periodic maintenance, once per process.

use std::{collections::HashSet, sync::Arc, time::Duration};

use chassis::{Database, RunError};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::{
    announce::{announce, withdraw},
    failures::Failures,
    floor::Floor,
    lease::is_cut_off,
    live::{RelayId, free_rows_of_the_dead},
    operate::discard_ended,
    pace::{Shares, read_shares},
    park::{Leased, Swept, park},
    route::Route,
    subscription::{Subscription, Unrouted, adopt_unrouted, read_subscriptions},
    unhide::unhide,
};

const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(1);
/// Rare, since it reads all events without a subscription, and the rows of subscriptions that ended.
const UNROUTED_INTERVAL: Duration = Duration::from_secs(60);
/// Before the next piece of these.
const UNROUTED_PAUSE: Duration = Duration::from_millis(50);
/// Before parking is tried again after it took too long. Meanwhile the rest is done on time, and leases may be slower.
const PARK_PAUSE: Duration = Duration::from_secs(10);
/// Rare, since clocks are set right rarely.
const UNHIDE_INTERVAL: Duration = Duration::from_secs(60);

/// The maintenance of one process.
pub(crate) struct Maintenance {
    pub(crate) database: Database,
    pub(crate) relay: RelayId,
    pub(crate) served: Vec<Served>,
    pub(crate) poll: Duration,
    /// The longest time for which this relay hides a row.
    pub(crate) longest_hidden: Duration,
    pub(crate) failures: Failures,
    pub(crate) shutdown: CancellationToken,
    /// When this relay has read the paces last, by the database's clock.
    pub(crate) paces_read_at: Option<OffsetDateTime>,
}

/// A subscription with its route.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) route: Route,
    pub(crate) subscription: Subscription,
    pub(crate) floor: Arc<Floor>,
    /// Ends the workers of the route.
    pub(crate) end: CancellationToken,
}

impl Maintenance {
    /// Runs until shutdown. A task that fails is repeated when it is due again.
    ///
    /// # Errors
    /// When the last subscription of this relay has ended.
    pub(crate) async fn run(mut self) -> Result<(), RunError> {
        let shutdown = self.shutdown.clone();
        let ended = shutdown.run_until_cancelled(self.maintain()).await;
        self.report("withdraw from outbox_routes", withdraw(&self.database, self.relay.uuid(), None).await);
        ended.map_or(Ok(()), |subscription| {
            Err(RunError::Unusable(format!(
                "subscription {subscription} has ended (`outbox-relay unsubscribe`), and this relay has no other"
            )))
        })
    }

    /// Returns the name of the subscription that ended last, once all of this relay have.
    async fn maintain(&mut self) -> String {
        let (mut parking, mut announcing) = (every(self.poll), every(ANNOUNCE_INTERVAL));
        let (mut tidying, mut unhiding) = (every(UNROUTED_INTERVAL), every(UNHIDE_INTERVAL));
        let mut leased = Leased::default();
        // Workers wait for it.
        let kept = self.keep_paces().await;
        self.report("read the paces", kept);
        loop {
            tokio::select! {
                _ = parking.tick() => {
                    let parked = park(&self.database, &self.swept(), &mut leased).await;
                    if parked.as_ref().is_err_and(is_cut_off) {
                        parking.reset_after(PARK_PAUSE);
                    }
                    self.report("park successors", parked);
                }
                _ = announcing.tick() => {
                    let kept = self.keep_paces().await;
                    self.report("read the paces", kept);
                    let routes: Vec<_> = self.served.iter().map(|served| served.route.clone()).collect();
                    let announced = announce(&self.database, &self.relay, &routes, self.longest_hidden, self.paces_read_at).await;
                    self.report("announce routes", announced);
                    self.report("look for dead relays", free_rows_of_the_dead(&self.database, &self.relay).await);
                    let adopted = adopt_unrouted(&self.database, Unrouted::Newest).await;
                    self.report("look for events that a new subscription takes", adopted.map(drop));
                    if let Some(last) = self.end_routes().await {
                        return last;
                    }
                }
                _ = tidying.tick() => match self.tidy().await {
                    // The next piece comes after what is due meanwhile: this relay must report that it lives.
                    Ok(true) => tidying.reset_after(UNROUTED_PAUSE),
                    Ok(false) => {}
                    Err(cause) => self.report("look for events without a subscription", Err(cause)),
                },
                _ = unhiding.tick() => match unhide(&self.database, self.longest_hidden).await {
                    Ok(0) => {}
                    Ok(events) => {
                        warn!(
                            events,
                            "freed events that were hidden until far in the future: has the database's clock been set back?"
                        );
                        // There may be more.
                        unhiding.reset_immediately();
                    }
                    Err(cause) => self.report("free events that a wrong clock has hidden", Err(cause)),
                },
            }
        }
    }

    /// In an outage all of it fails, once a second or more often.
    fn report(&self, what: &str, outcome: Result<(), sqlx::Error>) {
        match outcome {
            Ok(()) => _ = self.failures.end(),
            Err(cause) if self.failures.count() => warn!(%cause, "cannot {what}"),
            Err(_) => {}
        }
    }

    /// Tells each route how fast it may deliver.
    async fn keep_paces(&mut self) -> Result<(), sqlx::Error> {
        let subscription_ids = self.served.iter().map(|served| served.subscription.id).collect();
        let Shares { per_second, read_at } = read_shares(&self.database, self.relay.uuid(), subscription_ids).await?;
        for (served, per_second) in self.served.iter().zip(per_second) {
            served.route.pace().set(per_second, Instant::now());
        }
        self.paces_read_at = Some(read_at);
        Ok(())
    }

    fn swept(&self) -> Swept {
        let swept = |served: &Served| Some((served.subscription.id, served.floor.sweeps_below()?));
        let (subscription_ids, below) = self.served.iter().filter_map(swept).unzip();
        Swept { subscription_ids, below }
    }

    /// Adopts events without a subscription, and discards those of subscriptions that ended. Returns whether there is more
    /// to do.
    async fn tidy(&self) -> Result<bool, sqlx::Error> {
        let more = adopt_unrouted(&self.database, Unrouted::All).await? | discard_ended(&self.database).await?;
        if !more {
            self.warn_of_unrouted().await?;
        }
        Ok(more)
    }

    /// Ends the routes whose subscriptions have ended. The others go on. Returns the name of the last one.
    async fn end_routes(&mut self) -> Option<String> {
        let there = match self.database.run(|connection| Box::pin(read_subscriptions(connection))).await {
            Ok(there) => there,
            Err(cause) => {
                self.report("read the subscriptions", Err(cause));
                return None;
            }
        };
        let there: HashSet<_> = there.into_iter().map(|subscription| subscription.id).collect();
        let (goes_on, ended): (Vec<_>, Vec<_>) =
            self.served.drain(..).partition(|served| there.contains(&served.subscription.id));
        self.served = goes_on;
        let mut last = None;
        for Served { route, subscription, end, .. } in ended {
            error!(
                subscription = subscription.name,
                "this subscription has ended (`outbox-relay unsubscribe`): take its route away before the next start"
            );
            end.cancel();
            route.end();
            let name = subscription.name;
            let withdrawn = withdraw(&self.database, self.relay.uuid(), Some(name.clone())).await;
            self.report("withdraw a route", withdrawn);
            last = Some(name);
        }
        last.filter(|_| self.served.is_empty())
    }

    /// Such an event stays until a subscription is made for it. This warning and the status are the only signs.
    async fn warn_of_unrouted(&self) -> Result<(), sqlx::Error> {
        for UnroutedType { event_type, events } in
            self.database.run(|connection| Box::pin(count_unrouted(connection))).await?
        {
            warn!(event_type, events, "no subscription takes these events: they stay in the outbox");
        }
        Ok(())
    }
}

fn every(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

struct UnroutedType {
    event_type: String,
    events: i64,
}

async fn count_unrouted(connection: &mut PgConnection) -> Result<Vec<UnroutedType>, sqlx::Error> {
    sqlx::query_as!(
        UnroutedType,
        r#"-- relay: count unrouted
        SELECT event_type AS "event_type!", count(*) AS "events!"
        FROM (
            SELECT event_type FROM outbox WHERE subscription_id = 0 AND sequence = 1
            UNION ALL
            SELECT event_type FROM outbox WHERE subscription_id = 0 AND sequence > 1) AS unrouted
        GROUP BY event_type
        ORDER BY 2 DESC
        LIMIT 10"#
    )
    .fetch_all(connection)
    .await
}
