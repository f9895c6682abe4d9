//! Has dead events delivered again.

use clap::Args;
use proto::relay::v1::RequeueDeadEventsResponse;
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

use super::{
    OperateError, Place, Reason, begin_durable, count, free_late_successors, free_successors,
    refuse::{NotApplicable, explain},
    wake_relays,
};

/// How old an event may be to be delivered.
#[derive(Args, Clone, Copy, Debug)]
pub struct MaxAge {
    /// Hours after which an event is not delivered any more, whatever became of it until then. Receivers have to remember
    /// for longer what they have applied.
    #[arg(long, env = "RELAY_MAX_AGE_HOURS", default_value_t = 144, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    pub max_age_hours: u32,
}

/// Which dead events to requeue.
#[derive(Clone, Debug)]
pub(crate) enum Which {
    /// Each of these, or none.
    Named(Vec<Uuid>),
    /// All that are not too old: of one type, if it is given.
    All { event_type: Option<String> },
}

/// A dead event that this transaction has locked.
struct Dead {
    event_id: Uuid,
    age_hours: f64,
    too_old: bool,
}

/// Requeues them: visible at once, with their ids, attempts and reasons as they are. The attempts so far are pardoned, so
/// that an event has all of them before it again; on record they stay. What they held back goes after them.
///
/// # Errors
/// [`OperateError::NotApplicable`], of events that were named: then none was requeued. And those of the database.
pub(crate) async fn requeue(
    connection: &mut PgConnection,
    which: &Which,
    max_age: MaxAge,
) -> Result<RequeueDeadEventsResponse, OperateError> {
    let mut tx = begin_durable(connection).await?;
    let (old, young): (Vec<_>, Vec<_>) =
        lock_dead(&mut tx, which, max_age).await?.into_iter().partition(|dead| dead.too_old);
    let young: Vec<_> = young.into_iter().map(|dead| dead.event_id).collect();
    if let Which::Named(event_ids) = which {
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

/// In the order of their ids, so that two operators who requeue the same events wait for each other, and do not deadlock.
/// The second then finds them dead no more.
async fn lock_dead(
    tx: &mut Transaction<'_, Postgres>,
    which: &Which,
    max_age: MaxAge,
) -> Result<Vec<Dead>, sqlx::Error> {
    let (event_ids, event_type) = match which {
        Which::Named(event_ids) => (Some(event_ids.as_slice()), None),
        Which::All { event_type } => (None, event_type.as_deref()),
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
        event_ids,
        event_type,
        max_age.max_age_hours.cast_signed(),
    )
    .fetch_all(&mut **tx)
    .await
}

async fn refuse_unless_all(
    tx: &mut Transaction<'_, Postgres>,
    event_ids: &[Uuid],
    young: &[Uuid],
    old: &[Dead],
    MaxAge { max_age_hours }: MaxAge,
) -> Result<(), OperateError> {
    let dead = |event_id: &Uuid| young.contains(event_id) || old.iter().any(|dead| dead.event_id == *event_id);
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

async fn make_visible(tx: &mut Transaction<'_, Postgres>, event_ids: &[Uuid]) -> Result<Vec<Place>, sqlx::Error> {
    sqlx::query_as!(
        Place,
        "-- operate: requeue
        UPDATE outbox
        SET visible_at = now(), pardoned = attempts
        WHERE visible_at = 'infinity' AND event_id = ANY ($1)
        RETURNING aggregate_id, sequence",
        event_ids,
    )
    .fetch_all(&mut **tx)
    .await
}
