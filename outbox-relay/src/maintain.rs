//! Periodic maintenance, once per process.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    announce::{announce, withdraw},
    live::{RelayId, free_rows_of_the_dead},
    park::park,
    route::Route,
    unhide::unhide,
};

const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(1);
/// Rare, since the search for events without a route reads the whole outbox.
const UNROUTED_INTERVAL: Duration = Duration::from_secs(60);
/// Rare, since clocks are set right rarely.
const UNHIDE_INTERVAL: Duration = Duration::from_secs(60);

/// The maintenance of one process.
pub(crate) struct Maintenance {
    pub(crate) database: Database,
    pub(crate) relay: RelayId,
    pub(crate) routes: Vec<Route>,
    pub(crate) poll: Duration,
    /// The longest time for which this relay hides a row.
    pub(crate) longest_hidden: Duration,
    pub(crate) shutdown: CancellationToken,
}

impl Maintenance {
    /// Runs until shutdown. A task that fails is repeated when it is due again.
    pub(crate) async fn run(self) {
        self.shutdown.run_until_cancelled(self.maintain()).await;
        report("withdraw from outbox_routes", withdraw(&self.database, self.relay.uuid()).await);
    }

    async fn maintain(&self) {
        let (mut parking, mut announcing) = (every(self.poll), every(ANNOUNCE_INTERVAL));
        let (mut checking, mut unhiding) = (every(UNROUTED_INTERVAL), every(UNHIDE_INTERVAL));
        loop {
            tokio::select! {
                _ = parking.tick() => report("park successors", park(&self.database).await),
                _ = announcing.tick() => {
                    let announced = announce(&self.database, &self.relay, &self.routes, self.longest_hidden).await;
                    report("announce routes", announced);
                    report("look for dead relays", free_rows_of_the_dead(&self.database, &self.relay).await);
                }
                _ = checking.tick() => report("look for events without a route", self.warn_of_unrouted().await),
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
                    Err(cause) => report("free events that a wrong clock has hidden", Err(cause)),
                },
            }
        }
    }

    /// An event without a route stays in the outbox, and blocks the later events of its aggregate. Another relay may
    /// have a route for it. If none has, this warning is the only sign.
    async fn warn_of_unrouted(&self) -> Result<(), sqlx::Error> {
        let patterns: Vec<_> = self.routes.iter().map(|route| route.settings().like()).collect();
        let unrouted = self.database.run(move |connection| Box::pin(find_unrouted(connection, patterns))).await?;
        for Unrouted { event_type, events } in unrouted {
            warn!(event_type, events, "no route of this relay takes these events: they stay in the outbox");
        }
        Ok(())
    }
}

fn every(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn report(what: &str, outcome: Result<(), sqlx::Error>) {
    if let Err(cause) = outcome {
        warn!(%cause, "cannot {what}");
    }
}

struct Unrouted {
    event_type: String,
    events: i64,
}

async fn find_unrouted(connection: &mut PgConnection, patterns: Vec<String>) -> Result<Vec<Unrouted>, sqlx::Error> {
    sqlx::query_as!(
        Unrouted,
        r#"-- relay: find unrouted
        SELECT event_type, count(*) AS "events!"
        FROM outbox
        WHERE event_type NOT LIKE ALL ($1::text[])
        GROUP BY event_type
        ORDER BY 2 DESC
        LIMIT 10"#,
        &patterns,
    )
    .fetch_all(connection)
    .await
}
