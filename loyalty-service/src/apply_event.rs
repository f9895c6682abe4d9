//! Applies events of orders: a creation awards points, and a cancellation takes them back.

use std::collections::BTreeMap;

use chassis::{ERASED, Fields};
use outbox::{ApplyError, Envelope, EventId, Handler, Refusal};
use prost::Name;
use proto::orders::v1::{OrderCancelled, OrderCreated};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

/// Minor units of a currency that earn one point.
const MINOR_PER_POINT: i64 = 100;

outbox::id! {
    /// Names an order.
    pub(crate) struct OrderId
}

outbox::id! {
    /// Names the event that cancelled an order.
    pub(crate) struct CancellationId
}

/// An event of an order.
#[derive(Clone, Debug)]
pub(crate) struct OrderEvent {
    order_id: OrderId,
    change: Change,
}

/// What happened to the order.
#[derive(Clone, Debug)]
enum Change {
    Created(Award),
    Cancelled(CancellationId),
}

/// What a new order earns.
#[derive(Clone, Debug, PartialEq)]
struct Award {
    event_id: EventId,
    customer_id: String,
    points: i64,
}

/// What is known of an order: a row of `points`.
#[derive(Debug, Default, PartialEq)]
struct Known<'e> {
    award: Option<&'e Award>,
    cancelled_by: Option<CancellationId>,
}

/// Awards points for orders.
#[derive(Debug)]
pub(crate) struct AwardPoints;

impl Handler for AwardPoints {
    type Event = OrderEvent;

    fn read(&self, envelope: &Envelope<'_>) -> Result<OrderEvent, Refusal> {
        let (order_id, change) = if envelope.carries::<OrderCreated>() {
            let created: OrderCreated = envelope.decode()?;
            (created.order_id.clone(), Change::Created(read_award(envelope.id, created)?))
        } else {
            (envelope.decode::<OrderCancelled>()?.order_id, Change::Cancelled(envelope.id.uuid().into()))
        };
        let subject = envelope.subject.uuid();
        if Uuid::try_parse(&order_id) != Ok(subject) {
            return Err(Refusal::reject("INVALID_ORDER", "order_id is not the subject of the event"));
        }
        Ok(OrderEvent { order_id: subject.into(), change })
    }

    async fn apply(&self, tx: &mut Transaction<'_, Postgres>, events: &[&OrderEvent]) -> Result<(), ApplyError> {
        Ok(write(tx, &decide(events)).await?)
    }

    fn types(&self) -> Vec<String> {
        vec![OrderCreated::full_name(), OrderCancelled::full_name()]
    }
}

/// The customer is checked as in a request. PostgreSQL has no NUL in text, and an index takes no long one, so such a
/// customer would fail the whole batch.
///
/// An event that is restored or sent again after its customer was erased is applied nevertheless. The order has then reached
/// loyalty, as the audit demands, and its points count for nobody.
fn read_award(event_id: EventId, order: OrderCreated) -> Result<Award, Refusal> {
    let mut fields = Fields::default();
    if order.customer_id != ERASED {
        fields.name("customer_id", &order.customer_id);
    }
    fields.number("total_minor", order.total_minor, 0..=i64::MAX);
    let points = order.total_minor / MINOR_PER_POINT;
    fields.finish(Award { event_id, customer_id: order.customer_id, points }).map_err(|bad| {
        let bad: Vec<String> = bad.iter().map(|bad| format!("{} {}", bad.field, bad.description)).collect();
        Refusal::reject("INVALID_ORDER", bad.join("; "))
    })
}

/// Decides what a batch says of each order. A statement cannot change a row twice, and a batch may hold both events of
/// an order. The first event of each kind counts, and an order that is already cancelled earns nothing.
fn decide<'e>(events: &[&'e OrderEvent]) -> BTreeMap<OrderId, Known<'e>> {
    let mut orders = BTreeMap::new();
    for event in events {
        match &event.change {
            Change::Created(award) => {
                orders.entry(event.order_id).or_insert(Known { award: Some(award), cancelled_by: None });
            }
            Change::Cancelled(id) => {
                orders.entry(event.order_id).or_default().cancelled_by.get_or_insert(*id);
            }
        }
    }
    orders
}

