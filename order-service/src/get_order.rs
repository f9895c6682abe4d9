//! Reads orders in their current state.

use std::collections::HashMap;

use proto::orders::v1::{Order, OrderItem, OrderStatus};
use sqlx::PgConnection;

use crate::ids::OrderId;

/// Those of the orders that exist, newest first. The two statements need no common snapshot: an order's items are
/// committed with it and never change.
pub(crate) async fn get_orders(
    connection: &mut PgConnection,
    order_ids: &[OrderId],
) -> Result<Vec<Order>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"-- orders: get orders
        SELECT order_id AS "order_id: OrderId", customer_id, status, currency_code, total_minor, created_at, rejection
        FROM orders WHERE order_id = ANY ($1) ORDER BY order_id DESC"#,
        order_ids as &[OrderId],
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut items = get_items(connection, order_ids).await?;
    let orders = rows.into_iter().map(|row| Order {
        order_id: row.order_id.to_string(),
        customer_id: row.customer_id,
        status: status(&row.status).into(),
        currency_code: row.currency_code,
        items: items.remove(&row.order_id).unwrap_or_default(),
        total_minor: row.total_minor,
        create_time: Some(outbox::timestamp(row.created_at)),
        rejection: row.rejection.unwrap_or_default(),
    });
    Ok(orders.collect())
}

async fn get_items(
    connection: &mut PgConnection,
    order_ids: &[OrderId],
) -> Result<HashMap<OrderId, Vec<OrderItem>>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"-- orders: get items
        SELECT order_id AS "order_id: OrderId", sku, quantity, unit_price_minor
        FROM order_items WHERE order_id = ANY ($1) ORDER BY order_id, line"#,
        order_ids as &[OrderId],
    )
    .fetch_all(connection)
    .await?;
    let mut items: HashMap<OrderId, Vec<OrderItem>> = HashMap::new();
    for row in rows {
        let item = OrderItem { sku: row.sku, quantity: row.quantity, unit_price_minor: row.unit_price_minor };
        items.entry(row.order_id).or_default().push(item);
    }
    Ok(items)
}

/// The names are those of the constraint `orders_status_known`.
fn status(name: &str) -> OrderStatus {
    match name {
        "PENDING" => OrderStatus::Pending,
        "CONFIRMED" => OrderStatus::Confirmed,
        "REJECTED" => OrderStatus::Rejected,
        "CANCELLED" => OrderStatus::Cancelled,
        _ => OrderStatus::Unspecified,
    }
}
