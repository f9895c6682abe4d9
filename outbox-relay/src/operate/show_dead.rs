//! Shows one dead event with all it carries.

use proto::relay::v1::{DeadEventContent, dead_event_content::Payload};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Descriptors, OperateError, decode::decode, list_dead::DeadRow, refuse::explain};

/// Reads the event and decodes its payload: by the descriptors given, or else by those of this project's contract. That it
/// cannot be decoded is an answer, not an error.
///
/// # Errors
/// [`OperateError::NotApplicable`] when it is not dead, and those of the database.
pub(crate) async fn show_dead(
    connection: &mut PgConnection,
    event_id: Uuid,
    descriptors: Option<&Descriptors>,
) -> Result<DeadEventContent, OperateError> {
    let row = sqlx::query!(
        r#"-- operate: show dead
        SELECT event_id, event_type, aggregate_id, sequence, attempts, created_at,
            extract(epoch FROM now() - created_at)::double precision AS "age_seconds!",
            coalesce(last_error, '') AS "reason!",
            (SELECT count(*) FROM outbox AS later
             WHERE later.aggregate_id = dead.aggregate_id AND later.sequence > dead.sequence) AS "held_back!",
            pardoned, payload, traceparent, tracestate
        FROM outbox AS dead
        WHERE visible_at = 'infinity' AND event_id = $1"#,
        event_id,
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else {
        return Err(OperateError::NotApplicable(explain(connection, &[event_id]).await?));
    };
    let payload = match decode(&row.event_type, &row.payload, descriptors) {
        Ok(json) => Payload::PayloadJson(json),
        Err(undecodable) => Payload::Undecodable(undecodable.to_string()),
    };
    let event = DeadRow {
        event_id: row.event_id,
        event_type: row.event_type,
        aggregate_id: row.aggregate_id,
        sequence: row.sequence,
        attempts: row.attempts,
        created_at: row.created_at,
        age_seconds: row.age_seconds,
        reason: row.reason,
        held_back: row.held_back,
    };
    Ok(DeadEventContent {
        event: Some(event.into()),
        pardoned: row.pardoned,
        traceparent: row.traceparent.unwrap_or_default(),
        tracestate: row.tracestate.unwrap_or_default(),
        data: row.payload.into(),
        payload: Some(payload),
    })
}
