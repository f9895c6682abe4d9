//! Parks events that wait for a predecessor: hides them from the scans of leases.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;

/// The oldest visible rows that one statement examines.
const ROWS_MAX: i64 = 5000;
/// Statements in one pass, so that the other maintenance is not delayed.
const STATEMENTS_MAX: u32 = 40;
/// If a statement parks fewer rows than this, most of the rows it examined are free. The next statement would see them
/// again.
const WORTH_ANOTHER: u64 = 500;
/// Longest time that a row is parked. It bounds the cost of a wrong guess about its predecessor.
const PARKED_MAX: Duration = Duration::from_secs(300);

/// Parks the oldest visible rows whose predecessor is backing off or dead. Otherwise each lease would scan them in
/// vain: a visible row is scanned, whatever it waits for.
///
/// A parked row becomes visible by time alone: when its predecessor does, or after a few minutes if that is earlier.
/// Then it is leased, or parked again. So no wake-up can be lost, and a row can disagree with its predecessor only for
/// that long. The infinity of a dead predecessor is not copied, since it would mark the successors dead too.
///
/// # Errors
/// Those of the database.
pub(crate) async fn park(database: &Database) -> Result<(), sqlx::Error> {
    for _ in 0..STATEMENTS_MAX {
        if database.run(|connection| Box::pin(park_oldest(connection))).await? < WORTH_ANOTHER {
            break;
        }
    }
    Ok(())
}

/// Examines only the oldest visible rows. Leases begin there as well, so a row costs them nothing before it is among
/// these. Both arrays and the subquery for the predecessor are there so that no statistics can make the plan read more.
///
/// Concurrent changes to these rows stand. The statement skips a locked row. A row that was changed after the snapshot
/// is no longer at its `ctid`. A requeue or a discard makes the successors of its event visible too, and waits for the
/// locks of this statement.
///
/// Chains are parked one event after the other: for its successor, a parked row is like one that backs off.
async fn park_oldest(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let parked = sqlx::query!(
        "-- relay: park
        UPDATE outbox AS successor
        SET visible_at = (
            -- With jitter. Otherwise all rows that wait for dead ones would become visible together.
            SELECT least(earlier.visible_at, now() + make_interval(secs => $2 * (1 - random() / 4)))
            FROM outbox AS earlier
            WHERE earlier.aggregate_id = successor.aggregate_id
              AND earlier.subscription_id = successor.subscription_id AND earlier.sequence < successor.sequence
            ORDER BY earlier.sequence DESC
            LIMIT 1)
        WHERE ctid = ANY (ARRAY (
            SELECT waiting.ctid
            FROM outbox AS waiting
            WHERE waiting.ctid = ANY (ARRAY (
                    SELECT front.ctid
                    FROM outbox AS front
                    WHERE front.sequence > 1 AND front.visible_at <= now()
                    ORDER BY front.visible_at
                    LIMIT $1))
              AND (SELECT earlier.lease_token IS NULL AND earlier.visible_at > now()
                   FROM outbox AS earlier
                   WHERE earlier.aggregate_id = waiting.aggregate_id
                     AND earlier.subscription_id = waiting.subscription_id AND earlier.sequence < waiting.sequence
                   ORDER BY earlier.sequence DESC
                   LIMIT 1)
            FOR UPDATE OF waiting SKIP LOCKED))",
        ROWS_MAX,
        PARKED_MAX.as_secs_f64(),
    )
    .execute(connection)
    .await?;
    Ok(parked.rows_affected())
}
