//! How long `migrate` takes over full tables, and for how long it holds orders up.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sqlx::{Connection, PgConnection};
use tokio::time::sleep;

use super::{Running, Version, finish, load::Pace};
use crate::system::{Service, stop};

/// For how long orders are placed before `migrate`, for comparison, and while it waits for a reader.
const PHASE: Duration = Duration::from_secs(10);

/// What fills the tables, which are as before there were subscriptions. Each takes the number of orders and of events.
const FILL: [&str; 4] = [
    "-- upgrade: fill orders
    INSERT INTO orders (order_id, request_id, customer_id, status, currency_code, total_minor)
    SELECT md5('order' || number)::uuid, md5('request' || number)::uuid, 'full-' || number % 10000, 'CONFIRMED', 'EUR', 1000
    FROM generate_series(1, $1 + 0 * $2) AS number",
    "-- upgrade: fill items
    INSERT INTO order_items (order_id, line, sku, quantity, unit_price_minor)
    SELECT md5('order' || number)::uuid, line, 'MUG', 1, 500
    FROM generate_series(1, $1 + 0 * $2) AS number, generate_series(1, 2) AS line",
    "-- upgrade: fill the inbox
    INSERT INTO processed_messages (message_id)
    SELECT md5('reply' || number)::uuid FROM generate_series(1, $1 + 0 * $2) AS number",
    // Of five: one that waits, one that is leased, one that backs off, one that is dead, and one behind it.
    "-- upgrade: fill the outbox
    INSERT INTO outbox
        (aggregate_id, sequence, event_id, event_type, payload, attempts, last_error, lease_token, visible_at)
    SELECT md5('order' || number - state / 4)::uuid, 1 + state / 4, md5('event' || number)::uuid, 'orders.v1.OrderCreated',
        decode(repeat('00', 150), 'hex'), CASE WHEN state IN (2, 3) THEN 5 ELSE 0 END,
        CASE WHEN state IN (2, 3) THEN 'INTERNAL: it failed' END,
        CASE WHEN state = 1 THEN md5('lease' || number / 500)::uuid END,
        (ARRAY[now(), now() + interval '30 s', now() + interval '1 h', 'infinity', now() + interval '5 min'])[1 + state]
    FROM (SELECT number, number % 5 AS state FROM generate_series(1, $2 + 0 * $1) AS number) AS event",
];

/// Migrates the orders database under load, with the processes of the earlier version, and then without.
pub(super) async fn migrate(earlier: &Version, later: &Version, orders: u32, events: u32, pace: Pace) -> Result<()> {
    ensure!(
        !earlier.subscribes,
        "the tables are filled as they were before there were subscriptions: give an older --from"
    );
    earlier.create().await?;
    fill(earlier, orders, events).await?;
    println!("upgrade: {orders} orders and {events} events are there");
    let mut running = Running::start(earlier, &[Service::Orders], pace).await?;
    running.load.goes_on().await?;
    running.load.take();
    sleep(PHASE).await;
    running.say("before");

    let mut reader = connect(earlier).await?;
    let mut reading = reader.begin().await?;
    sqlx::raw_sql("SELECT FROM outbox LIMIT 1").execute(&mut *reading).await?;
    let migrate = later.layout.start_migrate(Service::Orders, &[])?;
    sleep(PHASE).await;
    running.say("while migrate waits for a reader");
    let began = Instant::now();
    reading.rollback().await?;
    finish(migrate).await?;
    let took = began.elapsed();
    running.load.goes_on().await?;
    running.say(&format!("migrate took {took:.1?}"));

    let earlier_service = running.processes.drain().map(|(_, process)| process);
    stop(earlier_service).await?;
    let service = later.layout.start(Service::Orders).await?;
    running.processes.insert(Service::Orders.name(), service);
    running.load.goes_on().await?;
    running.say("order-service is of the later version");
    let began = Instant::now();
    finish(later.layout.start_migrate(Service::Orders, &["--contract"])?).await?;
    let took = began.elapsed();
    running.load.goes_on().await?;
    running.say(&format!("migrate --contract took {took:.1?}"));
    count(later, orders, events, running).await
}

async fn connect(version: &Version) -> Result<PgConnection> {
    let layout = &version.layout;
    Ok(PgConnection::connect(&layout.server.superuser_url(&layout.orders)).await?)
}

async fn fill(version: &Version, orders: u32, events: u32) -> Result<()> {
    let mut connection = connect(version).await?;
    for statement in FILL {
        let filling = sqlx::query(statement).bind(orders.cast_signed()).bind(events.cast_signed());
        filling.execute(&mut connection).await?;
    }
    sqlx::raw_sql("VACUUM ANALYZE").execute(&mut connection).await?;
    Ok(())
}

/// No order and no event may be gone, and none may have come unasked.
async fn count(version: &Version, orders: u32, events: u32, running: Running) -> Result<()> {
    let placed = running.load.stop().await?.order_ids.len();
    stop(running.processes.into_values()).await?;
    let counting = sqlx::query_as(
        "-- upgrade: count
        SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM outbox)",
    );
    let (there, enqueued): (i64, i64) = counting.fetch_one(&mut connect(version).await?).await?;
    let placed = i64::try_from(placed)?;
    let expected = (i64::from(orders) + placed, i64::from(events) + placed);
    ensure!(
        (there, enqueued) == expected,
        "{there} orders and {enqueued} events are there, and should be {expected:?}"
    );
    println!("upgrade: {there} orders and {enqueued} events are there afterwards, as they should be");
    Ok(())
}
