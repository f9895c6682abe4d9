//! Keeps events that wait for a predecessor out of the scan for work.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;

/// Rows at the front of the line that one statement looks at.
const ROWS_MAX: i64 = 5000;
/// Statements in one go, so that the other maintenance has its turn.
const STATEMENTS_MAX: u32 = 40;
/// Of a front of which fewer are parked than this, most are about to go: the next statement would see the same rows.
const WORTH_ANOTHER: u64 = 500;
/// How long a row is out of sight at most. This bounds what a wrong guess about its predecessor can cost.
const PARKED_MAX: Duration = Duration::from_secs(300);

/// Parks rows at the front of the line that wait for a predecessor which is backing off or dead. Each lease would look at
/// them in vain: a row that is visible is scanned, whatever it waits for.
///
/// A parked row needs nobody to wake it: its own time brings it back, when its predecessor may go or after a few minutes,
/// whichever is earlier, and then it is leased, or parked again. So there is no wake-up that could be lost, and no state
/// that could disagree with its predecessor's for longer than that. A dead predecessor's infinity is not copied: it would
/// make its successors dead too.
///
/// # Errors
/// Those of the database.
pub(crate) async fn park(database: &Database) -> Result<(), sqlx::Error> {
    for _ in 0..STATEMENTS_MAX {
        if database.run(|connection| Box::pin(park_front(connection))).await? < WORTH_ANOTHER {
            break;
        }
    }
    Ok(())
}

/// Looks at the front of the line only: leases begin there as well, so a row is in their way only once it has come there.
/// Both arrays and the look at the predecessor are such that no statistics can make the plan read more than that.
///
/// Whatever others do to these rows meanwhile stands: a row that somebody has locked is skipped, and one that was changed
/// after the snapshot is no longer where its `ctid` says. Whoever makes a predecessor visible makes its successors so too,
/// and waits for the locks of this statement to do it.
///
/// Chains are parked link by link, a parked row being no different from one that backs off.
async fn park_front(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let parked = sqlx::query!(
        "-- relay: park
        UPDATE outbox AS successor
        SET visible_at = (
            -- With jitter, since the rows that wait for dead ones would all come back together.
            SELECT least(earlier.visible_at, now() + make_interval(secs => $2 * (1 - random() / 4)))
            FROM outbox AS earlier
            WHERE earlier.aggregate_id = successor.aggregate_id AND earlier.sequence = successor.sequence - 1)
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
                   WHERE earlier.aggregate_id = waiting.aggregate_id AND earlier.sequence = waiting.sequence - 1)
            FOR UPDATE OF waiting SKIP LOCKED))",
        ROWS_MAX,
        PARKED_MAX.as_secs_f64(),
    )
    .execute(connection)
    .await?;
    Ok(parked.rows_affected())
}