/// Writes what a batch says of each order. A row keeps what an earlier batch has written: of an order that is already
/// cancelled, a late creation changes nothing.
///
/// Rows are written in the order of their ids. So of two batches with the same orders, only one waits for the other.
async fn write(tx: &mut Transaction<'_, Postgres>, orders: &BTreeMap<OrderId, Known<'_>>) -> Result<(), sqlx::Error> {
    let rows = orders.iter().map(|(order_id, Known { award, cancelled_by })| {
        let (customer_id, event_id) = award.map(|award| (award.customer_id.as_str(), award.event_id)).unzip();
        (*order_id, customer_id, award.map_or(0, |award| award.points), event_id, *cancelled_by)
    });
    let (order_ids, customer_ids, points, event_ids, cancelled_by): (Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>) =
        rows.collect();
    sqlx::query!(
        "-- loyalty: award and take back points
        INSERT INTO points (order_id, customer_id, points, event_id, awarded_at, cancelled_by, cancelled_at)
        SELECT order_id, customer_id, points, event_id, CASE WHEN event_id IS NOT NULL THEN now() END,
            cancelled_by, CASE WHEN cancelled_by IS NOT NULL THEN now() END
        FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::uuid[], $5::uuid[])
            AS new (order_id, customer_id, points, event_id, cancelled_by)
        ORDER BY order_id
        ON CONFLICT (order_id) DO UPDATE SET cancelled_by = excluded.cancelled_by, cancelled_at = excluded.cancelled_at
        WHERE points.cancelled_by IS NULL AND excluded.cancelled_by IS NOT NULL",
        &order_ids as &[OrderId],
        &customer_ids as &[Option<&str>],
        &points,
        &event_ids as &[Option<EventId>],
        &cancelled_by as &[Option<CancellationId>],
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created(order_id: OrderId, points: i64) -> OrderEvent {
        let award = Award { event_id: EventId::new(), customer_id: "ann".into(), points };
        OrderEvent { order_id, change: Change::Created(award) }
    }

    fn cancelled(order_id: OrderId) -> OrderEvent {
        OrderEvent { order_id, change: Change::Cancelled(CancellationId::new()) }
    }

    /// The points that one order earns by these events, and the place of the event that cancelled it.
    fn decide_one(events: &[&OrderEvent]) -> (Option<i64>, Option<usize>) {
        let orders = decide(events);
        assert_eq!(orders.len(), 1);
        let known = &orders[&events[0].order_id];
        let cancels = |event: &&OrderEvent| match event.change {
            Change::Cancelled(id) => known.cancelled_by == Some(id),
            Change::Created(_) => false,
        };
        (known.award.map(|award| award.points), events.iter().position(cancels))
    }

    #[test]
    fn each_order_of_a_batch_is_decided_once_by_its_first_events() {
        let order_id = OrderId::new();
        let (award, other) = (created(order_id, 7), created(order_id, 9));
        let (cancellation, later) = (cancelled(order_id), cancelled(order_id));
        assert_eq!(decide_one(&[&award]), (Some(7), None));
        assert_eq!(decide_one(&[&award, &cancellation]), (Some(7), Some(1)));
        assert_eq!(decide_one(&[&award, &other]), (Some(7), None), "an order earns once");
        assert_eq!(decide_one(&[&cancellation, &award]), (None, Some(0)), "a cancelled order earns nothing");
        assert_eq!(decide_one(&[&award, &cancellation, &later]), (Some(7), Some(1)));
    }

    #[test]
    fn orders_do_not_touch_each_other() {
        let (first, second) = (OrderId::new(), OrderId::new());
        let events = [created(first, 1), cancelled(second), created(second, 2)];
        let orders = decide(&events.each_ref());
        assert_eq!(orders.len(), 2);
        assert_eq!((orders[&first].award.map(|award| award.points), orders[&first].cancelled_by), (Some(1), None));
        assert_eq!(orders[&second].award, None);
        assert!(orders[&second].cancelled_by.is_some());
    }
}
