//! Discards a dead event.

use outbox::EventId;
use proto::relay::v1::DiscardDeadEventResponse;
use sqlx::PgConnection;

use super::{
    OperateError, Position, begin_durable, count, free_late_successors, free_successors, refuse::explain, wake_relays,
};

/// Moves the whole event into `outbox_discarded`, with the operator's name and reason, and frees its successors. One
/// statement deletes and inserts, so at any moment the event is in exactly one of the two tables.
///
/// # Errors
/// [`OperateError::NotApplicable`] when it is not dead, and those of the database.
pub(crate) async fn discard(
    connection: &mut PgConnection,
    event_id: EventId,
    by: &str,
    reason: &str,
) -> Result<DiscardDeadEventResponse, OperateError> {
    let mut tx = begin_durable(connection).await?;
    let discarded = sqlx::query!(
        "-- operate: discard
        WITH given_up AS (
            DELETE FROM outbox
            WHERE visible_at = 'infinity' AND event_id = $1
            RETURNING event_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
                tracestate, last_error)
        INSERT INTO outbox_discarded (event_id, aggregate_id, sequence, created_at, attempts, event_type, payload,
            traceparent, tracestate, last_error, discarded_by, reason)
        SELECT event_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent, tracestate,
            last_error, $2, $3
        FROM given_up
        RETURNING aggregate_id, sequence, discarded_at",
        event_id as EventId,
        by,
        reason,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(discarded) = discarded else {
        return Err(OperateError::NotApplicable(explain(&mut tx, &[event_id]).await?));
    };
    let position = Position { aggregate_id: discarded.aggregate_id.into(), sequence: discarded.sequence };
    let freed = free_successors(&mut tx, &[position]).await?;
    tx.commit().await?;
    free_late_successors(connection, &[position]).await;
    wake_relays(connection).await;
    let discard_time = Some(outbox::timestamp(discarded.discarded_at));
    Ok(DiscardDeadEventResponse { freed: count(freed), discard_time })
}
