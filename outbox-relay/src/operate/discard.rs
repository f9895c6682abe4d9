//! Discards a dead event, and refuses what it tells of if the operator says so.

use outbox::EventId;
use proto::relay::v1::DiscardDeadEventResponse;
use sqlx::{
    PgConnection, Postgres, Transaction,
    types::{Uuid, time::OffsetDateTime},
};

use super::{
    OperateError, Position, begin_durable, count, find_subscription, free_late_successors, free_successors,
    refuse::explain, wake_relays,
};

struct DiscardedRow {
    subscription_id: i16,
    aggregate_id: Uuid,
    sequence: i32,
    event_type: String,
    discarded_at: OffsetDateTime,
}

/// A discard, as an operator asks for it.
#[derive(Debug)]
pub(crate) struct Discard {
    pub(crate) event_id: EventId,
    /// The subscription in which it is discarded; `None` for each in which it is dead.
    pub(crate) subscription: Option<String>,
    pub(crate) by: String,
    pub(crate) reason: String,
    /// Whether to refuse what the event tells of, with the reason.
    pub(crate) refuse: bool,
}

/// Moves the whole event into `outbox_discarded`, with the operator's name and reason, and frees its successors. One
/// statement deletes and inserts, so at any moment the event is in exactly one of the two tables. That goes for each
/// subscription in which it is dead, or for the given one.
///
/// A refusal is made by the service that owns the database, in the same transaction. So nobody is told of a refusal
/// while the event may still be delivered.
///
/// # Errors
/// [`OperateError::NotApplicable`] when it is not dead, [`OperateError::NoRefusals`] and [`OperateError::NotRefused`] if
/// nothing can be refused, and those of the database.
pub(crate) async fn discard(
    connection: &mut PgConnection,
    discard: &Discard,
) -> Result<DiscardDeadEventResponse, OperateError> {
    let Discard { event_id, subscription, by, reason, refuse } = discard;
    let event_id = *event_id;
    let subscription_id = find_subscription(connection, subscription.as_deref()).await?;
    let mut tx = begin_durable(connection).await?;
    let discarded = sqlx::query_as!(
        DiscardedRow,
        "-- operate: discard
        WITH given_up AS (
            DELETE FROM outbox
            WHERE visible_at = 'infinity' AND event_id = $1
              AND ($4::smallint IS NULL OR subscription_id = $4)
            RETURNING event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
                tracestate, last_error)
        INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type,
            payload, traceparent, tracestate, last_error, discarded_by, reason, refused)
        SELECT event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
            tracestate, last_error, $2, $3, $5
        FROM given_up
        RETURNING subscription_id, aggregate_id, sequence, event_type, discarded_at",
        event_id as EventId,
        by,
        reason,
        subscription_id,
        refuse,
    )
    .fetch_all(&mut *tx)
    .await?;
    let Some(first) = discarded.first() else {
        return Err(OperateError::NotApplicable(explain(&mut tx, &[event_id]).await?));
    };
    if *refuse {
        refuse_event(&mut tx, first, reason).await?;
    }
    let discarded_at = first.discarded_at;
    let position = |event: &DiscardedRow| Position {
        subscription_id: event.subscription_id,
        aggregate_id: event.aggregate_id.into(),
        sequence: event.sequence,
    };
    let positions: Vec<_> = discarded.iter().map(position).collect();
    let freed = free_successors(&mut tx, &positions).await?;
    tx.commit().await?;
    free_late_successors(connection, &positions).await;
    wake_relays(connection).await;
    let discard_time = Some(outbox::timestamp(discarded_at));
    Ok(DiscardDeadEventResponse { freed: count(freed), discard_time })
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
