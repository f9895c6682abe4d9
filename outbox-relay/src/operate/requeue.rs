//! Requeues dead events, so that they are delivered again.

use clap::Args;
use outbox::EventId;
use proto::relay::v1::RequeueDeadEventsResponse;
use sqlx::{PgConnection, Postgres, Transaction};

use super::{
    OperateError, Position, Reason, begin_durable, count, free_late_successors, free_successors,
    refuse::{NotApplicable, explain},
    wake_relays,
};

/// Age limit for delivery.
#[derive(Args, Clone, Copy, Debug)]
pub struct MaxAge {
    /// Hours after which an event is too old to be delivered. Receivers must remember applied events for longer than
    /// this.
    #[arg(long, env = "RELAY_MAX_AGE_HOURS", default_value_t = 144, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    pub max_age_hours: u32,
}

/// The dead events to requeue.
#[derive(Clone, Debug)]
pub(crate) enum Selection {
    /// All of these events, or none.
    Named(Vec<EventId>),
    /// All events that are not too old, of one type if it is set.
    All { event_type: Option<String> },
}

/// A dead event, locked by this transaction.
struct Dead {
    event_id: EventId,
    age_hours: f64,
    too_old: bool,
}

/// Makes the events visible at once, and frees their successors. They keep their ids, attempts and reasons. Attempts
/// before a requeue do not count towards death, so each event has all its attempts again.
///
/// # Errors
/// [`OperateError::NotApplicable`] if a named event cannot be requeued; then none was. And those of the database.
pub(crate) async fn requeue(
    connection: &mut PgConnection,
    selection: &Selection,
    max_age: MaxAge,
) -> Result<RequeueDeadEventsResponse, OperateError> {
    let mut tx = begin_durable(connection).await?;
    let (old, young): (Vec<_>, Vec<_>) =
        lock_dead(&mut tx, selection, max_age).await?.into_iter().partition(|dead| dead.too_old);
    let young: Vec<_> = young.into_iter().map(|dead| dead.event_id).collect();
    if let Selection::Named(event_ids) = selection {
        refuse_unless_all(&mut tx, event_ids, &young, &old, max_age).await?;
    }
    let requeued = make_visible(&mut tx, &young).await?;
    let freed = free_successors(&mut tx, &requeued).await?;
    tx.commit().await?;
    free_late_successors(connection, &requeued).await;
    wake_relays(connection).await;
    Ok(RequeueDeadEventsResponse {
        requeued: count(requeued.len() as u64),
        freed: count(freed),
        too_old: count(old.len() as u64),
    })
}

/// Locks the events in the order of their ids. So two operators who requeue the same events do not deadlock. The second
/// waits for the first, and then finds that the events are no longer dead.
async fn lock_dead(
    tx: &mut Transaction<'_, Postgres>,
    selection: &Selection,
    max_age: MaxAge,
) -> Result<Vec<Dead>, sqlx::Error> {
    let (event_ids, event_type) = match selection {
        Selection::Named(event_ids) => (Some(event_ids.as_slice()), None),
        Selection::All { event_type } => (None, event_type.as_deref()),
    };
    sqlx::query_as!(
        Dead,
        r#"-- operate: lock dead
        SELECT event_id,
            (extract(epoch FROM now() - created_at) / 3600)::double precision AS "age_hours!",
            created_at < now() - make_interval(hours => $3) AS "too_old!"
        FROM outbox
        WHERE visible_at = 'infinity'
          AND ($1::uuid[] IS NULL OR event_id = ANY ($1))
          AND ($2::text IS NULL OR event_type = $2)
        ORDER BY event_id
        FOR UPDATE"#,
        event_ids as Option<&[EventId]>,
        event_type,
        max_age.max_age_hours.cast_signed(),
    )
    .fetch_all(&mut **tx)
    .await
}

async fn refuse_unless_all(
    tx: &mut Transaction<'_, Postgres>,
    event_ids: &[EventId],
    young: &[EventId],
    old: &[Dead],
    MaxAge { max_age_hours }: MaxAge,
) -> Result<(), OperateError> {
    let dead = |event_id: &EventId| young.contains(event_id) || old.iter().any(|dead| dead.event_id == *event_id);
    let not_dead: Vec<_> = event_ids.iter().copied().filter(|event_id| !dead(event_id)).collect();
    let too_old = old.iter().map(|dead| NotApplicable {
        event_id: dead.event_id,
        reason: Reason::TooOld { age_hours: dead.age_hours, max_age_hours },
    });
    let mut refused: Vec<_> = too_old.collect();
    if !not_dead.is_empty() {
        refused.append(&mut explain(tx, &not_dead).await?);
    }
    if refused.is_empty() { Ok(()) } else { Err(OperateError::NotApplicable(refused)) }
}

async fn make_visible(tx: &mut Transaction<'_, Postgres>, event_ids: &[EventId]) -> Result<Vec<Position>, sqlx::Error> {
    sqlx::query_as!(
        Position,
        "-- operate: requeue
        UPDATE outbox
        SET visible_at = now(), attempts_before_requeue = attempts, failures = 0, attempted_at = NULL
        WHERE visible_at = 'infinity' AND event_id = ANY ($1)
        RETURNING aggregate_id, sequence",
        event_ids as &[EventId],
    )
    .fetch_all(&mut **tx)
    .await
}
