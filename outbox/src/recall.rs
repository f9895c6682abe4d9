//! Recalls which events were applied.

use std::collections::HashMap;

use prost_types::Timestamp;
use sqlx::PgConnection;

use crate::{EventId, timestamp};

/// Ids that one call may name.
pub(crate) const RECALL_MAX: usize = 1000;

/// When each of the events was applied, or its own time if that is later; `None` for those that are not on record.
pub(crate) async fn recall(
    connection: &mut PgConnection,
    event_ids: &[EventId],
) -> Result<Vec<Option<Timestamp>>, sqlx::Error> {
    let applied = sqlx::query!(
        r#"-- inbox: recall
        SELECT message_id AS "event_id: EventId", processed_at FROM processed_messages WHERE message_id = ANY ($1)"#,
        event_ids as &[EventId],
    )
    .fetch_all(connection)
    .await?;
    let applied: HashMap<EventId, Timestamp> =
        applied.into_iter().map(|row| (row.event_id, timestamp(row.processed_at))).collect();
    Ok(event_ids.iter().map(|event_id| applied.get(event_id).copied()).collect())
}
