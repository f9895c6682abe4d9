//! The part of the audit that compares the orders with loyalty's points.
//!
//! As with inventory, loyalty commits an effect before the relay deletes the row of loyalty's subscription. So what is not
//! in the snapshot of the orders is in the later one of loyalty. Only an order that was cancelled between the two looks
//! wrong, and such orders are read again.

use std::collections::HashMap;

use anyhow::Result;
use chassis::ERASED;
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

use super::{Audit, Order, Ordered, Queue, begin_snapshot, find_lasting, find_missing, read_ordered};

/// Minor units of a currency that earn one point.
const MINOR_PER_POINT: i64 = 100;

/// How the orders are known to loyalty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Points {
    /// Orders whose points count.
    pub awarded: usize,
    /// Orders that were cancelled, and whose points, if they had any, were taken back.
    pub cancelled: usize,
    /// Orders whose first event waits for loyalty, perhaps dead.
    pub on_their_way: usize,
    /// Orders whose first event an operator has discarded.
    pub discarded: usize,
    /// Orders that loyalty need not know, because they are older than its subscription.
    pub earlier: usize,
}

impl Points {
    pub(super) fn line(&self) -> String {
        let Self { awarded, cancelled, on_their_way, discarded, earlier } = self;
        format!(
            "loyalty: {awarded} orders awarded + {cancelled} cancelled + {on_their_way} on their way + {discarded} \
             discarded + {earlier} older than its subscription"
        )
    }
}

/// What loyalty knows of an order.
struct Award {
    /// None if only the order's cancellation was applied.
    customer_id: Option<String>,
    points: i64,
    cancelled: bool,
}

/// Compares the orders with their points.
pub(super) async fn check(
    orders_database: &mut PgConnection,
    loyalty_database: &mut PgConnection,
    ordered: &Ordered,
    audit: &mut Audit,
) -> Result<()> {
    let mut tx = begin_snapshot(loyalty_database).await?;
    check_inbox(&mut tx, audit).await?;
    let awards = read_awards(&mut tx, None).await?;
    tx.commit().await?;

    let mut points = Points::default();
    let mut suspects = Vec::new();
    for (order_id, order) in &ordered.orders {
        let award = awards.get(order_id);
        audit.findings.extend(check_order(*order_id, order, award, &ordered.for_loyalty, &mut points));
        if disagreement(*order_id, order, award, &ordered.for_loyalty).is_some() {
            suspects.push(*order_id);
        }
    }
    audit.points = Some(points);
    let look_again = async |order_ids: &[Uuid]| {
        let ordered = read_ordered(orders_database, Some(order_ids)).await?;
        let mut tx = begin_snapshot(loyalty_database).await?;
        let awards = read_awards(&mut tx, Some(order_ids)).await?;
        tx.commit().await?;
        let disagreements = ordered.orders.iter().filter_map(|(order_id, order)| {
            let disagreement = disagreement(*order_id, order, awards.get(order_id), &ordered.for_loyalty)?;
            Some((*order_id, disagreement))
        });
        Ok(disagreements.collect())
    };
    audit.findings.extend(find_lasting(suspects, look_again).await?);
    let unmatched: Vec<Uuid> =
        awards.keys().filter(|order_id| !ordered.orders.contains_key(order_id)).copied().collect();
    for order_id in find_missing(orders_database, &unmatched).await? {
        audit.findings.push(format!("PHANTOM: order {order_id} has points and was never committed"));
    }
    Ok(())
}

/// Whether the order has earned what it should, or its first event is on its way.
fn check_order(
    order_id: Uuid,
    order: &Order,
    award: Option<&Award>,
    queue: &Queue,
    points: &mut Points,
) -> Option<String> {
    let (waits, discarded) =
        (queue.waiting.creations.contains(&order_id), queue.discarded.creations.contains(&order_id));
    match award {
        Some(Award { customer_id: Some(customer_id), points: earned, cancelled }) => {
            *(if *cancelled { &mut points.cancelled } else { &mut points.awarded }) += 1;
            let is_due = *earned == order.total_minor / MINOR_PER_POINT && may_be_same(customer_id, &order.customer_id);
            return (!is_due).then(|| {
                let (customer, total) = (&order.customer_id, order.total_minor);
                format!(
                    "WRONG: order {order_id} of {customer} over {total} has earned {earned} points for {customer_id}"
                )
            });
        }
        Some(_) if waits || discarded || !order.is_for_loyalty => points.cancelled += 1,
        None if waits => points.on_their_way += 1,
        None if discarded => points.discarded += 1,
        None if !order.is_for_loyalty => points.earlier += 1,
        _ => return Some(format!("LOST: order {order_id} has not reached loyalty and has no event on its way")),
    }
    None
}

