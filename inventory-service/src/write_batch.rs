//! Writes the decisions of a batch.

use std::collections::HashSet;

use outbox::{AggregateId, ApplyError, EventId, NewEvent};
use sqlx::{Postgres, Transaction};

use crate::{
    order_event::OrderId,
    reservations::{CancellationId, CancelledRows, LockedOrderId, NewRows, Reservations},
    stock::{Reference, Stock},
};

/// One statement writes all tables. Stock is under lock, so each round trip before the commit delays the other batches
/// that want the same SKUs. A statement for each table was slower for that reason.
///
/// Reservations are inserted in the order of their ids. So of two batches that insert the same orders, only one waits
/// for the other. Movements and answers are inserted only for orders that this batch decides. So a conflict always
/// shows as a reservation that was not inserted, never as a violated key of the ledger or the outbox.
///
/// The answers are enqueued by a subquery of the only row. As a part of `WITH` they would be enqueued only if something
/// read that part, and as one of two tables in `FROM` not if the other is empty.
///
/// The reservations to cancel are looked up one by one, by id. Sessions keep their plans: a join that is right for few
/// reservations would read the whole table once there are many, with stock under lock. Going by `ctid` is safe, since
/// these rows are under lock and cannot move.
///
/// The type after `as` says which ids a parameter takes. No two arrays of ids share one, so a wrong array does not
/// compile.
///
/// # Errors
/// [`ApplyError::Refused`] if other events have decided some of the orders. Nothing of the batch may be committed then.
pub(crate) async fn write_batch(
    tx: &mut Transaction<'_, Postgres>,
    reservations: &Reservations,
    stock: &Stock,
    answers: &[NewEvent],
) -> Result<(), ApplyError> {
    let (new, cancelled) = (NewRows::of(reservations), CancelledRows::of(reservations));
    let (ledger, totals) = (stock.ledger(), stock.totals());
    let answers = outbox::Rows::of(answers);
    let written = sqlx::query!(
        r#"-- inventory: write batch
        WITH inserted AS (
            INSERT INTO reservations (order_id, event_id, status, rejection, cancelled_by, cancelled_at, derived_ids)
            SELECT order_id, event_id, status, rejection, cancelled_by, CASE WHEN cancelled_by IS NOT NULL THEN now() END,
                CASE WHEN cancelled_by IS NULL THEN 1 ELSE 3 END
            FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::uuid[])
                AS new (order_id, event_id, status, rejection, cancelled_by)
            ORDER BY order_id
            ON CONFLICT DO NOTHING
            RETURNING order_id
        ), cancelled AS (
            UPDATE reservations
            SET status = ($7::text[])[array_position($6, order_id)],
                cancelled_by = ($8::uuid[])[array_position($6, order_id)],
                cancelled_at = now(), derived_ids = derived_ids | 2
            WHERE ctid = ANY (ARRAY (
                SELECT (SELECT found.ctid FROM reservations AS found WHERE found.order_id = cancelled.order_id)
                FROM unnest($6::uuid[]) AS cancelled (order_id)))
            RETURNING order_id
        ), decided AS (
            SELECT order_id FROM inserted UNION ALL SELECT order_id FROM cancelled
        ), ledger AS (
            INSERT INTO stock_ledger (reference, kind, sku, delta)
            SELECT entry.*
            FROM unnest($9::uuid[], $10::text[], $11::text[], $12::bigint[]) AS entry (reference, kind, sku, delta)
            JOIN decided ON decided.order_id = entry.reference
        ), moved AS (
            UPDATE stock SET available = available + moved.delta
            FROM unnest($13::text[], $14::bigint[]) AS moved (sku, delta)
            WHERE stock.sku = moved.sku
        )
        SELECT ARRAY (SELECT order_id FROM inserted) AS "inserted!: Vec<OrderId>", (
            SELECT outbox_enqueue(array_agg(aggregate_id), array_agg(sequence), array_agg(event_id),
                array_agg(event_type), array_agg(payload), array_agg(traceparent), array_agg(tracestate))
            FROM unnest($15::uuid[], $16::integer[], $17::uuid[], $18::text[], $19::bytea[], $20::text[], $21::text[])
                AS answer (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
            JOIN decided ON decided.order_id = answer.aggregate_id) AS "enqueued!""#,
        &new.order_ids as &[OrderId],
        &new.event_ids as &[Option<EventId>],
        &new.statuses as &[&str],
        &new.rejections as &[Option<&str>],
        &new.cancelled_by as &[Option<CancellationId>],
        &cancelled.order_ids as &[LockedOrderId],
        &cancelled.statuses as &[&str],
        &cancelled.cancelled_by as &[CancellationId],
        &ledger.references as &[Reference],
        &ledger.kinds as &[&str],
        &ledger.skus as &[&str],
        &ledger.deltas,
        &totals.skus as &[&str],
        &totals.deltas,
        &answers.aggregate_ids as &[AggregateId],
        &answers.sequences,
        &answers.event_ids as &[EventId],
        &answers.event_types as &[&str],
        &answers.payloads as &[&[u8]],
        &answers.traceparents as &[Option<&str>],
        &answers.tracestates as &[Option<&str>],
    )
    .fetch_one(&mut **tx)
    .await?;
    let inserted: HashSet<OrderId> = written.inserted.into_iter().collect();
    let refusals = reservations.refuse_all_but(&inserted);
    if refusals.is_empty() { Ok(()) } else { Err(ApplyError::Refused(refusals)) }
}
