//! Shows that this relay lives, and frees the rows of relays that died.
//!
//! A relay that is killed leaves leased rows, which would stay hidden until their leases expire. So each relay holds an
//! advisory lock, in a session of its own. The lock ends with the session, and the session with the process. A relay is
//! dead if its lock is free and it has not reported for some seconds. Whoever finds that makes the rows visible that it
//! had leased.
//!
//! It may be wrong: a relay that was cut off from the database, or stopped, may go on. Then its rows are leased and
//! delivered once more. That is as if its leases had expired early, which is always safe. Its settlement names a token
//! that the rows no longer have, and the inbox of the receiver knows the events that were applied.
//!
//! A relay that gets a new session frees rows of its own as well: those of leases that no worker has any more. A crash of
//! the database may have kept a lease and lost its settlement, since commits of relays do not wait for the disk or for a
//! standby. The same reasons make that safe.
//!
//! A relay without such a lock is never taken for dead, and its leases expire: one of an earlier version, or one whose
//! session is not its own because a pooler shares it. A machine that vanishes is noticed by the keepalives of its
//! session, within half a minute.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chassis::{Database, DatabaseUrl};
use sqlx::{Connection, PgConnection};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};
use uuid::Uuid;

use crate::{failures::Failures, leased_row::LeaseToken};

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A relay whose lock is free is taken for dead once it has not reported for this long. After a restart of the database
/// all locks are free for a moment.
pub(crate) const SILENT_AFTER: Duration = Duration::from_secs(2);
/// Time between two looks whether the lock is held, and before a new connection.
const INTERVAL: Duration = Duration::from_secs(1);
/// The server ends a session whose client has vanished after about 20 s.
const KEEPALIVE: [(&str, &str); 3] =
    [("tcp_keepalives_idle", "5"), ("tcp_keepalives_interval", "5"), ("tcp_keepalives_count", "3")];
/// Rows that one statement frees.
const ROWS_MAX: i64 = 10_000;

/// This relay, and whether it holds its lock. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct RelayId {
    id: Uuid,
    holds_lock: Arc<AtomicBool>,
    /// Of the leases that its workers have, or ask for.
    tokens: Arc<Mutex<Vec<LeaseToken>>>,
}

/// The token of a lease, which counts as the relay's until this is dropped.
#[derive(Debug)]
pub(crate) struct OwnToken {
    pub(crate) token: LeaseToken,
    relay: RelayId,
}

impl Drop for OwnToken {
    fn drop(&mut self) {
        self.relay.tokens().retain(|token| *token != self.token);
    }
}

impl RelayId {
    pub(crate) fn new() -> Self {
        Self { id: Uuid::new_v4(), holds_lock: Arc::default(), tokens: Arc::default() }
    }

    pub(crate) fn uuid(&self) -> Uuid {
        self.id
    }

    /// Whether it holds its lock, as far as it knows.
    pub(crate) fn holds_lock(&self) -> bool {
        self.holds_lock.load(Ordering::Relaxed)
    }

    /// A token for a new lease. It begins like the id of the relay, so that the relay's rows can be found by it.
    pub(crate) fn lease_token(&self) -> OwnToken {
        let token = token(self.id, fastrand::u64(..));
        self.tokens().push(token);
        OwnToken { token, relay: self.clone() }
    }

