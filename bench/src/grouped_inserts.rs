//! Inserts alone: the rows of CreateOrder as arrays, many orders per transaction. It shows what PostgreSQL accepts if
//! nothing but grouping mattered. The arrays are ready before the clock starts.

use anyhow::{Result, ensure};
use proto::orders::v1::CreateOrderRequest;
use sqlx::{Connection, PgConnection};
use tokio::{task::JoinSet, time::Instant};
use uuid::Uuid;

use super::{quantiles::Latencies, requests::Shape};

const ORDERS_OF_A_GROUP: usize = 256;
/// Each client keeps one process of PostgreSQL busy.
const CLIENTS: usize = 2;

/// Unlike order-service, it looks nothing up, and neither decides nor answers anything.
const INSERT: &str = "-- bench: insert orders
    WITH inserted_orders AS (
        INSERT INTO orders (order_id, request_id, customer_id, currency_code, total_minor)
        SELECT unnest($1::uuid[]), unnest($2::uuid[]), unnest($3::text[]), unnest($4::text[]), unnest($5::bigint[])
    ), inserted_items AS (
        INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
        SELECT unnest($6::uuid[]), unnest($7::integer[]), unnest($8::text[]), unnest($9::integer[]),
            unnest($10::bigint[])
    )
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
    SELECT unnest($1::uuid[]), unnest($11::integer[]), unnest($12::uuid[]), unnest($13::text[]),
        unnest($14::bytea[])";

/// The orders of a transaction, as the arrays of the statement.
#[derive(Default)]
struct Group {
    order_ids: Vec<Uuid>,
    request_ids: Vec<Uuid>,
    customers: Vec<String>,
    currencies: Vec<String>,
    totals: Vec<i64>,
    items_order_ids: Vec<Uuid>,
    lines: Vec<i32>,
    skus: Vec<String>,
    quantities: Vec<i32>,
    prices: Vec<i64>,
    sequences: Vec<i32>,
    event_ids: Vec<Uuid>,
    event_types: Vec<&'static str>,
    payloads: Vec<Vec<u8>>,
}

impl Group {
    fn draw(payload_bytes: usize) -> Self {
        let mut group = Self::default();
        for _ in 0..ORDERS_OF_A_GROUP {
            let CreateOrderRequest { customer_id, currency_code, items, .. } = Shape::USUAL.request();
            let order_id = Uuid::now_v7();
            group.order_ids.push(order_id);
            group.request_ids.push(Uuid::new_v4());
            group.customers.push(customer_id);
            group.currencies.push(currency_code);
            group.totals.push(items.iter().map(|item| item.unit_price_minor * i64::from(item.quantity)).sum());
            for (item, line) in items.into_iter().zip(1..) {
                group.items_order_ids.push(order_id);
                group.lines.push(line);
                group.skus.push(item.sku);
                group.quantities.push(item.quantity);
                group.prices.push(item.unit_price_minor);
            }
            group.sequences.push(1);
            group.event_ids.push(Uuid::now_v7());
            group.event_types.push("orders.v1.OrderCreated");
            group.payloads.push(vec![b'x'; payload_bytes]);
        }
        group
    }

    async fn insert(&self, connection: &mut PgConnection) -> Result<()> {
        let insert = sqlx::query(INSERT)
            .bind(&self.order_ids)
            .bind(&self.request_ids)
            .bind(&self.customers)
            .bind(&self.currencies)
            .bind(&self.totals)
            .bind(&self.items_order_ids)
            .bind(&self.lines)
            .bind(&self.skus)
            .bind(&self.quantities)
            .bind(&self.prices)
            .bind(&self.sequences)
            .bind(&self.event_ids)
            .bind(&self.event_types)
            .bind(&self.payloads);
        let inserted = insert.execute(connection).await?.rows_affected();
        ensure!(inserted == ORDERS_OF_A_GROUP as u64, "{inserted} events inserted");
        Ok(())
    }
}

/// Inserts that many groups over [`CLIENTS`] concurrent connections. Returns orders per second, and the latencies of
/// the groups.
///
/// # Errors
/// If an insert fails.
pub(super) async fn run(url: &str, groups: usize, payload_bytes: usize) -> Result<(f64, Latencies)> {
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut connection = PgConnection::connect(url).await?;
        // The first group prepares the statement, and does not count.
        Group::draw(payload_bytes).insert(&mut connection).await?;
        clients.push((connection, Vec::new()));
    }
    // The clients alternate, so that ids grow over all of them, as those of a service do.
    for _ in 0..groups / CLIENTS {
        clients.iter_mut().for_each(|(_, drawn)| drawn.push(Group::draw(payload_bytes)));
    }
    let began = Instant::now();
    let mut inserting = JoinSet::new();
    for (mut connection, groups) in clients {
        inserting.spawn(async move {
            let mut latencies = Vec::with_capacity(groups.len());
            for group in groups {
                let began = Instant::now();
                group.insert(&mut connection).await?;
                latencies.push(began.elapsed().as_secs_f64() * 1e3);
            }
            anyhow::Ok(latencies)
        });
    }
    let latencies: Vec<Vec<f64>> = inserting.join_all().await.into_iter().collect::<Result<_>>()?;
    let latencies = latencies.concat();
    let rate = (latencies.len() * ORDERS_OF_A_GROUP) as f64 / began.elapsed().as_secs_f64();
    Ok((rate, Latencies::of(latencies)))
}
