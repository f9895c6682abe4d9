//! Keeps events that wait for a predecessor out of the scan for work.

use std::time::Duration;

use chassis::Database;
use sqlx::PgConnection;

/// Rows that one statement parks, and the front of the line it looks at.
const ROWS_MAX: i64 = 5000;
/// Statements in one go, so that the other maintenance has its turn.
const STATEMENTS_MAX: u32 = 40;
/// A front of which less than this was parked consists of events that wait for one that is about to go.
const WORTH_ANOTHER: u64 = 500;
/// How long a row is out of sight at most. This bounds what a wrong guess about its predecessor can cost.
const PARKED_MAX: Duration = Duration::from_secs(300);

/// Parks rows at the front of the line that wait for a predecessor which is backing off or dead. Each lease would look at
/// them in vain: a row that is visible is scanned, whatever it waits for.
///
/// A parked row needs nobody to wake it: its own time brings it back, when its predecessor may go or after a few minutes,
/// whichever is earlier, and then it is leased, or parked again. So there is no wake-up that could be lost, and no state
/// that could disagree with its predecessor's for longer than that. Deadness is not inherited: infinity is for dead rows.
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

/// A row that was requeued or released while this statement runs is left alone: a row that somebody else has locked is
/// skipped, and one that changed after the snapshot was taken is no longer where `ctid` says. A predecessor may become
/// visible at the same moment; whoever sees to that sees to its successors too, and waits for this statement's locks.
///
/// Rows are parked one link of a chain at a time: a parked row is itself backing off, as far as its successor is
/// concerned. It is looked at no further than the front of the line, since leases begin there as well: behind rows that
/// are about to go, and in front of which nothing stands, parked or not makes no difference yet.
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
            WHERE waiting.sequence > 1
              AND waiting.visible_at <= now()
              AND waiting.visible_at <= (
                  SELECT max(front.visible_at)
                  FROM (SELECT visible_at FROM outbox WHERE sequence > 1 ORDER BY visible_at LIMIT $1) AS front)
              AND EXISTS (
                  SELECT FROM outbox AS earlier
                  WHERE earlier.aggregate_id = waiting.aggregate_id
                    AND earlier.sequence = waiting.sequence - 1
                    AND earlier.lease_token IS NULL
                    AND earlier.visible_at > now())
            LIMIT $1
            FOR UPDATE OF waiting SKIP LOCKED))",
        ROWS_MAX,
        PARKED_MAX.as_secs_f64(),
    )
    .execute(connection)
    .await?;
    Ok(parked.rows_affected())
}
