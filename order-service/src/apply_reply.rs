//! Applies inventory's answers to the orders they are about.

use std::collections::{HashMap, HashSet};

use outbox::{ApplyError, Envelope, Handler, Notifier, Refusal};
use proto::inventory::v1::{Shortage, ShortageReason, StockRejected, StockReleased, StockReserved};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

/// An answer of inventory.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    event_id: Uuid,
    order_id: Uuid,
    /// What the order becomes, if it still is PENDING.
    becomes: Option<Settled>,
}

/// How an order is settled by inventory.
#[derive(Clone, Debug)]
enum Settled {
    Confirmed,
    /// With why, item by item.
    Rejected(String),
}

/// Applies replies in batches, with one statement.
#[derive(Debug)]
pub(crate) struct OrderKeeper {
    /// Tells the processes in which an order is watched.
    pub(crate) watchers: Notifier,
}

impl Handler for OrderKeeper {
    type Event = Reply;

    fn read(&self, envelope: &Envelope<'_>) -> Result<Reply, Refusal> {
        let (order_id, becomes) = if envelope.carries::<StockReserved>() {
            (envelope.decode::<StockReserved>()?.order_id, Some(Settled::Confirmed))
        } else if envelope.carries::<StockRejected>() {
            let StockRejected { order_id, shortages } = envelope.decode()?;
            (order_id, Some(Settled::Rejected(describe(&shortages))))
        } else if envelope.carries::<StockReleased>() {
            // The order was CANCELLED before it was told to inventory: there is nothing left to change.
            (envelope.decode::<StockReleased>()?.order_id, None)
        } else {
            return Err(Refusal::unknown_type(envelope));
        };
        if Uuid::try_parse(&order_id) != Ok(envelope.subject) {
            return Err(Refusal::reject("INVALID_REPLY", "order_id is not the subject of the event"));
        }
        Ok(Reply { event_id: envelope.id, order_id: envelope.subject, becomes })
    }

    /// Only a PENDING order is settled. One that was cancelled while the answer was under way stays CANCELLED, and its
    /// cancellation, which inventory has yet to see or has just seen, brings the stock back.
    ///
    /// Batches wait for nobody in a circle: no two that run at once are about the same order, since its events come one
    /// after the other, and a cancellation locks one order only.
    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, replies: &[&Reply]) -> Result<(), ApplyError> {
        let order_ids: Vec<Uuid> = replies.iter().map(|reply| reply.order_id).collect();
        // The first of each order: an UPDATE that finds two rows to join takes any of them.
        let mut seen = HashSet::new();
        let settled: Vec<(Uuid, &Settled)> = replies
            .iter()
            .filter_map(|reply| reply.becomes.as_ref().map(|becomes| (reply.order_id, becomes)))
            .filter(|(order_id, _)| seen.insert(*order_id))
            .collect();
        let settled_ids: Vec<Uuid> = settled.iter().map(|(order_id, _)| *order_id).collect();
        let statuses: Vec<String> = settled.iter().map(|(_, becomes)| name(becomes)).collect();
        let rejections: Vec<Option<String>> = settled.iter().map(|(_, becomes)| why(becomes)).collect();
        let unknown = sqlx::query_scalar!(
            r#"-- orders: apply replies
            WITH settled AS (
                UPDATE orders SET status = reply.status, rejection = reply.rejection
                FROM unnest($2::uuid[], $3::text[], $4::text[]) AS reply (order_id, status, rejection)
                WHERE orders.order_id = reply.order_id AND orders.status = 'PENDING'
            )
            SELECT order_id AS "order_id!" FROM unnest($1::uuid[]) AS reply (order_id)
            -- Looked up one by one; NOT EXISTS may be made a join with all orders.
            WHERE (SELECT true FROM orders WHERE orders.order_id = reply.order_id) IS NULL"#,
            &order_ids,
            &settled_ids,
            &statuses,
            &rejections as &[Option<String>],
        )
        .fetch_all(&mut **tx)
        .await?;
        let of_unknown = replies.iter().filter(|reply| unknown.contains(&reply.order_id));
        let refusals: HashMap<Uuid, Refusal> = of_unknown.map(|reply| (reply.event_id, unknown_order(reply))).collect();
        if refusals.is_empty() { Ok(()) } else { Err(ApplyError::Refused(refusals)) }
    }

    fn committed(&self) {
        self.watchers.notify();
    }
}

fn unknown_order(reply: &Reply) -> Refusal {
    Refusal::reject("UNKNOWN_ORDER", format!("there is no order {}", reply.order_id))
}

/// The names are those of the constraint `orders_status_known`.
fn name(becomes: &Settled) -> String {
    match becomes {
        Settled::Confirmed => "CONFIRMED".into(),
        Settled::Rejected(_) => "REJECTED".into(),
    }
}

fn why(becomes: &Settled) -> Option<String> {
    match becomes {
        Settled::Confirmed => None,
        Settled::Rejected(why) => Some(why.clone()),
    }
}

/// For people, item by item. Postgres has no NUL in text, and a SKU of inventory's might.
fn describe(shortages: &[Shortage]) -> String {
    let lines = shortages.iter().map(|shortage| {
        let Shortage { sku, wanted, available, .. } = shortage;
        match shortage.reason() {
            ShortageReason::UnknownSku => format!("{sku}: not a SKU that inventory knows"),
            ShortageReason::InsufficientStock => format!("{sku}: {wanted} wanted, {available} available"),
            ShortageReason::Unspecified => format!("{sku}: not available"),
        }
    });
    lines.collect::<Vec<_>>().join("; ").replace('\0', "")
}