    fn tokens(&self) -> MutexGuard<'_, Vec<LeaseToken>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Holds the lock, in a new session whenever one has ended. It never returns. Drop it once the rows are settled: a relay
/// that drains still lives.
pub(crate) async fn hold_lock(relay: RelayId, own_session: DatabaseUrl, database: Database) {
    let own_session = KEEPALIVE.iter().fold(own_session, |url, (name, value)| url.with_setting(name, *value));
    let failures = Failures::default();
    let mut may_have_left_rows = false;
    loop {
        let ended = hold_once(&relay, &own_session, &failures, may_have_left_rows.then_some(&database)).await;
        may_have_left_rows |= relay.holds_lock();
        relay.holds_lock.store(false, Ordering::Relaxed);
        if let Err(cause) = ended
            && failures.count()
        {
            warn!(%cause, "no session shows that this relay lives: if it dies, its leases must expire");
        }
        sleep(INTERVAL).await;
    }
}

/// Returns when the session has ended, does not answer, or no longer has the lock.
///
/// Rows that are left are freed in `left_in`, not in this session. That may wait for a standby or take long, and the lock
/// would be lost with the session.
async fn hold_once(
    relay: &RelayId,
    own_session: &DatabaseUrl,
    failures: &Failures,
    mut left_in: Option<&Database>,
) -> Result<(), sqlx::Error> {
    let mut session = own_session.connect_in_time().await?;
    answered(lock(&mut session, key(relay.id))).await?;
    let not_freed = Failures::default();
    while answered(has_lock(&mut session, key(relay.id))).await? {
        relay.holds_lock.store(true, Ordering::Relaxed);
        failures.end();
        if let Some(database) = left_in {
            let freeing = relay.clone();
            match database.run(move |connection| Box::pin(free_left_rows(connection, freeing))).await {
                Ok(more) => left_in = left_in.filter(|_| more),
                Err(cause) if not_freed.count() => warn!(%cause, "cannot free rows that no worker has; trying again"),
                Err(_) => {}
            }
        }
        sleep(INTERVAL).await;
    }
    Err(sqlx::Error::InvalidArgument(
        "a pooler shares this session, or its server can only read: name the database itself in --listen-database-url"
            .into(),
    ))
}

async fn answered<T>(answer: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    timeout(ANSWER_LIMIT, answer).await.unwrap_or_else(|_| Err(chassis::timed_out()))
}

async fn lock(session: &mut PgConnection, key: i64) -> Result<(), sqlx::Error> {
    sqlx::query!("-- relay: show that it lives\nSELECT pg_advisory_lock($1)", key).execute(session).await?;
    Ok(())
}

/// Whether this very session holds the lock, at a server that can be written to. Behind a pooler, statements may run in
/// any session. After a failover the lock of the old server is worth nothing.
async fn has_lock(session: &mut PgConnection, key: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- relay: check that it holds its lock
        SELECT EXISTS (
            SELECT FROM pg_locks
            WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()
              AND current_setting('transaction_read_only') = 'off'
              AND classid::bigint << 32 | objid::bigint = $1) AS "held!""#,
        key,
    )
    .fetch_one(session)
    .await
}

/// Frees the relay's rows that no worker has leased. Returns whether there may be more.
///
/// A lease that a worker asks for meanwhile may be taken for one of them. Then its rows are delivered once more.
async fn free_left_rows(connection: &mut PgConnection, relay: RelayId) -> Result<bool, sqlx::Error> {
    let tokens = relay.tokens().clone();
    let rows = free_rows(connection, relay.id, &tokens).await?;
    if rows > 0 {
        warn!(rows, "no worker has these leased events, perhaps since a crash: they are delivered again at once");
        outbox::notify(connection, outbox::CHANNEL).await?;
    }
    Ok(rows == ROWS_MAX.unsigned_abs())
}

/// Makes the rows visible that dead relays had leased, and forgets these relays.
///
/// # Errors
/// Those of the database.
pub(crate) async fn free_rows_of_the_dead(database: &Database, relay: &RelayId) -> Result<(), sqlx::Error> {
    let own = relay.id;
    for other in database.run(move |connection| Box::pin(find_silent(connection, own))).await? {
        // One after the other: a relay whose rows cannot be freed now does not keep those of others waiting.
        match database.run(move |connection| Box::pin(free_if_dead(connection, other))).await {
            Ok(None) => {}
            Ok(Some(0)) => debug!(relay = %other, "a relay died with nothing leased"),
            Ok(Some(rows)) => warn!(relay = %other, rows, "a relay died: its leased events are delivered at once"),
            Err(cause) => warn!(relay = %other, %cause, "cannot free the rows of a relay that may be dead"),
        }
    }
    Ok(())
}

