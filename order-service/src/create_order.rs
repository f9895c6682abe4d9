//! Commits orders, each with its event, in one transaction: the first half of the outbox pattern.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use chassis::trace::Trace;
use outbox::{AggregateId, EventId, NewEvent, TraceContext};
use proto::orders::v1::{Order, OrderCreated, OrderStatus};
use sqlx::{PgConnection, types::time::OffsetDateTime};

use crate::{
    get_order::get_orders,
    ids::{OrderId, RequestId},
    validate_order::NewOrder,
};

/// `OrderCreated` is the first event of every order.
pub(crate) const SEQUENCE: i32 = 1;

/// Why an order was not placed.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum CreateOrderError {
    #[error(
        "the request_id has placed an order already, with other content or of a customer who was erased since; use a new \
         request_id only for another order"
    )]
    RequestIdReused,
    #[error("too many orders are waiting to be placed; try again")]
    Overloaded,
    #[error("customer {0} has too many orders that wait to be placed; try again")]
    OverShare(String),
    #[error("the database waits for its synchronous standby, and so would the order; try again")]
    StandbyAway,
    /// Logged already; shared by all calls of the transaction that failed.
    #[error(transparent)]
    Database(Arc<sqlx::Error>),
}

impl CreateOrderError {
    /// Logs the cause, once for all the orders that it concerns, and in an outage less often.
    pub(crate) fn of_database(cause: impl Into<Arc<sqlx::Error>>) -> Self {
        let cause = cause.into();
        chassis::log_failure(&cause, "orders not placed");
        Self::Database(cause)
    }
}

/// An order that is about to be placed, and the event that announces it.
#[derive(Debug)]
pub(crate) struct Draft {
    order_id: OrderId,
    request_id: Option<RequestId>,
    created: OrderCreated,
    event: NewEvent,
}

impl Draft {
    pub(crate) fn of(new: NewOrder, trace: &TraceContext) -> Self {
        let order_id = OrderId::new();
        let NewOrder { request_id, customer_id, currency_code, items, total_minor } = new;
        let created = OrderCreated { order_id: order_id.to_string(), customer_id, currency_code, items, total_minor };
        let event = NewEvent::of(order_id, SEQUENCE, &created, trace);
        Self { order_id, request_id, created, event }
    }

