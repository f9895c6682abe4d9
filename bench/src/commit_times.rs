//! The times of commits, as the databases recorded them (`track_commit_timestamp`). So every order is measured, and
//! nothing has to observe the system while it runs.
//!
//! The transaction that inserted the items of an order has accepted it, since items never change. The one that inserted
//! its reservation has reserved the stock. The last one that updated its row has confirmed it. PostgreSQL takes the
//! timestamp at the beginning of a commit, before the flush. So a time between two commits includes the flush of the
//! first one only.

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

/// How much earlier than the first call its transaction can have begun.
const MARGIN_MICROS: i64 = 200_000;

/// Reads the times of all CONFIRMED orders that were placed since then, or shortly before.
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
