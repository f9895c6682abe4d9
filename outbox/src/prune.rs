//! Prunes the ids of events that were applied long ago.

use std::time::Duration;

use chassis::Database;
use sqlx::{Connection, PgConnection};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::inbox_clock::InboxClock;

/// Ids are kept for longer than the retention, by this margin. The time of an event comes from the clock of another
/// database. While the two clocks differ by less than the margin, an event that is young enough to be accepted is on
/// record.
pub(crate) const CLOCK_MARGIN: Duration = Duration::from_secs(3600);
/// Ids pruned by one statement. It is short, so that neither VACUUM nor a shutdown waits for it.
const BATCH: i64 = 1000;
const INTERVAL: Duration = Duration::from_secs(5);
/// Key of the advisory lock. Any number will do that nothing else in the database uses.
const LOCK: i64 = 0x6f75_7462_6f78;

/// Prunes the inbox at intervals, until `shutdown`.
pub(crate) async fn prune_until_shutdown(database: Database, retention: Duration, shutdown: CancellationToken) {
    let (mut pruned, mut clock) = (0, InboxClock::default());
    while !shutdown.is_cancelled() {
        match prune_once(&database, retention, &mut clock).await {
            Ok(0) => {}
            Ok(batch) => {
                pruned += batch;
                continue;
            }
            Err(cause) => warn!(%cause, "inbox not pruned; it grows until pruning works again"),
        }
        if pruned > 0 {
            info!(pruned, "inbox pruned");
            pruned = 0;
        }
        shutdown.run_until_cancelled(sleep(INTERVAL)).await;
    }
}

async fn prune_once(database: &Database, retention: Duration, clock: &mut InboxClock) -> Result<i64, sqlx::Error> {
    clock.move_if_due(database).await?;
    database.write(move |connection| Box::pin(prune(connection, retention))).await
}

/// Prunes a batch of ids that are older than the retention by the inbox's clock, oldest first. Returns how many.
///
/// One process prunes at a time. Two would delete the same rows, and wait for each other.
///
/// Before that it corrects a time of `inbox_pruned` that a wrong clock has left.
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
    correct(&mut tx, retention).await?;
    let pruned = sqlx::query_scalar!(
        r#"-- inbox: prune
        WITH forgotten AS (
            DELETE FROM processed_messages
            WHERE ctid = ANY (ARRAY (
                SELECT ctid FROM processed_messages
                WHERE processed_at < (SELECT least(clock, now()) FROM inbox_pruned) - make_interval(secs => $1)
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
    Ok(pruned)
}

/// Sets `until` back if it lies in the future. Such a time is the `processed_at` of an id that was recorded and pruned
/// while the clock ran ahead, before it was set right. [`accept`](crate::accept::accept) ignores it from the first
/// moment; here it is replaced, so that it does not count once its time has come.
///
/// A clock that is ahead by a constant time prunes ids at their true age, and only its times are wrong. So no event that
/// is younger than the retention was forgotten, and the right time is that of pruning by a right clock until now.
/// Ids from before the clock went ahead carry right times. If it was ahead for longer than a seventh of the retention,
/// ids of events that a relay may still have are pruned. `until` is then such a time, and not in the future. It stays, and
/// what the inbox may have forgotten is rejected as stale.
///
/// A server's clock that is set back for a moment, by more than the retention, has the same sign, and loses a right time.
/// Ids that were pruned then look young until the inbox's clock has returned. That is harmless since no relay delivers
/// events of that age.
///
/// One case remains: the clock jumps ahead twice, each time for so long that the inbox's clock follows. If the two leads
/// differ by more than the retention less a relay's maximum age, ids recorded in between are pruned while they are young.
/// Such an event is applied twice if a relay still has it. To exclude that, the inbox would have to reject every event
/// from before the correction, for good. That loses many events for certain, so it is not done. The operator's
/// documentation says what to check.
async fn correct(tx: &mut PgConnection, retention: Duration) -> Result<(), sqlx::Error> {
    let corrected = sqlx::query!(
        "-- inbox: correct pruned
        UPDATE inbox_pruned SET until = now() - make_interval(secs => $1) WHERE until > now()",
        (retention + CLOCK_MARGIN).as_secs_f64(),
    )
    .execute(tx)
    .await?;
    if corrected.rows_affected() > 0 {
        warn!(
            "the database's clock was ahead and has been set back: the inbox may have forgotten events that were applied \
             meanwhile, and accepts events again that it rejected as STALE because of it"
        );
    }
    Ok(())
}
