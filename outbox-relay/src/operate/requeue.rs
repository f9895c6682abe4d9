//! Requeues dead events, so that they are delivered again.

use outbox::EventId;
use proto::relay::v1::{RequeueDeadEventsResponse, deed::Kind};
use sqlx::{PgConnection, Postgres, Transaction};

use super::{
    Author, OperateError, Position, Reason, begin_durable, count,
    deeds::NewDeed,
    describe_named, find_subscription, free_successors,
    refuse::{NotApplicable, explain},
    tell_of_change,
};

/// The age limit of events whose receiver has told none yet: six sevenths of the retention that services have by default.
pub(super) const MAX_AGE_UNTOLD: i32 = 6 * 24 * 3600;

/// A dead event, locked by this transaction.
pub(super) struct Dead {
    pub(super) row: String,
    pub(super) event_id: EventId,
    age_hours: f64,
    max_age_hours: f64,
    too_old: bool,
}

/// Makes the named events visible at once, in each subscription in which they are dead, or in the given one. Frees their
/// successors. They keep their ids, attempts and reasons.
/// Attempts before a requeue do not count towards death, so each event has all its attempts again.
///
/// # Errors
/// [`OperateError::NotApplicable`] if an event cannot be requeued; then none was. And those of the database.
pub(crate) async fn requeue(
    connection: &mut PgConnection,
    event_ids: &[EventId],
    subscription: Option<&str>,
    author: &Author,
) -> Result<RequeueDeadEventsResponse, OperateError> {
    let subscription_id = find_subscription(connection, subscription).await?;
    let mut tx = begin_durable(connection).await?;
    let (old, young): (Vec<_>, Vec<_>) =
        lock_dead(&mut tx, event_ids, subscription_id).await?.into_iter().partition(|dead| dead.too_old);
    let (rows, young): (Vec<_>, Vec<_>) = young.into_iter().map(|dead| (dead.row, dead.event_id)).unzip();
    refuse_unless_all(&mut tx, event_ids, subscription_id, &young, &old).await?;
    let about = describe_named(event_ids);
    let deed_id = NewDeed::new(Kind::Requeue, author, subscription_id, &about).record(&mut tx).await?;
    let positions = make_visible(&mut tx, &rows, deed_id).await?;
    let freed = free_successors(&mut tx, &positions).await?;
    tx.commit().await?;
    tell_of_change(connection, &positions).await;
    Ok(RequeueDeadEventsResponse {
        requeued: count(positions.len() as u64),
        freed: count(freed),
        deed_id,
        ..RequeueDeadEventsResponse::default()
    })
}

/// Locks the events in the order of their ids. So two operators who requeue the same events do not deadlock. The second
/// waits for the first, and then finds that the events are no longer dead.
pub(super) async fn lock_dead(
    tx: &mut Transaction<'_, Postgres>,
    event_ids: &[EventId],
    subscription_id: Option<i16>,
) -> Result<Vec<Dead>, sqlx::Error> {
    sqlx::query_as!(
        Dead,
        r#"-- operate: lock dead
        SELECT outbox.ctid::text AS "row!", event_id,
            (extract(epoch FROM now() - created_at) / 3600)::double precision AS "age_hours!",
            max_age.hours AS "max_age_hours!",
            created_at < now() - make_interval(secs => max_age.hours * 3600) AS "too_old!"
        FROM outbox
        CROSS JOIN LATERAL (
            SELECT coalesce((
                SELECT max_age_seconds FROM outbox_subscriptions AS named
                WHERE named.subscription_id = outbox.subscription_id), $2) / 3600.0::double precision) AS max_age (hours)
        WHERE visible_at = 'infinity' AND event_id = ANY ($1)
          AND ($3::smallint IS NULL OR subscription_id = $3)
        ORDER BY event_id, subscription_id
        FOR UPDATE OF outbox"#,
        event_ids as &[EventId],
        MAX_AGE_UNTOLD,
        subscription_id,
    )
    .fetch_all(&mut **tx)
    .await
}

async fn refuse_unless_all(
    tx: &mut Transaction<'_, Postgres>,
    event_ids: &[EventId],
    subscription_id: Option<i16>,
    young: &[EventId],
    old: &[Dead],
) -> Result<(), OperateError> {
    let dead = |event_id: &EventId| young.contains(event_id) || old.iter().any(|dead| dead.event_id == *event_id);
    let not_dead: Vec<_> = event_ids.iter().copied().filter(|event_id| !dead(event_id)).collect();
    let too_old = old.iter().map(|dead| NotApplicable {
        event_id: dead.event_id,
        reason: Reason::TooOld { age_hours: dead.age_hours, max_age_hours: dead.max_age_hours },
    });
    let mut refused: Vec<_> = too_old.collect();
    if !not_dead.is_empty() {
        refused.append(&mut explain(tx, &not_dead, subscription_id).await?);
    }
    if refused.is_empty() { Ok(()) } else { Err(OperateError::NotApplicable(refused)) }
}

/// Requeues dead rows that the transaction has locked, and records them with the deed.
///
/// By `ctid`. The rows are locked, so they cannot move. And no statistics can make the plan read all dead rows.
pub(super) async fn make_visible(
    tx: &mut Transaction<'_, Postgres>,
    rows: &[String],
    deed_id: i64,
) -> Result<Vec<Position>, sqlx::Error> {
    sqlx::query_as!(
        Position,
        "-- operate: requeue
        WITH requeued AS (
            UPDATE outbox
            SET visible_at = now(), attempts_before_requeue = attempts, failures = 0, attempted_at = NULL
            WHERE ctid = ANY ($1::text[]::tid[])
            RETURNING event_id, subscription_id, aggregate_id, sequence
        ), recorded AS (
            INSERT INTO outbox_deed_events (deed_id, event_id, subscription_id, aggregate_id, sequence)
            SELECT $2, event_id, subscription_id, aggregate_id, sequence FROM requeued
        )
        SELECT subscription_id, aggregate_id, sequence FROM requeued",
        rows,
        deed_id,
    )
    .fetch_all(&mut **tx)
    .await
}
