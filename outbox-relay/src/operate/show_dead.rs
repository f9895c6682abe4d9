//! Shows one dead event with its payload and trace context.

use outbox::EventId;
use proto::relay::v1::{DeadEventContent, dead_event_content::Payload};
use sqlx::PgConnection;

use super::{Descriptors, OperateError, decode::decode, list_dead::DeadRow, refuse::explain};

/// Reads the event and decodes its payload, by the given descriptors or by those of this project's contract. A payload
/// that cannot be decoded is not an error: the answer gives the reason.
///
/// # Errors
/// [`OperateError::NotApplicable`] when it is not dead, and those of the database.
pub(crate) async fn show_dead(
    connection: &mut PgConnection,
    event_id: EventId,
    descriptors: Option<&Descriptors>,
) -> Result<DeadEventContent, OperateError> {
    let row = sqlx::query!(
        r#"-- operate: show dead
        SELECT event_id, subscription_id, event_type, aggregate_id, sequence, attempts, failures, created_at,
            extract(epoch FROM now() - created_at)::double precision AS "age_seconds!",
            coalesce(last_error, '') AS "reason!",
            (SELECT count(*) FROM outbox AS later
             WHERE later.aggregate_id = dead.aggregate_id AND later.subscription_id = dead.subscription_id
               AND later.sequence > dead.sequence) AS "held_back!",
            coalesce((SELECT name FROM outbox_subscriptions WHERE subscription_id = dead.subscription_id), '')
                AS "subscription!",
            attempts_before_requeue, payload, traceparent, tracestate
        FROM outbox AS dead
        WHERE visible_at = 'infinity' AND event_id = $1
        ORDER BY subscription_id
        LIMIT 1"#,
        event_id as EventId,
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else {
        return Err(OperateError::NotApplicable(explain(connection, &[event_id], None).await?));
    };
    let payload = match decode(&row.event_type, &row.payload, descriptors) {
        Ok(json) => Payload::PayloadJson(json),
        Err(undecodable) => Payload::Undecodable(undecodable.to_string()),
    };
    let event = DeadRow {
        event_id: row.event_id.into(),
        subscription_id: row.subscription_id,
        event_type: row.event_type,
        aggregate_id: row.aggregate_id.into(),
        sequence: row.sequence,
        attempts: row.attempts,
        failures: row.failures,
        created_at: row.created_at,
        age_seconds: row.age_seconds,
        reason: row.reason,
        held_back: row.held_back,
        subscription: row.subscription,
    };
    Ok(DeadEventContent {
        event: Some(event.into()),
        attempts_before_requeue: row.attempts_before_requeue,
        traceparent: row.traceparent.unwrap_or_default(),
        tracestate: row.tracestate.unwrap_or_default(),
        data: row.payload.into(),
        payload: Some(payload),
    })
}
