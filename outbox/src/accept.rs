//! Takes events in once: the inbox.

use std::collections::HashSet;

use sqlx::{Postgres, Transaction};
use uuid::Uuid;

/// Records the events and returns those that were not recorded before: apply these, in this same transaction, and answer
/// the others as duplicates.
///
/// The insert comes before the work and the unique key decides: of two transactions that bring the same event, the
/// second waits here for the first, then finds it recorded (or, if the first rolled back, applies it itself). Looking
/// first and inserting later would let both see nothing.
///
/// Ids are inserted in their order, so two overlapping batches wait for each other in the same order and cannot deadlock.
///
/// # Errors
/// Those of the database.
pub async fn accept(tx: &mut Transaction<'_, Postgres>, event_ids: &[Uuid]) -> Result<HashSet<Uuid>, sqlx::Error> {
    let fresh = sqlx::query_scalar!(
        "-- inbox: accept
        INSERT INTO processed_messages (message_id)
        SELECT DISTINCT id FROM unnest($1::uuid[]) AS id ORDER BY id
        ON CONFLICT DO NOTHING
        RETURNING message_id",
        event_ids,
    )
    .fetch_all(&mut **tx)
    .await?;
    Ok(fresh.into_iter().collect())
}
