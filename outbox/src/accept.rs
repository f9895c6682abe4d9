//! Takes events in once: the inbox.

use std::{collections::HashMap, time::Duration};

use sqlx::{Postgres, Transaction, types::time::OffsetDateTime};
use uuid::Uuid;

use crate::prune::CLOCK_MARGIN;

/// What the inbox knows of an event that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acceptance {
    /// Recorded by this transaction: apply it, in this same transaction.
    Fresh,
    /// Recorded before.
    Duplicate,
    /// Not on record, and so old that it may have been, and been pruned.
    Stale,
}

/// Records the events, given by id and time, and says which of them were not recorded before.
///
/// The insert comes before the work and the unique key decides: of two transactions that bring the same event, the
/// second waits here for the first, then finds it recorded (or, if the first rolled back, applies it itself). Looking
/// first and inserting later would let both see nothing.
///
/// Ids are inserted in their order, so two overlapping batches wait for each other in the same order and cannot deadlock.
///
/// Age is judged by this database's clock, as pruning is: an event that is not stale here is not pruned yet, if it was
/// ever applied (see `prune`). What was pruned under a shorter retention stays stale under a longer one.
pub(crate) async fn accept(
    tx: &mut Transaction<'_, Postgres>,
    events: &[(Uuid, OffsetDateTime)],
    retention: Duration,
) -> Result<HashMap<Uuid, Acceptance>, sqlx::Error> {
    let (ids, times): (Vec<Uuid>, Vec<OffsetDateTime>) = events.iter().copied().unzip();
    let rows = sqlx::query!(
        r#"-- inbox: accept
        WITH arrived AS (
            SELECT id, max(time) > greatest(
                now() - make_interval(secs => $3),
                (SELECT until + make_interval(secs => $4) FROM inbox_pruned)) AS young
            FROM unnest($1::uuid[], $2::timestamptz[]) AS event (id, time)
            GROUP BY id
        ), recorded AS (
            INSERT INTO processed_messages (message_id)
            SELECT id FROM arrived WHERE young ORDER BY id
            ON CONFLICT DO NOTHING
            RETURNING message_id
        )
        SELECT id AS "id!", id IN (SELECT message_id FROM recorded) AS "fresh!",
            NOT young AND (SELECT true FROM processed_messages WHERE message_id = id) IS NULL AS "stale!"
        FROM arrived"#,
        &ids,
        &times,
        retention.as_secs_f64(),
        CLOCK_MARGIN.as_secs_f64(),
    )
    .fetch_all(&mut **tx)
    .await?;
    let acceptance = |fresh, stale| match (fresh, stale) {
        (true, _) => Acceptance::Fresh,
        (false, true) => Acceptance::Stale,
        (false, false) => Acceptance::Duplicate,
    };
    Ok(rows.into_iter().map(|row| (row.id, acceptance(row.fresh, row.stale))).collect())
}
