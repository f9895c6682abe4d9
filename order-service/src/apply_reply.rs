//! Applies inventory's replies to their orders.
//!
//! An operator may reject an order whose event was discarded (`outbox_refuse`). Nobody knows for certain that inventory
//! has not applied that event: its reply may have been lost. If inventory then answers that it has reserved, the order
//! is cancelled there, so that the stock comes back.

use std::collections::{HashMap, HashSet};

use outbox::{AggregateId, ApplyError, Envelope, EventId, Handler, NewEvent, Notifier, Refusal, TraceContext};
use prost::Name;
use proto::inventory::v1::{Shortage, ShortageReason, StockRejected, StockReleased, StockReserved};
use proto::orders::v1::OrderCancelled;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{cancel_order, ids::OrderId, measure};

/// Holds a shortage of every item of the largest order.
const REJECTION_BYTES_MAX: usize = 16 * 1024;

/// A reply of inventory.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    event_id: EventId,
    order_id: OrderId,
    answer: Answer,
}

/// What the reply says about the order.
#[derive(Clone, Debug)]
enum Answer {
    Reserved,
    /// The reason, item by item.
    Rejected(String),
    /// The order was CANCELLED before inventory learned of it, so nothing is left to change.
    Released,
}

/// New statuses for the orders that are still PENDING, as the arrays that the statement takes.
#[derive(Debug, Default)]
struct Settled<'r> {
    confirmed: Vec<OrderId>,
    rejected: Vec<OrderId>,
    rejections: Vec<&'r str>,
}

impl<'r> Settled<'r> {
    /// By the first reply to each order: a statement can change a row only once.
    fn of(replies: &[&'r Reply]) -> Self {
        let (mut settled, mut seen) = (Self::default(), HashSet::new());
        for Reply { order_id, answer, .. } in replies {
            match answer {
                Answer::Reserved if seen.insert(order_id) => settled.confirmed.push(*order_id),
                Answer::Rejected(why) if seen.insert(order_id) => {
                    settled.rejected.push(*order_id);
                    settled.rejections.push(why);
                }
                Answer::Reserved | Answer::Rejected(_) | Answer::Released => {}
            }
        }
        settled
    }
}

/// Applies replies in batches, each batch with one statement.
#[derive(Debug)]
pub(crate) struct ApplyReplies {
    /// Notifies all processes whose callers watch orders.
    pub(crate) watchers: Notifier,
}

impl Handler for ApplyReplies {
    type Event = Reply;

    fn read(&self, envelope: &Envelope<'_>) -> Result<Reply, Refusal> {
        let (order_id, answer) = if envelope.carries::<StockReserved>() {
            (envelope.decode::<StockReserved>()?.order_id, Answer::Reserved)
        } else if envelope.carries::<StockRejected>() {
            let StockRejected { order_id, shortages } = envelope.decode()?;
            (order_id, Answer::Rejected(describe(&shortages)))
        } else if envelope.carries::<StockReleased>() {
            (envelope.decode::<StockReleased>()?.order_id, Answer::Released)
        } else {
            return Err(Refusal::unknown_type(envelope));
        };
        if Uuid::try_parse(&order_id).map(AggregateId::from) != Ok(envelope.subject) {
            return Err(Refusal::reject("INVALID_REPLY", "order_id is not the subject of the event"));
        }
        Ok(Reply { event_id: envelope.id, order_id: envelope.subject.into(), answer })
    }

