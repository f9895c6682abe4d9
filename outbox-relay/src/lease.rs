//! Takes events out of everybody else's sight for a while: the only place that makes a [`Lease`].

use std::time::Duration;

use chassis::Database;
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tokio::time::Instant;
use uuid::Uuid;

/// A batch of events that no other worker takes before the lease expires. It ends in `settle`.
#[derive(Debug)]
pub(crate) struct Lease {
    /// The fencing token: whoever settles must name it, and a later lease of the same row has replaced it.
    pub(crate) token: Uuid,
    pub(crate) rows: Vec<LeasedRow>,
    /// When a delivery under this lease must have ended, by this process's monotonic clock.
    pub(crate) deliver_before: Instant,
}

/// One leased row of the outbox.
#[derive(Clone, Debug)]
pub(crate) struct LeasedRow {
    pub(crate) aggregate_id: Uuid,
    pub(crate) sequence: i32,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) traceparent: Option<String>,
    pub(crate) tracestate: Option<String>,
}

/// Leases up to `limit` events for `lease_seconds`; `None` when there is nothing to take.
///
/// Delivery may use three quarters of the lease, counted from *before* the statement is sent, while the database counts
/// the whole of it from when the statement runs. So a delivery has ended before any other worker can take the rows, and
/// the last quarter is there to settle; clocks are never compared, only durations.
pub(crate) async fn lease(database: &Database, limit: u32, lease_seconds: u32) -> Result<Option<Lease>, sqlx::Error> {
    let token = Uuid::new_v4();
    let deliver_before = Instant::now() + Duration::from_secs(lease_seconds.into()).mul_f32(0.75);
    let rows = database.run(move |connection| Box::pin(take_rows(connection, token, limit, lease_seconds))).await?;
    Ok((!rows.is_empty()).then_some(Lease { token, rows, deliver_before }))
}

/// One statement, since `FOR UPDATE SKIP LOCKED` outside a transaction protects nothing beyond its own statement: the
/// rows it locks are marked before the lock ends.
///
/// A row is free to go when it is visible and no event of its aggregate comes before it. First events need no look. A
/// later event is committed after its predecessor, so a snapshot that shows it shows the predecessor too, unless that is
/// settled; and as predecessors only ever disappear, an answer that is a moment old errs on the side of waiting.
///
/// Rows are addressed by their place (`ctid`): they are locked, so they cannot move before the update finds them, and
/// the plan cannot degrade to a join over a large outbox whatever the statistics say.
async fn take_rows(
    connection: &mut PgConnection,
    token: Uuid,
    limit: u32,
    lease_seconds: u32,
) -> Result<Vec<LeasedRow>, sqlx::Error> {
    let mut rows = sqlx::query_as!(
        LeasedRow,
        "-- relay: lease
        UPDATE outbox
        SET lease_token = $1, visible_at = now() + make_interval(secs => $3)
        WHERE ctid = ANY (ARRAY (
            SELECT free.ctid
            FROM outbox AS free
            WHERE free.visible_at <= now()
              AND (free.sequence = 1 OR NOT EXISTS (
                  SELECT FROM outbox AS earlier
                  WHERE earlier.aggregate_id = free.aggregate_id AND earlier.sequence < free.sequence))
            ORDER BY free.visible_at
            LIMIT $2
            FOR UPDATE OF free SKIP LOCKED))
        RETURNING aggregate_id, sequence, event_id, event_type, payload, created_at, traceparent, tracestate",
        token,
        i64::from(limit),
        f64::from(lease_seconds),
    )
    .fetch_all(connection)
    .await?;
    // UPDATE returns rows in no promised order. Ids are made in order of time.
    rows.sort_unstable_by_key(|row| row.event_id);
    Ok(rows)
}