    pub(crate) fn customer_id(&self) -> &str {
        &self.created.customer_id
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

    /// The call that it is of.
    pub(crate) fn trace(&self) -> Option<Trace> {
        self.event.trace().trace()
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
    /// An earlier call with the same request id placed the order, with the same content.
    Found(Order),
    /// An earlier call with the same request id placed an order with different content.
    RequestIdReused,
    /// The order's own statement failed, or the query for the order that its request id has placed.
    Failed(Arc<sqlx::Error>),
}

/// Places the orders, or finds the orders that their request ids have placed. Returns one outcome per draft, in their
/// order.
///
/// After `Ok` every placed or found order is durable, and so is its event. After an error they may be durable too: a
/// commit can succeed although its answer is lost or late. The callers find out when they repeat their calls with the
/// same request ids.
pub(crate) async fn create_orders(
    connection: &mut PgConnection,
    drafts: &[Draft],
) -> Result<Vec<Outcome>, sqlx::Error> {
    let placed = place_new(connection, drafts).await?;
    let repeated = drafts.iter().filter(|draft| !placed.contains_key(&draft.order_id));
    let found = match find_placed(connection, repeated).await {
        Ok(found) => Ok(found),
        // As the error of the work it also decides what becomes of the session.
        Err(cause) if placed.is_empty() => return Err(cause),
        Err(cause) => Err(Arc::new(cause)),
    };
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

/// Places the drafts whose request id has placed no order yet, the first draft of each id. Returns when the orders were
/// created.
///
/// Terminates: a retry means another transaction committed one of these orders, and the next query sees it. (If query
/// and key contradict each other, as with a damaged index, the time limit of the unit of work ends the retries.)
async fn place_new(
    connection: &mut PgConnection,
    drafts: &[Draft],
) -> Result<HashMap<OrderId, OffsetDateTime>, sqlx::Error> {
    let mut new = first_of_each_request(drafts);
    while !new.is_empty() {
        match insert_orders(connection, &new).await {
            Ok(Inserted { created_at, repeated }) if repeated.is_empty() => {
                return Ok(new.into_iter().map(|draft| (draft.order_id, created_at)).collect());
            }
            Ok(Inserted { repeated, .. }) => {
                new.retain(|draft| draft.request_id.is_none_or(|request_id| !repeated.contains(&request_id)));
            }
            // Another transaction placed it after the query: the next query will see it.
            Err(sqlx::Error::Database(error)) if error.constraint() == Some("orders_request_id_key") => {}
            Err(error) => return Err(error),
        }
    }
    Ok(HashMap::new())
}

fn first_of_each_request(drafts: &[Draft]) -> Vec<&Draft> {
    let mut seen = HashSet::new();
    drafts.iter().filter(|draft| draft.request_id.is_none_or(|request_id| seen.insert(request_id))).collect()
}

/// When the orders were created, and the request ids that have placed an order before. If there are such ids, nothing
/// was written.
struct Inserted {
    created_at: OffsetDateTime,
    repeated: Vec<RequestId>,
}

/// Inserts all of the orders, each with its items and its event, or none of them. One statement is one transaction, one
/// round trip and one wait for the disk.
///
/// The statement looks for repeated request ids first. Many calls are repeated just when the service is overloaded, and
/// failed groups would add to the load. But the unique key decides. The statement waits for another transaction that
/// places an order with the same id, and fails if that one commits. (`ON CONFLICT` would decide row by row in one step.
/// Items and events would then have to be joined with the orders that it let through, which costs more.)
///
/// All three parts ask the same question of one snapshot, so no order lacks its items or its event. The last subquery
/// calls `outbox_enqueue`: a part of `WITH` that inserts nothing itself runs only if something reads it. `now()` is the
/// start of the transaction, and the default of `orders.created_at`.
///
/// Orders are inserted by request id. Two statements that share several ids therefore cannot deadlock: one of them
/// waits at the first id that they share.
///
/// All rows are fetched, to the end. Before that, the server does not say whether the commit succeeded.
async fn insert_orders(connection: &mut PgConnection, drafts: &[&Draft]) -> Result<Inserted, sqlx::Error> {
    let orders = OrderRows::of(drafts);
    let items = ItemRows::of(drafts);
    let events = outbox::Rows::of(drafts.iter().map(|draft| &draft.event));
    let inserted = sqlx::query!(
        r#"-- orders: create orders
        WITH repeated AS MATERIALIZED (
            SELECT request_id FROM orders WHERE request_id = ANY ($2)
        ), placed AS (
            INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor, derived_ids)
            SELECT unnest($1::uuid[]), unnest($2::uuid[]) AS request_id, unnest($3::text[]), unnest($4::text[]),
                unnest($5::bigint[]), 1
            WHERE NOT EXISTS (SELECT FROM repeated)
            ORDER BY request_id
        ), items AS (
            INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
            SELECT unnest($6::uuid[]), unnest($7::integer[]), unnest($8::text[]), unnest($9::integer[]),
                unnest($10::bigint[])
            WHERE NOT EXISTS (SELECT FROM repeated)
        ), events AS (
            SELECT outbox_enqueue($11, $12, $13, $14, $15, $16, $17) WHERE NOT EXISTS (SELECT FROM repeated)
        )
        SELECT now() AS "created_at!", ARRAY (SELECT request_id FROM repeated) AS "repeated!: Vec<RequestId>",
            (SELECT count(*) FROM events) AS "enqueued!""#,
        &orders.order_ids as &[OrderId],
        &orders.request_ids as &[Option<RequestId>],
        &orders.customer_ids as &[&str],
        &orders.currency_codes as &[&str],
        &orders.totals_minor,
        &items.order_ids as &[ItemOrderId],
        &items.lines,
        &items.skus as &[&str],
        &items.quantities,
        &items.unit_prices_minor,
        &events.aggregate_ids as &[AggregateId],
        &events.sequences,
        &events.event_ids as &[EventId],
        &events.event_types as &[&str],
        &events.payloads as &[&[u8]],
        &events.traceparents as &[Option<&str>],
        &events.tracestates as &[Option<&str>],
    )
    .fetch_all(connection)
    .await?;
    let inserted = inserted.into_iter().next().ok_or(sqlx::Error::RowNotFound)?;
    Ok(Inserted { created_at: inserted.created_at, repeated: inserted.repeated })
}

/// Orders as the arrays that the statement takes.
#[derive(Default)]
struct OrderRows<'d> {
    order_ids: Vec<OrderId>,
    request_ids: Vec<Option<RequestId>>,
    customer_ids: Vec<&'d str>,
    currency_codes: Vec<&'d str>,
    totals_minor: Vec<i64>,
}

impl<'d> OrderRows<'d> {
    fn of(drafts: &[&'d Draft]) -> Self {
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

outbox::id! {
    /// The order of an item. A type of its own, so that the statement's two arrays of order ids cannot be swapped.
    struct ItemOrderId
}

/// Their items, likewise.
#[derive(Default)]
struct ItemRows<'d> {
    order_ids: Vec<ItemOrderId>,
    lines: Vec<i32>,
    skus: Vec<&'d str>,
    quantities: Vec<i32>,
    unit_prices_minor: Vec<i64>,
}

impl<'d> ItemRows<'d> {
    fn of(drafts: &[&'d Draft]) -> Self {
        let mut rows = Self::default();
        for Draft { order_id, created, .. } in drafts {
            for (item, line) in created.items.iter().zip(1..) {
                rows.order_ids.push(order_id.uuid().into());
                rows.lines.push(line);
                rows.skus.push(&item.sku);
                rows.quantities.push(item.quantity);
                rows.unit_prices_minor.push(item.unit_price_minor);
            }
        }
        rows
    }
}

/// The orders that the drafts' request ids have placed, by request id. They are committed: a query has seen them, or
/// this group has just placed them.
async fn find_placed(
    connection: &mut PgConnection,
    drafts: impl Iterator<Item = &Draft>,
) -> Result<HashMap<RequestId, Order>, sqlx::Error> {
    let request_ids: Vec<RequestId> = drafts.filter_map(|draft| draft.request_id).collect();
    if request_ids.is_empty() {
        return Ok(HashMap::new());
    }
    let placed = sqlx::query!(
        r#"-- orders: find by request id
        SELECT request_id AS "request_id!: RequestId", order_id AS "order_id: OrderId"
        FROM orders WHERE request_id = ANY ($1)"#,
        &request_ids as &[RequestId],
    )
    .fetch_all(&mut *connection)
    .await?;
    if placed.is_empty() {
        return Ok(HashMap::new());
    }
    let order_ids: Vec<OrderId> = placed.iter().map(|row| row.order_id).collect();
    let orders = get_orders(connection, &order_ids).await?;
    chassis::confirm_seen(connection).await?;
    let by_id: HashMap<String, Order> = orders.into_iter().map(|order| (order.order_id.clone(), order)).collect();
    let found =
        placed.into_iter().filter_map(|row| Some((row.request_id, by_id.get(&row.order_id.to_string())?.clone())));
    Ok(found.collect())
}
