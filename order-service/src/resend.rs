//! What this service has sent, made again from the orders.

use outbox::{Found, NewEvent, Sent, SentEvent, TraceContext};
use proto::orders::v1::{Order, OrderCancelled, OrderCreated};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use uuid::Uuid;

use crate::{cancel_order, create_order, get_order::get_orders, ids::OrderId};

/// Orders that one query looks at.
const PIECE: i64 = 10_000;
/// Bits of `orders.derived_ids`.
const CREATION: i16 = 1;
const CANCELLATION: i16 = 2;

/// The events of orders.
#[derive(Debug)]
pub(crate) struct SentByOrders;

/// When an order was created and cancelled, and which of its events have derived ids.
struct Times {
    order_id: OrderId,
    created_at: OffsetDateTime,
    cancelled_at: Option<OffsetDateTime>,
    is_cancelled: bool,
    derived_ids: i16,
}

impl Sent for SentByOrders {
    /// By the primary key, through all orders: an order of any age may have been cancelled just now. An index for the
    /// cancellations would cost each of them, and this is asked after a disaster.
    ///
    /// A cancellation by an earlier version has no time, so it is found only with its order. It could not be sent again
    /// anyway.
    async fn find(
        &self,
        connection: &mut PgConnection,
        since: OffsetDateTime,
        after: Uuid,
    ) -> Result<Found, sqlx::Error> {
        let found = sqlx::query!(
            r#"-- orders: find orders to resend
            WITH piece AS (
                SELECT order_id, created_at, cancelled_at FROM orders
                WHERE order_id > $1 ORDER BY order_id LIMIT $3
            )
            SELECT ARRAY (
                    SELECT order_id FROM piece WHERE created_at >= $2 OR cancelled_at >= $2 ORDER BY order_id) AS "ids!",
                (SELECT order_id FROM piece ORDER BY order_id DESC LIMIT 1) AS last"#,
            after,
            since,
            PIECE,
        )
        .fetch_one(connection)
        .await?;
        Ok(Found { ids: found.ids, last: found.last })
    }

    async fn read(&self, connection: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<SentEvent>, sqlx::Error> {
        let order_ids: Vec<OrderId> = ids.iter().copied().map(OrderId::from).collect();
        // The times are read after the orders. So an order that is cancelled in between has both events here.
        let orders = get_orders(connection, &order_ids).await?;
        let times = read_times(connection, &order_ids).await?;
        let events = times.into_iter().filter_map(|times| {
            let id = times.order_id.to_string();
            orders.iter().find(|order| order.order_id == id).map(|order| make_again(order, &times))
        });
        Ok(events.flatten().collect())
    }
}

async fn read_times(connection: &mut PgConnection, order_ids: &[OrderId]) -> Result<Vec<Times>, sqlx::Error> {
    sqlx::query_as!(
        Times,
        r#"-- orders: read what was sent
        SELECT order_id AS "order_id: OrderId", created_at, cancelled_at, status = 'CANCELLED' AS "is_cancelled!",
            derived_ids
        FROM orders WHERE order_id = ANY ($1) ORDER BY order_id"#,
        order_ids as &[OrderId],
    )
    .fetch_all(connection)
    .await
}

/// The events that the order has sent, in their sequence. If nobody knows when it was cancelled, the time is that of the
/// order, which is too early, if anything.
fn make_again(order: &Order, times: &Times) -> Vec<SentEvent> {
    let Times { order_id, created_at, cancelled_at, is_cancelled, derived_ids } = *times;
    let trace = TraceContext::default();
    let created = creation_of(order);
    let mut events = vec![SentEvent {
        event: NewEvent::of(order_id, create_order::SEQUENCE, &created, &trace),
        at: created_at,
        has_derived_id: derived_ids & CREATION != 0,
    }];
    if is_cancelled {
        let cancelled = OrderCancelled { order_id: order_id.to_string() };
        events.push(SentEvent {
            event: NewEvent::of(order_id, cancel_order::SEQUENCE, &cancelled, &trace),
            at: cancelled_at.unwrap_or(created_at),
            has_derived_id: derived_ids & CANCELLATION != 0 && cancelled_at.is_some(),
        });
    }
    events
}

/// The first event of the order.
pub(crate) fn creation_of(order: &Order) -> OrderCreated {
    let Order { order_id, customer_id, currency_code, items, total_minor, .. } = order.clone();
    OrderCreated { order_id, customer_id, currency_code, items, total_minor }
}
