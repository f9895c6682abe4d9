//! What has to be done now and then, once per process.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::{
    announce::{announce, withdraw},
    park::park,
    route::Route,
};

const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(1);
/// Looking for events that no route takes reads the whole outbox.
const STRAYS_INTERVAL: Duration = Duration::from_secs(60);

/// The maintenance of a process.
pub(crate) struct Maintenance {
    pub(crate) database: Database,
    pub(crate) routes: Vec<Route>,
    pub(crate) poll: Duration,
    pub(crate) shutdown: CancellationToken,
}

impl Maintenance {
    /// Maintains until shutdown. Whatever fails is done again at its next time.
    pub(crate) async fn run(self) {
        let relay_id = Uuid::new_v4();
        self.shutdown.run_until_cancelled(self.maintain(relay_id)).await;
        report("withdraw from outbox_routes", withdraw(&self.database, relay_id).await);
    }

    async fn maintain(&self, relay_id: Uuid) {
        let (mut parking, mut announcing) = (every(self.poll), every(ANNOUNCE_INTERVAL));
        let mut looking = every(STRAYS_INTERVAL);
        loop {
            tokio::select! {
                _ = parking.tick() => report("park successors", park(&self.database).await),
                _ = announcing.tick() => {
                    report("announce routes", announce(&self.database, relay_id, &self.routes).await);
                }
                _ = looking.tick() => report("look for strays", self.warn_of_strays().await),
            }
        }
    }

    /// An event that no route takes waits for one, and holds back its aggregate. It may be another relay's; if it is not,
    /// nobody else would say so.
    async fn warn_of_strays(&self) -> Result<(), sqlx::Error> {
        let patterns: Vec<_> = self.routes.iter().map(|route| route.settings().like()).collect();
        let strays = self.database.run(move |connection| Box::pin(find_strays(connection, patterns))).await?;
        for Stray { event_type, events } in strays {
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

struct Stray {
    event_type: String,
    events: i64,
}

async fn find_strays(connection: &mut PgConnection, patterns: Vec<String>) -> Result<Vec<Stray>, sqlx::Error> {
    sqlx::query_as!(
        Stray,
        r#"-- relay: find strays
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
