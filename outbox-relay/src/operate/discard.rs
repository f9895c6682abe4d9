//! Discards a dead event.

use outbox::EventId;
use proto::relay::v1::DiscardDeadEventResponse;
use sqlx::{
    PgConnection,
    types::{Uuid, time::OffsetDateTime},
};

use super::{
    OperateError, Position, begin_durable, count, find_subscription, free_late_successors, free_successors,
    refuse::explain, wake_relays,
};

struct DiscardedRow {
    subscription_id: i16,
    aggregate_id: Uuid,
    sequence: i32,
    discarded_at: OffsetDateTime,
}

/// Moves the whole event into `outbox_discarded`, with the operator's name and reason, and frees its successors. One
/// statement deletes and inserts, so at any moment the event is in exactly one of the two tables. That goes for each
/// subscription in which it is dead, or for the given one.
///
/// # Errors
/// [`OperateError::NotApplicable`] when it is not dead, and those of the database.
pub(crate) async fn discard(
    connection: &mut PgConnection,
    event_id: EventId,
    subscription: Option<&str>,
    by: &str,
    reason: &str,
) -> Result<DiscardDeadEventResponse, OperateError> {
    let subscription_id = find_subscription(connection, subscription).await?;
    let mut tx = begin_durable(connection).await?;
    let discarded = sqlx::query_as!(
        DiscardedRow,
        "-- operate: discard
        WITH given_up AS (
            DELETE FROM outbox
            WHERE visible_at = 'infinity' AND event_id = $1
              AND ($4::smallint IS NULL OR subscription_id = $4)
            RETURNING event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
                tracestate, last_error)
        INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type,
            payload, traceparent, tracestate, last_error, discarded_by, reason)
        SELECT event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
            tracestate, last_error, $2, $3
        FROM given_up
        RETURNING subscription_id, aggregate_id, sequence, discarded_at",
        event_id as EventId,
        by,
        reason,
        subscription_id,
    )
    .fetch_all(&mut *tx)
    .await?;
    let Some(discarded_at) = discarded.first().map(|event| event.discarded_at) else {
        return Err(OperateError::NotApplicable(explain(&mut tx, &[event_id]).await?));
    };
    let position = |event: &DiscardedRow| Position {
        subscription_id: event.subscription_id,
        aggregate_id: event.aggregate_id.into(),
        sequence: event.sequence,
    };
    let positions: Vec<_> = discarded.iter().map(position).collect();
    let freed = free_successors(&mut tx, &positions).await?;
    tx.commit().await?;
    free_late_successors(connection, &positions).await;
    wake_relays(connection).await;
    let discard_time = Some(outbox::timestamp(discarded_at));
    Ok(DiscardDeadEventResponse { freed: count(freed), discard_time })
}
