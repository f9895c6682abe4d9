//! Discards dead events, and refuses what one tells of if the operator says so.

use outbox::EventId;
use proto::relay::v1::deed::Kind;
use sqlx::{
    PgConnection, Postgres, Transaction,
    types::{Uuid, time::OffsetDateTime},
};

use super::{
    Author, Changed, OperateError, Position, begin_durable, count, deeds::NewDeed, describe_named, find_subscription,
    free_successors, refuse::explain, requeue::lock_dead, tell_of_change,
};

struct DiscardedRow {
    subscription_id: i16,
    aggregate_id: Uuid,
    sequence: i32,
    event_type: String,
    discarded_at: OffsetDateTime,
    refused: bool,
}

/// Rows that are in `outbox_discarded` now.
pub(super) struct GivenUp(Vec<DiscardedRow>);

impl GivenUp {
    pub(super) fn positions(&self) -> Vec<Position> {
        let position = |event: &DiscardedRow| Position {
            subscription_id: event.subscription_id,
            aggregate_id: event.aggregate_id.into(),
            sequence: event.sequence,
        };
        self.0.iter().map(position).collect()
    }
}

/// A discard, as an operator asks for it.
#[derive(Debug)]
pub(crate) struct Discard {
    pub(crate) event_ids: Vec<EventId>,
    /// The subscription in which they are discarded; `None` for each in which they are dead.
    pub(crate) subscription: Option<String>,
    pub(crate) author: Author,
    /// Whether to refuse what the event tells of, with the reason. Only of a single event: customers read the reason.
    pub(crate) refuse: bool,
}

/// What was discarded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Discarded {
    pub(crate) changed: Changed,
    pub(crate) at: OffsetDateTime,
    pub(crate) deed_id: i64,
}

/// Discards the events in each subscription in which they are dead, or in the given one, and frees their successors.
///
/// A refusal is made by the service that owns the database, in the same transaction. So nobody is told of a refusal
/// while the event may still be delivered.
///
/// # Errors
/// [`OperateError::NotApplicable`] if one is not dead; then none was discarded. [`OperateError::NoRefusals`] and
/// [`OperateError::NotRefused`] if nothing can be refused, and those of the database.
pub(crate) async fn discard(connection: &mut PgConnection, discard: &Discard) -> Result<Discarded, OperateError> {
    let Discard { event_ids, subscription, author, refuse } = discard;
    let subscription_id = find_subscription(connection, subscription.as_deref()).await?;
    let mut tx = begin_durable(connection).await?;
    let dead = lock_dead(&mut tx, event_ids, subscription_id).await?;
    let is_dead = |event_id: &EventId| dead.iter().any(|dead| dead.event_id == *event_id);
    let others: Vec<_> = event_ids.iter().copied().filter(|event_id| !is_dead(event_id)).collect();
    if !others.is_empty() {
        return Err(OperateError::NotApplicable(explain(&mut tx, &others, subscription_id).await?));
    }
    let rows: Vec<_> = dead.into_iter().map(|dead| dead.row).collect();
    let about = describe_named(event_ids) + if *refuse { ", with a refusal of what it tells of" } else { "" };
    let deed = NewDeed::new(Kind::Discard, author, subscription_id, &about);
    let deed_id = NewDeed { can_undo: !*refuse, ..deed }.record(&mut tx).await?;
    let given_up = give_up(&mut tx, &rows, author, deed_id, *refuse).await?;
    let Some(first) = given_up.0.first() else {
        return Err(OperateError::NotApplicable(explain(&mut tx, event_ids, subscription_id).await?));
    };
    if *refuse {
        if !first.refused {
            let why = "it was discarded before without a refusal, and sent again";
            return Err(OperateError::NotRefused(why.to_owned()));
        }
        refuse_event(&mut tx, first, &author.reason).await?;
    }
    let (at, positions) = (first.discarded_at, given_up.positions());
    let freed = free_successors(&mut tx, &positions).await?;
    tx.commit().await?;
    tell_of_change(connection, &positions).await;
    Ok(Discarded { changed: Changed { events: count(positions.len() as u64), freed: count(freed) }, at, deed_id })
}

/// Moves whole events into `outbox_discarded`, with the operator's name and reason, and records them with the deed. The
/// transaction has locked the rows, which are given by their `ctid`. One statement deletes and inserts, so at any moment an
/// event is in exactly one of the two tables. One that was sent again after an earlier discard may be there already.
pub(super) async fn give_up(
    tx: &mut Transaction<'_, Postgres>,
    rows: &[String],
    author: &Author,
    deed_id: i64,
    refused: bool,
) -> Result<GivenUp, sqlx::Error> {
    let discarded = sqlx::query_as!(
        DiscardedRow,
        r#"-- operate: discard
        WITH given_up AS (
            DELETE FROM outbox
            WHERE ctid = ANY ($1::text[]::tid[])
            RETURNING event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
                tracestate, last_error
        ), kept AS (
            INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type,
                payload, traceparent, tracestate, last_error, discarded_by, reason, refused)
            SELECT event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
                tracestate, last_error, $2, $3, $5
            FROM given_up
            ON CONFLICT (event_id, subscription_id) DO UPDATE
            SET created_at = excluded.created_at, attempts = excluded.attempts, last_error = excluded.last_error,
                discarded_at = excluded.discarded_at, discarded_by = excluded.discarded_by, reason = excluded.reason
            RETURNING event_id, subscription_id, refused
        ), recorded AS (
            INSERT INTO outbox_deed_events (deed_id, event_id, subscription_id, aggregate_id, sequence)
            SELECT $4, event_id, subscription_id, aggregate_id, sequence FROM given_up
        )
        SELECT given_up.subscription_id, aggregate_id, sequence, event_type, now() AS "discarded_at!", refused
        FROM given_up JOIN kept USING (event_id, subscription_id)"#,
        rows,
        author.name,
        author.reason,
        deed_id,
        refused,
    );
    discarded.fetch_all(&mut **tx).await.map(GivenUp)
}

/// The function is not named in a statement before it is known to be there: not every service defines it.
async fn refuse_event(
    tx: &mut Transaction<'_, Postgres>,
    event: &DiscardedRow,
    reason: &str,
) -> Result<(), OperateError> {
    let is_defined = sqlx::query_scalar!(
        r#"-- operate: look for refusals
        SELECT to_regprocedure('outbox_refuse(uuid, text, text)') IS NOT NULL AS "is_defined!""#
    );
    if !is_defined.fetch_one(&mut **tx).await? {
        return Err(OperateError::NoRefusals);
    }
    let refused = sqlx::query_scalar!(
        "-- operate: refuse
        SELECT outbox_refuse($1, $2, $3)",
        event.aggregate_id,
        event.event_type,
        reason,
    );
    match refused.fetch_one(&mut **tx).await? {
        None => Ok(()),
        Some(why) => Err(OperateError::NotRefused(why)),
    }
}
