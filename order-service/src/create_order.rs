//! Commits orders, each with its event, in one transaction: the outbox pattern's first half.

use std::{collections::HashMap, sync::Arc};

use outbox::{NewEvent, TraceContext};
use proto::orders::v1::{Order, OrderCreated, OrderStatus};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use uuid::Uuid;

use crate::{get_order::get_orders, validate_order::NewOrder};

/// `OrderCreated` is the first event of every order.
const SEQUENCE: i32 = 1;

/// An order that is about to be placed, and the event that tells of it.
#[derive(Debug)]
pub(crate) struct Draft {
    order_id: Uuid,
    request_id: Option<Uuid>,
    created: OrderCreated,
    event: NewEvent,
}

impl Draft {
    pub(crate) fn of(new: NewOrder, trace: &TraceContext) -> Self {
        let order_id = Uuid::now_v7();
        let NewOrder { request_id, customer_id, currency_code, items, total_minor } = new;
        let created = OrderCreated { order_id: order_id.to_string(), customer_id, currency_code, items, total_minor };
        let event = NewEvent::of(order_id, SEQUENCE, &created, trace);
        Self { order_id, request_id, created, event }
    }

    /// The order, once it is placed.
    pub(crate) fn placed_at(self, created_at: OffsetDateTime) -> Order {
        let OrderCreated { order_id, customer_id, currency_code, items, total_minor } = self.created;
        Order {
            order_id,
            customer_id,
            status: OrderStatus::Pending.into(),
            currency_code,
            items,
            total_minor,
            create_time: Some(outbox::timestamp(created_at)),
            rejection: String::new(),
        }
    }

    fn is_of(&self, order: &Order) -> bool {
        let Self { created, .. } = self;
        order.customer_id == created.customer_id
            && order.currency_code == created.currency_code
            && order.items == created.items
    }
}

/// What became of a draft.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The order and its event are committed, created at this time.
    Placed(OffsetDateTime),
    /// An earlier call with the same request id has placed the order, with the same content.
    Found(Order),
    /// An earlier call with the same request id has placed an order with other content.
    RequestIdReused,
    /// The order's own statement failed, or the look for the order that its request id has placed.
    Failed(Arc<sqlx::Error>),
}

/// Places the orders, or finds those their request ids have placed; one outcome per draft, in their order.
///
/// After `Ok` every order that was placed or found is durable, and its event. After an error they may be, if it struck at
/// the commit: the callers repeat their calls with the same request ids and learn it.
pub(crate) async fn create_orders(
    connection: &mut PgConnection,
    drafts: &[Draft],
) -> Result<Vec<Outcome>, sqlx::Error> {
    let placed = insert_orders(connection, drafts).await?;
    let repeated = drafts.iter().filter(|draft| !placed.contains_key(&draft.order_id));
    let found = find_placed(connection, repeated).await.map_err(Arc::new);
    let outcome = |draft: &Draft| match (placed.get(&draft.order_id), &found) {
        (Some(created_at), _) => Outcome::Placed(*created_at),
        (None, Ok(found)) => match draft.request_id.and_then(|request_id| found.get(&request_id)) {
            Some(order) if draft.is_of(order) => Outcome::Found(order.clone()),
            Some(_) => Outcome::RequestIdReused,
            None => Outcome::Failed(Arc::new(sqlx::Error::RowNotFound)),
        },
        (None, Err(cause)) => Outcome::Failed(cause.clone()),
    };
    Ok(drafts.iter().map(outcome).collect())
}

