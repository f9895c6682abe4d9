//! Tells what a deed would change, and counts dead events by why they died.

use outbox::EventId;
use proto::relay::v1::{BlastRadius, DeadGroup, GroupDeadEventsResponse};
use sqlx::PgConnection;

use super::{Filter, OperateError, find_subscription, requeue::MAX_AGE_UNTOLD};

/// Dead events that are looked at, so that the answer comes soon.
const LOOKED_AT_MAX: i64 = 50_000;
/// Later events that are counted for one subject.
const BEHIND_MAX: i64 = 1000;
/// Groups of one answer.
const GROUPS_MAX: i64 = 200;

/// Counts the dead events that are named, or all that match, and what waits for them. Successors are found by the key of
/// the outbox, for each event.
///
/// # Errors
/// [`OperateError::NoSubscription`], and those of the database.
pub(crate) async fn measure_blast(
    connection: &mut PgConnection,
    event_ids: Option<&[EventId]>,
    filter: &Filter,
) -> Result<BlastRadius, OperateError> {
    let only = find_subscription(connection, filter.subscription.as_deref()).await?;
    let counted = sqlx::query!(
        r#"-- operate: measure blast
        WITH looked_at AS MATERIALIZED (
            SELECT aggregate_id, subscription_id, sequence, created_at, event_type, last_error FROM outbox
            WHERE visible_at = 'infinity' AND ($1::uuid[] IS NULL OR event_id = ANY ($1))
            LIMIT $6::bigint + 1
        ), dead AS MATERIALIZED (
            SELECT aggregate_id, subscription_id, sequence, created_at < now() - make_interval(secs => coalesce((
                    SELECT max_age_seconds FROM outbox_subscriptions AS named
                    WHERE named.subscription_id = outbox.subscription_id), $5)) AS too_old
            FROM looked_at AS outbox
            WHERE ($2::text IS NULL OR event_type = $2)
              AND ($3::text IS NULL OR split_part(last_error, ':', 1) = $3)
              AND ($4::smallint IS NULL OR subscription_id = $4)
        ), first AS (
            SELECT aggregate_id, subscription_id, min(sequence) AS sequence FROM dead GROUP BY 1, 2
        )
        SELECT count(*) AS "events!", count(DISTINCT aggregate_id) AS "subjects!",
            count(*) FILTER (WHERE too_old) AS "too_old!",
            (SELECT coalesce(sum(behind.events), 0)::bigint FROM first CROSS JOIN LATERAL (
                SELECT count(*) AS events FROM (
                    SELECT FROM outbox AS later
                    WHERE later.aggregate_id = first.aggregate_id AND later.subscription_id = first.subscription_id
                      AND later.sequence > first.sequence AND later.visible_at <> 'infinity'
                    LIMIT $7) AS later) AS behind) AS "held_back!",
            (SELECT count(*) FROM looked_at) AS "looked_at!"
        FROM dead"#,
        event_ids as Option<&[EventId]>,
        filter.event_type,
        filter.code,
        only,
        MAX_AGE_UNTOLD,
        LOOKED_AT_MAX,
        BEHIND_MAX,
    )
    .fetch_one(connection)
    .await?;
    Ok(BlastRadius {
        events: counted.events,
        subjects: counted.subjects,
        held_back: counted.held_back,
        too_old: counted.too_old,
        more: counted.looked_at > LOOKED_AT_MAX,
    })
}

/// Reasons that begin with the same code are one group, since many name ids.
///
/// # Errors
/// [`OperateError::NoSubscription`], and those of the database.
pub(crate) async fn group_dead(
    connection: &mut PgConnection,
    filter: &Filter,
) -> Result<GroupDeadEventsResponse, OperateError> {
    let only = find_subscription(connection, filter.subscription.as_deref()).await?;
    let rows = sqlx::query!(
        r#"-- operate: group dead
        SELECT event_type, coalesce(name, '') AS "subscription!", coalesce(split_part(last_error, ':', 1), '') AS "code!",
            coalesce(min(last_error), '') AS "reason!", count(*) AS "events!", min(outbox.created_at) AS "oldest!",
            coalesce(sum(count(*)) OVER (), 0)::bigint AS "all!"
        FROM outbox LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE visible_at = 'infinity'
          AND ($1::text IS NULL OR event_type = $1)
          AND ($2::smallint IS NULL OR subscription_id = $2)
        GROUP BY event_type, name, split_part(last_error, ':', 1)
        ORDER BY count(*) DESC, event_type, name, min(last_error)
        LIMIT $3"#,
        filter.event_type,
        only,
        GROUPS_MAX,
    )
    .fetch_all(connection)
    .await?;
    let all = rows.first().map_or(0, |row| row.all);
    let groups: Vec<_> = rows
        .into_iter()
        .map(|row| DeadGroup {
            subscription: row.subscription,
            r#type: row.event_type,
            code: row.code,
            reason: row.reason,
            events: row.events,
            oldest_time: Some(outbox::timestamp(row.oldest)),
        })
        .collect();
    let left_out = all - groups.iter().map(|group| group.events).sum::<i64>();
    Ok(GroupDeadEventsResponse { groups, left_out })
}
