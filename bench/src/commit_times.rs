//! When things were committed, by the databases themselves (`track_commit_timestamp`): every order counts, and nobody has
//! to watch while it is measured.
//!
//! An order is accepted by the transaction that inserted its items, which never change; its stock is reserved by the one
//! that inserted its reservation; it is CONFIRMED by the last that updated its row. PostgreSQL stamps a commit as it
//! begins, before the flush, so from stamp to stamp the flush of the first counts and that of the second does not.

use std::collections::HashMap;

use anyhow::Result;
use uuid::Uuid;

use harness::target::Databases;

/// In microseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommitTimes {
    pub(super) accepted: i64,
    pub(super) stocked: i64,
    pub(super) confirmed: i64,
}

/// A transaction may have begun before the first of its orders was due.
const MARGIN_MICROS: i64 = 200_000;

/// Of the orders that were placed since then, or shortly before, and are CONFIRMED.
pub(super) async fn read(databases: &Databases, since_micros: i64) -> Result<HashMap<Uuid, CommitTimes>> {
    let orders: Vec<(Uuid, i64, i64)> = sqlx::query_as(
        "-- bench: read commit times of orders
        SELECT order_id, (extract(epoch FROM pg_xact_commit_timestamp(order_items.xmin)) * 1000000)::bigint,
            (extract(epoch FROM pg_xact_commit_timestamp(orders.xmin)) * 1000000)::bigint
        FROM orders JOIN order_items USING (order_id)
        WHERE line = 1 AND status = 'CONFIRMED' AND created_at >= to_timestamp($1::float8 / 1000000)",
    )
    .bind(since_micros - MARGIN_MICROS)
    .fetch_all(&mut databases.orders().await?)
    .await?;
    let reservations: Vec<(Uuid, i64)> = sqlx::query_as(
        "-- bench: read commit times of reservations
        SELECT order_id, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint
        FROM reservations WHERE created_at >= to_timestamp($1::float8 / 1000000)",
    )
    .bind(since_micros - MARGIN_MICROS)
    .fetch_all(&mut databases.inventory().await?)
    .await?;
    let stocked: HashMap<Uuid, i64> = reservations.into_iter().collect();
    let times = orders.into_iter().filter_map(|(order_id, accepted, confirmed)| {
        let stocked = *stocked.get(&order_id)?;
        Some((order_id, CommitTimes { accepted, stocked, confirmed }))
    });
    Ok(times.collect())
}
