//! Commits an order and its event in one transaction: the outbox pattern's first half.

use outbox::{NewEvent, TraceContext};
use proto::orders::v1::{Order, OrderCreated, OrderItem, OrderStatus};
use sqlx::{Connection, PgConnection, Postgres, Transaction, types::time::OffsetDateTime};
use uuid::Uuid;

use crate::{get_order::get_orders, validate_order::NewOrder};

/// `OrderCreated` is the first event of every order.
const SEQUENCE: i32 = 1;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateOrderError {
    #[error("the request_id was used for an order with other content")]
    RequestIdReused,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// An order that is committed, by this call or by an earlier one with the same request id.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) order: Order,
    pub(crate) by_this_call: bool,
}

/// Places the order, or finds the one its request id has placed.
///
/// After `Ok` the order and its event are durable. After a database error they may be, if it struck at the commit: the
/// caller repeats the call with the same request id and learns it.
pub(crate) async fn create_order(
    connection: &mut PgConnection,
    new: NewOrder,
    trace: TraceContext,
) -> Result<Placed, CreateOrderError> {
    let mut tx = connection.begin().await?;
    let order_id = Uuid::now_v7();
    let Some(created_at) = insert_order(&mut tx, order_id, &new).await? else {
        tx.rollback().await?;
        return find_placed(connection, new).await;
    };
    insert_items(&mut tx, order_id, &new.items).await?;
    let created = OrderCreated {
        order_id: order_id.to_string(),
        customer_id: new.customer_id,
        currency_code: new.currency_code,
        items: new.items,
        total_minor: new.total_minor,
    };
    outbox::enqueue(&mut tx, &[NewEvent::of(order_id, SEQUENCE, &created, &trace)]).await?;
    tx.commit().await?;

    let OrderCreated { order_id, customer_id, currency_code, items, total_minor } = created;
    let create_time = Some(outbox::timestamp(created_at));
    let status = OrderStatus::Pending.into();
    let rejection = String::new();
    let order = Order { order_id, customer_id, status, currency_code, items, total_minor, create_time, rejection };
    Ok(Placed { order, by_this_call: true })
}

/// `None` when the request id has placed an order before. The unique key decides: a second call with the same id, at the
/// same moment, waits here for the first to commit or roll back.
async fn insert_order(
    tx: &mut Transaction<'_, Postgres>,
    order_id: Uuid,
    new: &NewOrder,
) -> Result<Option<OffsetDateTime>, sqlx::Error> {
    sqlx::query_scalar!(
        "-- orders: insert order
        INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT ON CONSTRAINT orders_request_id_key DO NOTHING
        RETURNING created_at",
        order_id,
        new.request_id,
        new.customer_id,
        new.currency_code,
        new.total_minor,
    )
    .fetch_optional(&mut **tx)
    .await
}

async fn insert_items(
    tx: &mut Transaction<'_, Postgres>,
    order_id: Uuid,
    items: &[OrderItem],
) -> Result<(), sqlx::Error> {
    let skus: Vec<_> = items.iter().map(|item| item.sku.clone()).collect();
    let quantities: Vec<_> = items.iter().map(|item| item.quantity).collect();
    let prices: Vec<_> = items.iter().map(|item| item.unit_price_minor).collect();
    sqlx::query!(
        "-- orders: insert items
        INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
        SELECT $1, line, sku, quantity, unit_price_minor
        FROM unnest($2::text[], $3::integer[], $4::bigint[]) WITH ORDINALITY
            AS item (sku, quantity, unit_price_minor, line)",
        order_id,
        &skus,
        &quantities,
        &prices,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The order that `new`'s request id has placed. It is committed: the insert above waited for it.
async fn find_placed(connection: &mut PgConnection, new: NewOrder) -> Result<Placed, CreateOrderError> {
    let order_id = sqlx::query_scalar!(
        "-- orders: find by request id
        SELECT order_id FROM orders WHERE request_id = $1",
        new.request_id,
    )
    .fetch_one(&mut *connection)
    .await?;
    let order = get_orders(connection, &[order_id]).await?.pop().ok_or(sqlx::Error::RowNotFound)?;
    let same =
        order.customer_id == new.customer_id && order.currency_code == new.currency_code && order.items == new.items;
    if same { Ok(Placed { order, by_this_call: false }) } else { Err(CreateOrderError::RequestIdReused) }
}
