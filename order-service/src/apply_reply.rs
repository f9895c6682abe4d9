//! Applies inventory's answers to the orders they are about.

use std::collections::{HashMap, HashSet};

use outbox::{ApplyError, Envelope, Handler, Notifier, Refusal};
use proto::inventory::v1::{Shortage, ShortageReason, StockRejected, StockReleased, StockReserved};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

/// More than the hundred items take that an order has at most: under 12 kB.
const REJECTION_BYTES_MAX: usize = 16 * 1024;

/// An answer of inventory.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    event_id: Uuid,
    order_id: Uuid,
    answer: Answer,
}

/// What the answer says of the order.
#[derive(Clone, Debug)]
enum Answer {
    Reserved,
    /// With why, item by item.
    Rejected(String),
    /// It was CANCELLED before it was told to inventory: there is nothing left to change.
    Released,
}

/// What becomes of the orders that still are PENDING, as the arrays the statement takes.
#[derive(Debug, Default)]
struct Settled<'r> {
    confirmed: Vec<Uuid>,
    rejected: Vec<Uuid>,
    rejections: Vec<&'r str>,
}

impl<'r> Settled<'r> {
    /// By the first answer of each order: a statement changes a row once.
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

/// Applies replies in batches, with one statement.
#[derive(Debug)]
pub(crate) struct OrderKeeper {
    /// Tells the processes in which an order is watched.
    pub(crate) watchers: Notifier,
}

impl Handler for OrderKeeper {
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
        if Uuid::try_parse(&order_id) != Ok(envelope.subject) {
            return Err(Refusal::reject("INVALID_REPLY", "order_id is not the subject of the event"));
        }
        Ok(Reply { event_id: envelope.id, order_id: envelope.subject, answer })
    }

    /// Only a PENDING order is settled. One that was cancelled while the answer was under way stays CANCELLED, and its
    /// cancellation, which inventory has yet to see or has just seen, brings the stock back.
    ///
    /// Batches wait for nobody in a circle: no two that run at once are about the same order, since its events come one
    /// after the other, and a cancellation locks one order only.
    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, replies: &[&Reply]) -> Result<(), ApplyError> {
        let order_ids: Vec<Uuid> = replies.iter().map(|reply| reply.order_id).collect();
        let Settled { confirmed, rejected, rejections } = Settled::of(replies);
        // Each order is looked up by its id, in a subquery that cannot become a join: sessions keep their plans, and a join
        // that was right for a few orders reads all of them when there are many. `status` stands outside, where it is asked
        // again of an order that was cancelled meanwhile.
        let unknown = sqlx::query_scalar!(
            r#"-- orders: apply replies
            WITH confirmed AS (
                UPDATE orders SET status = 'CONFIRMED'
                WHERE status = 'PENDING' AND ctid = ANY (ARRAY (
                    SELECT (SELECT found.ctid FROM orders AS found WHERE found.order_id = reply.order_id)
                    FROM unnest($2::uuid[]) AS reply (order_id)))
            ), rejected AS (
                UPDATE orders SET status = 'REJECTED', rejection = ($4::text[])[array_position($3, order_id)]
                WHERE status = 'PENDING' AND ctid = ANY (ARRAY (
                    SELECT (SELECT found.ctid FROM orders AS found WHERE found.order_id = reply.order_id)
                    FROM unnest($3::uuid[]) AS reply (order_id)))
            )
            SELECT order_id AS "order_id!" FROM unnest($1::uuid[]) AS reply (order_id)
            WHERE (SELECT true FROM orders WHERE orders.order_id = reply.order_id) IS NULL"#,
            &order_ids,
            &confirmed,
            &rejected,
            &rejections as &[&str],
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

/// For people, item by item, for as many items as it stays short enough for the order to be answered and listed: whoever
/// sends events may name any number of them. Postgres has no NUL in text, and a SKU of inventory's might.
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
        ShortageReason::UnknownSku => format!("{sku}: not a SKU that inventory knows"),
        ShortageReason::InsufficientStock => format!("{sku}: {wanted} wanted, {available} available"),
        ShortageReason::Unspecified => format!("{sku}: not available"),
    }
}
