//! Commits orders, each with its event, in one transaction: the outbox pattern's first half.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use outbox::{NewEvent, TraceContext};
use proto::orders::v1::{Order, OrderCreated, OrderStatus};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use tracing::error;
use uuid::Uuid;

use crate::{get_order::get_orders, validate_order::NewOrder};

/// `OrderCreated` is the first event of every order.
const SEQUENCE: i32 = 1;

/// Why an order was not placed.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum CreateOrderError {
    #[error("the request_id was used for an order with different content; use a new request_id for a new order")]
    RequestIdReused,
    #[error("too many orders are waiting to be placed; try again")]
    Overloaded,
    /// Logged already; shared by all calls of the transaction that failed.
    #[error(transparent)]
    Database(Arc<sqlx::Error>),
}

impl CreateOrderError {
    /// Logs the cause, once for all the orders that it concerns.
    pub(crate) fn of_database(cause: impl Into<Arc<sqlx::Error>>, orders: usize) -> Self {
        let cause = cause.into();
        error!(%cause, orders, "orders not placed");
        Self::Database(cause)
    }
}

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
/// the commit or the time was up: the callers repeat their calls with the same request ids and learn it.
pub(crate) async fn create_orders(
    connection: &mut PgConnection,
    drafts: &[Draft],
) -> Result<Vec<Outcome>, sqlx::Error> {
    let placed = place_new(connection, drafts).await?;
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

/// Places those whose request id has placed no order yet, the first of each. Returns when they were created.
///
/// It ends: whoever has placed an order meanwhile has committed it, so the next look finds it, and there are only so many. (Did
/// look and key contradict each other, as with a damaged index, it would end with the time that a unit of work may take.)
async fn place_new(
    connection: &mut PgConnection,
    drafts: &[Draft],
) -> Result<HashMap<Uuid, OffsetDateTime>, sqlx::Error> {
    let mut new = first_of_each_request(drafts);
    while !new.is_empty() {
        match insert_orders(connection, &new).await {
            Ok(Inserted { created_at, repeated }) if repeated.is_empty() => {
                return Ok(new.into_iter().map(|draft| (draft.order_id, created_at)).collect());
            }
            Ok(Inserted { repeated, .. }) => {
                new.retain(|draft| draft.request_id.is_none_or(|request_id| !repeated.contains(&request_id)));
            }
            // Between the look and the insert another transaction has placed it: now it will be seen.
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

/// When the orders were created, unless there are request ids that have placed one before: then nothing is written.
struct Inserted {
    created_at: OffsetDateTime,
    repeated: Vec<Uuid>,
}

/// One statement, and so one transaction, one round trip and one wait for the disk, for any number of orders, each with its
/// items and its event: all of them, or none.
///
/// It looks for repeated request ids first, since calls are repeated in numbers just when there is no time to fail whole
/// groups for them. But it is the unique key that decides: the statement waits for another transaction that is placing an
/// order with the same id, and fails if that commits. (`ON CONFLICT` would see both at once, row by row, and the items
/// and events would have to be joined with what it let through: 1.25 times the work for a group of 64.)
///
/// All three inserts ask the same, once, of the same snapshot: no order is without its items and its event. `now()` is when
/// the transaction began, and the default of `orders.created_at`.
///
/// Orders go in by request id, so that two statements which share several ids wait one for the other, not each for the
/// other.
///
/// All rows are fetched, to the end: only there the server says whether the commit succeeded.
async fn insert_orders(connection: &mut PgConnection, drafts: &[&Draft]) -> Result<Inserted, sqlx::Error> {
    let orders = OrderRows::of(drafts);
    let items = ItemRows::of(drafts);
    let events = outbox::Rows::of(drafts.iter().map(|draft| &draft.event));
    let inserted = sqlx::query_as!(
        Inserted,
        r#"-- orders: create orders
        WITH repeated AS MATERIALIZED (
            SELECT request_id FROM orders WHERE request_id = ANY ($2)
        ), placed AS (
            INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
            SELECT unnest($1::uuid[]), unnest($2::uuid[]) AS request_id, unnest($3::text[]), unnest($4::text[]),
                unnest($5::bigint[])
            WHERE NOT EXISTS (SELECT FROM repeated)
            ORDER BY request_id
        ), items AS (
            INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
            SELECT unnest($6::uuid[]), unnest($7::integer[]), unnest($8::text[]), unnest($9::integer[]),
                unnest($10::bigint[])
            WHERE NOT EXISTS (SELECT FROM repeated)
        ), events AS (
            INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
            SELECT unnest($11::uuid[]), unnest($12::integer[]), unnest($13::uuid[]), unnest($14::text[]),
                unnest($15::bytea[]), unnest($16::text[]), unnest($17::text[])
            WHERE NOT EXISTS (SELECT FROM repeated)
        )
        SELECT now() AS "created_at!", ARRAY (SELECT request_id FROM repeated) AS "repeated!""#,
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
    inserted.into_iter().next().ok_or(sqlx::Error::RowNotFound)
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
    fn of(drafts: &[&'d Draft]) -> Self {
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

/// The orders that the drafts' request ids have placed, by request id. They are committed: a look has seen them, or this
/// group has just placed them.
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