/// Whether the two names are of one customer. Each service erases a customer by itself, and what is erased may have been
/// anybody.
fn may_be_same(one: &str, other: &str) -> bool {
    one == other || one == ERASED || other == ERASED
}

/// How the two sides disagree about a cancellation; none if they agree. An order that is older than the subscription may
/// have been cancelled before it.
fn disagreement(order_id: Uuid, order: &Order, award: Option<&Award>, queue: &Queue) -> Option<String> {
    let award = award?;
    let told = queue.waiting.cancellations.contains(&order_id) || queue.discarded.cancellations.contains(&order_id);
    match (order.status.as_str(), award.cancelled) {
        ("CANCELLED", false) if order.is_for_loyalty && !told => Some(format!(
            "DISAGREE: order {order_id} is CANCELLED, and its points still count, with nothing on its way"
        )),
        // An order that an operator has rejected may have been cancelled to undo what was done for it.
        ("CANCELLED" | "REJECTED", _) | (_, false) => None,
        (status, true) => Some(format!("WRONG: order {order_id} is {status}, and its points were taken back")),
    }
}

/// What loyalty knows of all orders, or of those with these ids.
async fn read_awards(tx: &mut Transaction<'_, Postgres>, only: Option<&[Uuid]>) -> Result<HashMap<Uuid, Award>> {
    let rows = sqlx::query!(
        r#"-- audit: points
        SELECT order_id, customer_id, points, cancelled_by IS NOT NULL AS "cancelled!" FROM points
        WHERE $1::uuid[] IS NULL OR order_id = ANY ($1)"#,
        only as Option<&[Uuid]>,
    )
    .fetch_all(&mut **tx)
    .await?;
    let award = |customer_id, points, cancelled| Award { customer_id, points, cancelled };
    Ok(rows.into_iter().map(|row| (row.order_id, award(row.customer_id, row.points, row.cancelled))).collect())
}

/// An effect and its inbox row need each other, for as long as the inbox keeps its rows, as in inventory's database.
async fn check_inbox(tx: &mut Transaction<'_, Postgres>, audit: &mut Audit) -> Result<()> {
    let rows = sqlx::query!(
        r#"-- audit: loyalty's inbox
        WITH effect AS (
            SELECT order_id, event_id, awarded_at AS at FROM points WHERE event_id IS NOT NULL
            UNION ALL
            SELECT order_id, cancelled_by, cancelled_at FROM points WHERE cancelled_by IS NOT NULL
        )
        SELECT order_id AS "order_id?", coalesce(event_id, message_id) AS "event_id!"
        FROM effect FULL JOIN processed_messages ON message_id = event_id
        WHERE event_id IS NULL
            OR message_id IS NULL
                AND (at > (SELECT min(processed_at) FROM processed_messages) OR at > now() - interval '2 hours')"#
    )
    .fetch_all(&mut **tx)
    .await?;
    audit.findings.extend(rows.into_iter().map(|row| match row.order_id {
        Some(order_id) => {
            format!("WRONG: points of order {order_id} come from event {}, which loyalty's inbox lacks", row.event_id)
        }
        None => format!("WRONG: event {} is in loyalty's inbox and has changed no points", row.event_id),
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{ERASED, may_be_same};

    #[test]
    fn an_erased_customer_may_have_been_anybody_and_others_are_who_they_are() {
        assert!(may_be_same("ann", "ann") && may_be_same("ann", ERASED) && may_be_same(ERASED, "ann"));
        assert!(may_be_same(ERASED, ERASED) && !may_be_same("ann", "bob"));
    }
}
