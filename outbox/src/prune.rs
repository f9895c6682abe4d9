//! Forgets what was applied long ago.

use std::time::Duration;

use chassis::Database;
use sqlx::{Connection, PgConnection};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// An id is kept for so much longer than the retention says. An event's time is its sender's, of another database with
/// another clock: as long as the two differ by less than this, what is not too old to be accepted is still on record.
pub(crate) const CLOCK_MARGIN: Duration = Duration::from_secs(3600);
/// Ids forgotten in one statement: few milliseconds, so that no vacuum and no shutdown waits for it.
const BATCH: i64 = 1000;
const INTERVAL: Duration = Duration::from_secs(5);
/// Any number, as long as nothing else in the database uses it.
const LOCK: i64 = 0x6f75_7462_6f78;

/// Prunes the inbox, now and then, until `shutdown`.
pub(crate) async fn prune_until_shutdown(database: Database, retention: Duration, shutdown: CancellationToken) {
    let mut forgotten = 0;
    while !shutdown.is_cancelled() {
        match database.run(move |connection| Box::pin(prune(connection, retention))).await {
            Ok(0) => {}
            Ok(batch) => {
                forgotten += batch;
                continue;
            }
            Err(cause) => warn!(%cause, "inbox not pruned; it only grows meanwhile"),
        }
        if forgotten > 0 {
            info!(forgotten, "inbox pruned");
            forgotten = 0;
        }
        shutdown.run_until_cancelled(sleep(INTERVAL)).await;
    }
}

/// Forgets a batch of ids that are older than the retention by the database's clock, oldest first, and returns how many.
/// One pruner works at a time, whatever the number of processes: two would delete the same rows and wait for each other.
pub(crate) async fn prune(connection: &mut PgConnection, retention: Duration) -> Result<i64, sqlx::Error> {
    let mut tx = connection.begin().await?;
    let alone = sqlx::query_scalar!(
        r#"-- inbox: lock pruning
        SELECT pg_try_advisory_xact_lock($1) AS "alone!""#,
        LOCK,
    )
    .fetch_one(&mut *tx)
    .await?;
    if !alone {
        tx.rollback().await?;
        return Ok(0);
    }
    let forgotten = sqlx::query_scalar!(
        r#"-- inbox: prune
        WITH forgotten AS (
            DELETE FROM processed_messages
            WHERE ctid = ANY (ARRAY (
                SELECT ctid FROM processed_messages
                WHERE processed_at < now() - make_interval(secs => $1)
                ORDER BY processed_at LIMIT $2))
            RETURNING processed_at
        ), remembered AS (
            INSERT INTO inbox_pruned (until) SELECT max(processed_at) FROM forgotten HAVING count(*) > 0
            ON CONFLICT (singleton) DO UPDATE SET until = greatest(inbox_pruned.until, excluded.until)
        )
        SELECT count(*) AS "count!" FROM forgotten"#,
        (retention + CLOCK_MARGIN).as_secs_f64(),
        BATCH,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(forgotten)
}