/// One statement, and so one transaction, one round trip and one wait for the disk, for any number of orders: each with
/// its items and its event, or not at all. Returns when the orders were created, leaving out those whose request id has
/// placed one before: of these nothing is written. The unique key decides it. An order with the same id that another
/// transaction is placing is waited for; one that comes earlier in this statement counts as well.
///
/// Orders go in by request id, so that two statements which share several ids wait one for the other, not each for the
/// other.
///
/// All rows are fetched, to the end: only there the server says whether the commit succeeded.
async fn insert_orders(
    connection: &mut PgConnection,
    drafts: &[Draft],
) -> Result<HashMap<Uuid, OffsetDateTime>, sqlx::Error> {
    let orders = OrderRows::of(drafts);
    let items = ItemRows::of(drafts);
    let events = outbox::Rows::of(drafts.iter().map(|draft| &draft.event));
    let placed = sqlx::query!(
        "-- orders: create orders
        WITH placed AS (
            INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
            SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::bigint[])
                AS new (order_id, request_id, customer_id, currency_code, total_minor)
            ORDER BY request_id
            ON CONFLICT ON CONSTRAINT orders_request_id_key DO NOTHING
            RETURNING order_id, created_at
        ), items AS (
            INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
            SELECT item.*
            FROM unnest($6::uuid[], $7::integer[], $8::text[], $9::integer[], $10::bigint[])
                AS item (order_id, line, sku, quantity, unit_price_minor)
            JOIN placed USING (order_id)
        ), events AS (
            INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
            SELECT event.*
            FROM unnest($11::uuid[], $12::integer[], $13::uuid[], $14::text[], $15::bytea[], $16::text[], $17::text[])
                AS event (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
            JOIN placed ON placed.order_id = event.aggregate_id
        )
        SELECT order_id, created_at FROM placed",
        &orders.order_ids,
        &orders.request_ids as &[Option<Uuid>],
        &orders.customer_ids as &[&str],
        &orders.currency_codes as &[&str],
        &orders.totals_minor,
        &items.order_ids,
        &items.lines,
        &items.skus as &[&str],
        &items.quantities,
        &items.unit_prices_minor,
        &events.aggregate_ids,
        &events.sequences,
        &events.event_ids,
        &events.event_types as &[&str],
        &events.payloads as &[&[u8]],
        &events.traceparents as &[Option<&str>],
        &events.tracestates as &[Option<&str>],
    )
    .fetch_all(connection)
    .await?;
    Ok(placed.into_iter().map(|row| (row.order_id, row.created_at)).collect())
}

/// Orders as the arrays the statement takes.
#[derive(Default)]
struct OrderRows<'d> {
    order_ids: Vec<Uuid>,
    request_ids: Vec<Option<Uuid>>,
    customer_ids: Vec<&'d str>,
    currency_codes: Vec<&'d str>,
    totals_minor: Vec<i64>,
}

impl<'d> OrderRows<'d> {
    fn of(drafts: &'d [Draft]) -> Self {
        let mut rows = Self::default();
        for Draft { order_id, request_id, created, .. } in drafts {
            rows.order_ids.push(*order_id);
            rows.request_ids.push(*request_id);
            rows.customer_ids.push(&created.customer_id);
            rows.currency_codes.push(&created.currency_code);
            rows.totals_minor.push(created.total_minor);
        }
        rows
    }
}

/// Their items, likewise.
#[derive(Default)]
struct ItemRows<'d> {
    order_ids: Vec<Uuid>,
    lines: Vec<i32>,
    skus: Vec<&'d str>,
    quantities: Vec<i32>,
    unit_prices_minor: Vec<i64>,
}

impl<'d> ItemRows<'d> {
    fn of(drafts: &'d [Draft]) -> Self {
        let mut rows = Self::default();
        for Draft { order_id, created, .. } in drafts {
            for (item, line) in created.items.iter().zip(1..) {
                rows.order_ids.push(*order_id);
                rows.lines.push(line);
                rows.skus.push(&item.sku);
                rows.quantities.push(item.quantity);
                rows.unit_prices_minor.push(item.unit_price_minor);
            }
        }
        rows
    }
}

/// The orders that the drafts' request ids have placed, by request id. They are committed: the insert waited for them.
async fn find_placed(
    connection: &mut PgConnection,
    drafts: impl Iterator<Item = &Draft>,
) -> Result<HashMap<Uuid, Order>, sqlx::Error> {
    let request_ids: Vec<Uuid> = drafts.filter_map(|draft| draft.request_id).collect();
    if request_ids.is_empty() {
        return Ok(HashMap::new());
    }
    let placed = sqlx::query!(
        r#"-- orders: find by request id
        SELECT request_id AS "request_id!", order_id FROM orders WHERE request_id = ANY ($1)"#,
        &request_ids,
    )
    .fetch_all(&mut *connection)
    .await?;
    let order_ids: Vec<Uuid> = placed.iter().map(|row| row.order_id).collect();
    let orders = get_orders(connection, &order_ids).await?;
    let by_id: HashMap<String, Order> = orders.into_iter().map(|order| (order.order_id.clone(), order)).collect();
    let found =
        placed.into_iter().filter_map(|row| Some((row.request_id, by_id.get(&row.order_id.to_string())?.clone())));
    Ok(found.collect())
}
