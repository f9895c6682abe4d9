//! Shows that this relay lives, and frees the rows of relays that died.
//!
//! A relay that is killed leaves leased rows, which would stay hidden until their leases expire. So each relay holds an
//! advisory lock, in a session of its own. The lock ends with the session, and the session with the process. Whoever
//! finds the lock of a relay free makes the rows visible that it had leased.
//!
//! The lock may be free though the relay lives: its session broke, or the database was restarted. Then its rows are
//! leased and delivered once more. That is as if its lease had expired early, which is always safe. Its settlement
//! names a token that the rows no longer have, and the inbox of the receiver knows the events that were applied.
//!
//! A relay without such a lock, of an older version or behind a pooler that never ends its session, is never taken for
//! dead. Its leases expire.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chassis::Database;
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::lease::LeaseToken;

/// How long connecting, or an answer, may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Time between two signs of life of the session, and before a new connection.
const INTERVAL: Duration = Duration::from_secs(1);

/// This relay, and whether it holds its lock. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct RelayId {
    id: Uuid,
    holds_lock: Arc<AtomicBool>,
}

impl RelayId {
    pub(crate) fn new() -> Self {
        Self { id: Uuid::new_v4(), holds_lock: Arc::default() }
    }

    pub(crate) fn uuid(&self) -> Uuid {
        self.id
    }

    /// Whether it holds its lock, as far as it knows.
    pub(crate) fn holds_lock(&self) -> bool {
        self.holds_lock.load(Ordering::Relaxed)
    }

    /// A token for a new lease. It begins like the id of the relay, so that the relay's rows can be found by it.
    pub(crate) fn lease_token(&self) -> LeaseToken {
        token(self.id, fastrand::u64(..))
    }
}

/// The first half is the relay's. The second is the lease's.
fn token(relay_id: Uuid, lease: u64) -> LeaseToken {
    let (relay, _) = relay_id.as_u64_pair();
    Uuid::from_u64_pair(relay, lease).into()
}

/// The key of a relay's lock. Other locks of the database have other keys: half an id is random enough for that.
fn key(relay_id: Uuid) -> i64 {
    relay_id.as_u64_pair().0.cast_signed()
}

/// Holds the lock until `shutdown`, in a new session whenever one has ended.
pub(crate) async fn hold_lock(relay: RelayId, database: PgConnectOptions, shutdown: CancellationToken) {
    while !shutdown.is_cancelled() {
        let ended = shutdown.run_until_cancelled(hold_once(&relay, &database)).await;
        relay.holds_lock.store(false, Ordering::Relaxed);
        if let Some(Err(cause)) = ended {
            warn!(%cause, "no session shows that this relay lives: if it dies, its leases must expire");
        }
        shutdown.run_until_cancelled(sleep(INTERVAL)).await;
    }
}

/// Returns when the session has ended, or does not answer: then others may find the lock free.
async fn hold_once(relay: &RelayId, database: &PgConnectOptions) -> Result<(), sqlx::Error> {
    let mut session = answered(database.connect()).await?;
    answered(lock(&mut session, key(relay.id))).await?;
    relay.holds_lock.store(true, Ordering::Relaxed);
    loop {
        sleep(INTERVAL).await;
        answered(session.ping()).await?;
    }
}

async fn answered<T>(answer: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    timeout(ANSWER_LIMIT, answer).await.unwrap_or_else(|_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())))
}

async fn lock(session: &mut PgConnection, key: i64) -> Result<(), sqlx::Error> {
    sqlx::query!("-- relay: show that it lives\nSELECT pg_advisory_lock($1)", key).execute(session).await?;
    Ok(())
}

/// Makes the rows visible that dead relays had leased, and forgets these relays.
///
/// # Errors
/// Those of the database.
pub(crate) async fn free_rows_of_the_dead(database: &Database, relay: &RelayId) -> Result<(), sqlx::Error> {
    let own = relay.id;
    for other in database.run(move |connection| Box::pin(find_others(connection, own))).await? {
        let freed = database.run(move |connection| Box::pin(free_if_dead(connection, other))).await?;
        match freed {
            None => {}
            Some(0) => debug!(relay = %other, "a relay died with nothing leased"),
            Some(rows) => warn!(relay = %other, rows, "a relay died: its leased events are delivered at once"),
        }
    }
    Ok(())
}

async fn find_others(connection: &mut PgConnection, own: Uuid) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar!(
        "-- relay: find other relays
        SELECT DISTINCT relay_id FROM outbox_routes WHERE holds_lock AND relay_id <> $1",
        own,
    )
    .fetch_all(connection)
    .await
}

/// Frees the rows of the relay if its lock is free, and returns how many. The lock is held meanwhile, so that no two
/// relays do this at once. A relay that comes back waits for it, and announces itself only then.
async fn free_if_dead(connection: &mut PgConnection, relay_id: Uuid) -> Result<Option<u64>, sqlx::Error> {
    let mut tx = connection.begin().await?;
    let is_dead = sqlx::query_scalar!(
        r#"-- relay: try the lock of another
        SELECT pg_try_advisory_xact_lock($1) AS "is_dead!""#,
        key(relay_id),
    )
    .fetch_one(&mut *tx)
    .await?;
    if !is_dead {
        tx.rollback().await?;
        return Ok(None);
    }
    let freed = sqlx::query!(
        "-- relay: free rows of the dead
        UPDATE outbox SET visible_at = now()
        WHERE visible_at > now() AND visible_at < 'infinity' AND lease_token BETWEEN $1 AND $2",
        token(relay_id, 0) as LeaseToken,
        token(relay_id, u64::MAX) as LeaseToken,
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "-- relay: forget the dead
        DELETE FROM outbox_routes WHERE relay_id = $1",
        relay_id
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Some(freed.rows_affected()))
}
