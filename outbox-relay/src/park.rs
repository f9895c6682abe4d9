//! Parks events that wait for a predecessor: hides them from the scans of leases.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;

use crate::run::FAR;

/// The oldest visible rows that one statement examines.
const ROWS_MAX: i64 = 5000;
/// Statements in one pass, so that the other maintenance is not delayed.
const STATEMENTS_MAX: u32 = 40;
/// If a statement parks fewer rows than this, most of the rows it examined are free. The next statement would see them
/// again.
const WORTH_ANOTHER: u64 = 500;
/// Longest time that a row is parked. It bounds the cost of a wrong guess about its predecessor.
const PARKED_MAX: Duration = Duration::from_secs(300);

/// Parks the oldest visible rows whose aggregate's first event cannot be delivered now. Otherwise each lease would look at
/// them in vain.
///
/// The first event is backing off or dead. Or it is leased, and the row is so far behind it that no run reaches it: a row
/// nearby may be the first within a moment, and is not worth it.
///
/// A parked row becomes visible by time alone: when the first event does, or after a few minutes if that is earlier. Then
/// it is leased, or parked again. A row may also be taken in a run, and a far one is woken when it comes first
/// ([`crate::run`]). So no wake-up can be lost for longer than that. The infinity of a dead event is not copied, since it
/// would mark the later ones dead too.
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

/// Examines only the oldest visible rows of each subscription. Leases begin there as well, so a row costs them nothing
/// before it is among these. The arrays and the subqueries for the first event are there so that no statistics can make
/// the plan read more.
///
/// Concurrent changes to these rows stand. The statement skips a locked row. A row that was changed after the snapshot
/// is no longer at its `ctid`. A requeue or a discard makes the successors of its event visible too, and waits for the
/// locks of this statement.
async fn park_oldest(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let parked = sqlx::query!(
        "-- relay: park
        UPDATE outbox AS successor
        SET visible_at = (
            -- With jitter. Otherwise all rows that wait for dead ones would become visible together.
            SELECT least(first.visible_at, now() + make_interval(secs => $2 * (1 - random() / 4)))
            FROM outbox AS first
            WHERE first.aggregate_id = successor.aggregate_id AND first.subscription_id = successor.subscription_id
            ORDER BY first.sequence
            LIMIT 1)
        WHERE ctid = ANY (ARRAY (
            SELECT waiting.ctid
            FROM outbox AS waiting
            WHERE waiting.ctid = ANY (ARRAY (
                    SELECT front.row
                    FROM (SELECT 0 UNION ALL SELECT subscription_id FROM outbox_subscriptions) AS each (subscription)
                    CROSS JOIN LATERAL (
                        SELECT ctid
                        FROM outbox
                        WHERE subscription_id = each.subscription AND sequence > 1 AND visible_at <= now()
                        ORDER BY visible_at
                        LIMIT $1) AS front (row)))
              AND (SELECT first.visible_at > now() AND first.sequence < waiting.sequence
                       AND (first.lease_token IS NULL OR waiting.sequence - first.sequence >= $3)
                   FROM outbox AS first
                   WHERE first.aggregate_id = waiting.aggregate_id AND first.subscription_id = waiting.subscription_id
                   ORDER BY first.sequence
                   LIMIT 1)
            FOR UPDATE OF waiting SKIP LOCKED))",
        ROWS_MAX,
        PARKED_MAX.as_secs_f64(),
        FAR,
    )
    .execute(connection)
    .await?;
    Ok(parked.rows_affected())
}
