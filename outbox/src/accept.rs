//! The inbox: accepts each event once.

use std::{collections::HashMap, time::Duration};

use sqlx::{Postgres, Transaction, types::time::OffsetDateTime};

use crate::{EventId, prune::CLOCK_MARGIN};

/// What the inbox knows of an event that is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acceptance {
    /// Recorded by this transaction, which must apply it.
    Fresh,
    /// Recorded by an earlier transaction.
    Duplicate,
    /// Not on record, and so old that its record may have been pruned.
    Stale,
}

struct Arrived {
    id: EventId,
    fresh: bool,
    stale: bool,
}

/// Records the events, given by id and time, and returns what the inbox knew of each.
///
/// The insert comes before the work, and the unique key decides. If two transactions deliver one event, the second
/// waits here until the first ends. Then it finds the record, or applies the event itself if the first rolled back. A
/// query before the insert would not do: both transactions could find nothing.
///
/// Ids are inserted in order. So overlapping batches wait for each other in the same order, and cannot deadlock.
///
/// The age of an event is measured by the inbox's clock, or the server's if that is behind it, as for pruning. So the
/// record of an event that is not stale cannot be pruned yet (see `prune`). An event that its sender dates ahead of `now()`
/// is young for longer, so its record is dated ahead as well. A pruner may move the inbox's clock after this statement has
/// read it, but by less than the margin. If the retention is made longer, events that were pruned before stay stale. An
/// `until` in the future was left by a clock that ran ahead. Every event would be stale until then, so it does not count;
/// `prune` corrects it, and says why that is right.
pub(crate) async fn accept(
    tx: &mut Transaction<'_, Postgres>,
    events: &[(EventId, OffsetDateTime)],
    retention: Duration,
) -> Result<HashMap<EventId, Acceptance>, sqlx::Error> {
    let (ids, times): (Vec<EventId>, Vec<OffsetDateTime>) = events.iter().copied().unzip();
    let rows = sqlx::query_as!(
        Arrived,
        r#"-- inbox: accept
        WITH arrived AS (
            SELECT id, max(time) AS time, max(time) > coalesce(
                (SELECT greatest(
                    least(clock, now()) - make_interval(secs => $3),
                    CASE WHEN until <= now() THEN until + make_interval(secs => $4) END)
                FROM inbox_pruned),
                now() - make_interval(secs => $3)) AS young
            FROM unnest($1::uuid[], $2::timestamptz[]) AS event (id, time)
            GROUP BY id
        ), recorded AS (
            INSERT INTO processed_messages (message_id, processed_at)
            SELECT id, greatest(time, now()) FROM arrived WHERE young ORDER BY id
            ON CONFLICT DO NOTHING
            RETURNING message_id
        )
        SELECT id AS "id!", id IN (SELECT message_id FROM recorded) AS "fresh!",
            NOT young AND (SELECT true FROM processed_messages WHERE message_id = id) IS NULL AS "stale!"
        FROM arrived"#,
        &ids as &[EventId],
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
