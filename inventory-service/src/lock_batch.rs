//! Reads the rows that a batch decides on, under locks that last until its transaction ends.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::{Postgres, Transaction};

use crate::{
    order_event::{Change, OrderEvent, OrderId},
    reservations::{Reservation, Reservations, Status},
    stock::Stock,
};

/// Locks the reservations of the orders that the batch cancels, then the stock that it may move.
///
/// All batches lock in this one order: reservations by order, then stock by SKU. So batches never wait for each other
/// in a circle. Without the order, batches over the same SKUs would spend their time in deadlocks.
pub(crate) async fn lock_batch(
    tx: &mut Transaction<'_, Postgres>,
    events: &[&OrderEvent],
) -> Result<(Reservations, Stock), sqlx::Error> {
    let cancelled = events.iter().filter(|event| matches!(event.change, Change::Cancelled));
    let order_ids: Vec<OrderId> = cancelled.map(|event| event.order_id).collect();
    let reservations = lock_reservations(tx, &order_ids).await?;
    let stock = lock_stock(tx, reservations.skus().chain(wanted_skus(events))).await?;
    Ok((reservations, stock))
}

/// Locks only the reservations of cancelled orders. A new order normally has none. If it has one, the insert finds it.
async fn lock_reservations(
    tx: &mut Transaction<'_, Postgres>,
    order_ids: &[OrderId],
) -> Result<Reservations, sqlx::Error> {
    if order_ids.is_empty() {
        return Ok(Reservations::default());
    }
    let rows = sqlx::query!(
        "-- inventory: lock reservations
        SELECT order_id, status, cancelled_by FROM reservations
        WHERE order_id = ANY ($1) ORDER BY order_id FOR NO KEY UPDATE",
        order_ids as &[OrderId],
    )
    .fetch_all(&mut **tx)
    .await?;
    let mut quantities = read_quantities(tx, order_ids).await?;
    let stored = rows.into_iter().map(|row| {
        let order_id = OrderId::from(row.order_id);
        let quantities = quantities.remove(&order_id).unwrap_or_default();
        (order_id, Reservation::stored(Status::of(&row.status), quantities, row.cancelled_by.map(Into::into)))
    });
    Ok(Reservations::of(stored))
}

/// The quantities that the ledger says were reserved. They need no lock: entries of the ledger never change.
async fn read_quantities(
    tx: &mut Transaction<'_, Postgres>,
    order_ids: &[OrderId],
) -> Result<HashMap<OrderId, BTreeMap<String, i64>>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"-- inventory: read reserved quantities
        SELECT reference AS order_id, sku, -delta AS "quantity!" FROM stock_ledger
        WHERE reference = ANY ($1) AND kind = 'RESERVATION'"#,
        order_ids as &[OrderId],
    )
    .fetch_all(&mut **tx)
    .await?;
    let mut quantities: HashMap<OrderId, BTreeMap<String, i64>> = HashMap::new();
    for row in rows {
        quantities.entry(row.order_id.into()).or_default().insert(row.sku, row.quantity);
    }
    Ok(quantities)
}

/// Locks the SKUs that exist, all with one statement.
///
/// NO KEY UPDATE is the lock that the deduction itself takes. The SKUs are joined, not compared with `ANY`. With `ANY`,
/// PostgreSQL would search the whole array again for each row that another batch changed meanwhile, with stock under
/// lock.
async fn lock_stock(
    tx: &mut Transaction<'_, Postgres>,
    skus: impl Iterator<Item = &String>,
) -> Result<Stock, sqlx::Error> {
    let skus: BTreeSet<&String> = skus.collect();
    let skus: Vec<String> = skus.into_iter().cloned().collect();
    let rows = sqlx::query!(
        "-- inventory: lock stock
        SELECT stock.sku, stock.available
        FROM unnest($1::text[]) AS wanted (sku) JOIN stock ON stock.sku = wanted.sku
        ORDER BY stock.sku
        FOR NO KEY UPDATE OF stock",
        &skus,
    )
    .fetch_all(&mut **tx)
    .await?;
    Ok(Stock::of(rows.into_iter().map(|row| (row.sku, row.available)).collect()))
}

fn wanted_skus<'e>(events: &'e [&OrderEvent]) -> impl Iterator<Item = &'e String> {
    events
        .iter()
        .flat_map(|event| match &event.change {
            Change::Created(quantities) => Some(quantities.keys()),
            Change::Cancelled => None,
        })
        .flatten()
}