/// The relays that have a lock and have not reported for some seconds. Right after a restart of the database, the locks
/// of living relays are free too.
async fn find_silent(connection: &mut PgConnection, own: Uuid) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar!(
        "-- relay: find silent relays
        SELECT DISTINCT relay_id
        FROM outbox_routes
        WHERE holds_lock AND relay_id <> $1
          AND (seen_at < now() - make_interval(secs => $2) OR seen_at > now() + interval '1 minute')",
        own,
        SILENT_AFTER.as_secs_f64(),
    )
    .fetch_all(connection)
    .await
}

/// Frees the rows of the relay if its lock is free, and returns how many. The lock is held meanwhile, so that no two
/// relays do this at once. A relay that comes back waits for it.
///
/// A row that is locked is about to be settled, so it is left to that. If there are more rows than one statement frees,
/// the relay is not forgotten yet, and the rest comes with the next look.
async fn free_if_dead(connection: &mut PgConnection, relay_id: Uuid) -> Result<Option<u64>, sqlx::Error> {
    let mut tx = connection.begin().await?;
    if !is_dead(&mut tx, relay_id).await? {
        tx.rollback().await?;
        return Ok(None);
    }
    let freed = free_rows(&mut tx, relay_id, &[]).await?;
    if freed < ROWS_MAX.unsigned_abs() {
        sqlx::query!(
            "-- relay: forget the dead
            DELETE FROM outbox_routes WHERE relay_id = $1",
            relay_id
        )
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    if freed > 0 {
        outbox::notify(connection, outbox::CHANNEL).await?;
    }
    Ok(Some(freed))
}

/// Whether nobody holds the relay's lock. Then this transaction holds it, until its end.
///
/// # Errors
/// Those of the database.
pub(crate) async fn is_dead(tx: &mut PgConnection, relay_id: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- relay: try the lock of another
        SELECT pg_try_advisory_xact_lock($1) AS "is_dead!""#,
        key(relay_id),
    )
    .fetch_one(tx)
    .await
}

/// Frees the rows that the relay has leased under other tokens than these. Leases last for an hour at most, so rows that
/// are hidden for longer are none of them.
async fn free_rows(connection: &mut PgConnection, relay_id: Uuid, except: &[LeaseToken]) -> Result<u64, sqlx::Error> {
    let freed = sqlx::query!(
        "-- relay: free rows of a relay
        UPDATE outbox
        SET visible_at = now()
        WHERE ctid = ANY (ARRAY (
            SELECT leased.ctid
            FROM outbox AS leased
            WHERE leased.ctid = ANY (ARRAY (
                    SELECT hidden.row
                    FROM (SELECT 0 UNION ALL SELECT subscription_id FROM outbox_subscriptions) AS each (subscription)
                    CROSS JOIN LATERAL (
                        SELECT ctid
                        FROM outbox
                        WHERE subscription_id = each.subscription AND sequence = 1
                          AND visible_at > now() AND visible_at < now() + interval '61 minutes'
                          AND lease_token BETWEEN $1 AND $2
                        UNION ALL
                        SELECT ctid
                        FROM outbox
                        WHERE subscription_id = each.subscription AND sequence > 1
                          AND visible_at > now() AND visible_at < now() + interval '61 minutes'
                          AND lease_token BETWEEN $1 AND $2) AS hidden (row)))
              AND leased.lease_token BETWEEN $1 AND $2 AND leased.lease_token <> ALL ($4)
            LIMIT $3
            FOR UPDATE OF leased SKIP LOCKED))",
        token(relay_id, 0) as LeaseToken,
        token(relay_id, u64::MAX) as LeaseToken,
        ROWS_MAX,
        except as &[LeaseToken],
    )
    .execute(connection)
    .await?;
    Ok(freed.rows_affected())
}