    /// Settles only PENDING orders. An order that was cancelled while the reply was in flight stays CANCELLED.
    /// Inventory puts its stock back when it applies the cancellation, before the reply or after it.
    ///
    /// Batches cannot deadlock. No two batches at a time contain the same order, since a relay leases the events of an
    /// order together. A cancellation locks only one order.
    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, replies: &[&Reply]) -> Result<(), ApplyError> {
        let order_ids: Vec<OrderId> = replies.iter().map(|reply| reply.order_id).collect();
        let Settled { confirmed, rejected, rejections } = Settled::of(replies);
        // A subquery finds each order by its id, and cannot be planned as a join. Sessions keep their plans: a join
        // that was right for a few orders would read the whole table once there are many. The test of `status` is
        // outside, where it is repeated for an order that was cancelled meanwhile.
        let written = sqlx::query!(
            r#"-- orders: apply replies
            WITH confirmed AS (
                UPDATE orders SET status = 'CONFIRMED'
                WHERE status = 'PENDING' AND ctid = ANY (ARRAY (
                    SELECT (SELECT found.ctid FROM orders AS found WHERE found.order_id = reply.order_id)
                    FROM unnest($2::uuid[]) AS reply (order_id)))
                RETURNING order_id, extract(epoch FROM clock_timestamp() - created_at)::double precision AS seconds
            ), rejected AS (
                UPDATE orders SET status = 'REJECTED', rejection = ($4::text[])[array_position($3, order_id)]
                WHERE status = 'PENDING' AND ctid = ANY (ARRAY (
                    SELECT (SELECT found.ctid FROM orders AS found WHERE found.order_id = reply.order_id)
                    FROM unnest($3::uuid[]) AS reply (order_id)))
                RETURNING extract(epoch FROM clock_timestamp() - created_at)::double precision AS seconds
            )
            SELECT ARRAY (
                    SELECT order_id FROM unnest($1::uuid[]) AS reply (order_id)
                    WHERE (SELECT true FROM orders WHERE orders.order_id = reply.order_id) IS NULL)
                    AS "unknown!: Vec<OrderId>",
                ARRAY (SELECT order_id FROM confirmed) AS "confirmed!: Vec<OrderId>",
                ARRAY (SELECT seconds FROM confirmed) AS "confirmed_after!",
                ARRAY (SELECT seconds FROM rejected) AS "rejected_after!""#,
            &order_ids as &[OrderId],
            &confirmed as &[OrderId],
            &rejected as &[OrderId],
            &rejections as &[&str],
        )
        .fetch_one(&mut **tx)
        .await?;
        let of_unknown = replies.iter().filter(|reply| written.unknown.contains(&reply.order_id));
        let refusals: HashMap<EventId, Refusal> =
            of_unknown.map(|reply| (reply.event_id, unknown_order(reply))).collect();
        if !refusals.is_empty() {
            return Err(ApplyError::Refused(refusals));
        }
        measure::settled("confirmed", &written.confirmed_after);
        measure::settled("rejected", &written.rejected_after);
        let done: HashSet<OrderId> = written.confirmed.into_iter().collect();
        let not_confirmed = confirmed.into_iter().filter(|order_id| !done.contains(order_id)).collect();
        Ok(cancel_rejected(tx, not_confirmed).await?)
    }

    fn types(&self) -> Vec<String> {
        vec![StockReserved::full_name(), StockRejected::full_name(), StockReleased::full_name()]
    }

    fn committed(&self) {
        self.watchers.notify();
    }
}

/// Tells inventory that these orders are cancelled, those that are REJECTED. An order that inventory has answered with a
/// reservation was not rejected by inventory.
///
/// Nearly always there is none to look at. The status is read after the update, which has waited for whoever was changing
/// the order, and a REJECTED order stays as it is. One whose cancellation waits already gets no second.
async fn cancel_rejected(tx: &mut Transaction<'_, Postgres>, order_ids: Vec<OrderId>) -> Result<(), sqlx::Error> {
    if order_ids.is_empty() {
        return Ok(());
    }
    let rejected = sqlx::query_scalar!(
        r#"-- orders: find rejected
        SELECT order_id AS "order_id: OrderId" FROM orders
        WHERE order_id = ANY ($1) AND status = 'REJECTED'
          AND (SELECT true FROM outbox WHERE aggregate_id = order_id AND sequence = $2 LIMIT 1) IS NULL"#,
        &order_ids as &[OrderId],
        cancel_order::SEQUENCE,
    )
    .fetch_all(&mut **tx)
    .await?;
    let cancelled = |order_id: &OrderId| {
        let message = OrderCancelled { order_id: order_id.to_string() };
        NewEvent::of(*order_id, cancel_order::SEQUENCE, &message, &TraceContext::default())
    };
    let events: Vec<NewEvent> = rejected.iter().map(cancelled).collect();
    outbox::enqueue(tx, &events).await
}

fn unknown_order(reply: &Reply) -> Refusal {
    Refusal::reject("UNKNOWN_ORDER", format!("there is no order {}", reply.order_id))
}

/// A text for people, item by item. It is cut to a length with which the order can still be answered and listed: a
/// sender may name any number of items. NUL is left out: a sender's SKU may contain it, and text in Postgres cannot.
fn describe(shortages: &[Shortage]) -> String {
    let mut described = String::new();
    for (line, shortage) in shortages.iter().enumerate() {
        let item = describe_item(shortage);
        if described.len() + item.len() > REJECTION_BYTES_MAX {
            described += &format!("and {} more", shortages.len() - line);
            break;
        }
        described += &item;
        if line + 1 < shortages.len() {
            described += "; ";
        }
    }
    described.replace('\0', "")
}

fn describe_item(shortage: &Shortage) -> String {
    let Shortage { sku, wanted, available, .. } = shortage;
    match shortage.reason() {
        ShortageReason::UnknownSku => format!("{sku}: unknown SKU"),
        ShortageReason::InsufficientStock => format!("{sku}: {wanted} wanted, {available} available"),
        ShortageReason::Unspecified => format!("{sku}: not available"),
    }
}
