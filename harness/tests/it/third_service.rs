//! Two subscribers of the orders' events behind one relay: inventory-service and loyalty-service.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use harness::{
    audit::{Points, audit},
    stress::{Load, place_orders, wait_until_delivered},
    system::{Service, stop},
};
use sqlx::PgPool;
use testkit::processes::Process;
use tokio::time::sleep;

use crate::site::Site;

const LIMIT: Duration = Duration::from_secs(20);
const LOAD: Load = Load { orders: 50, concurrency: 10, retry_for: LIMIT };
const PLACED: usize = LOAD.orders as usize;

/// The rows that wait for loyalty, and on which no attempt was spent.
const WAITING_FOR_LOYALTY: &str = "SELECT count(*) FROM outbox JOIN outbox_subscriptions USING (subscription_id)
    WHERE name = 'loyalty' AND attempts = 0";
const CONFIRMED: &str = "SELECT count(*) FROM orders WHERE status = 'CONFIRMED'";
const POINTS: &str = "SELECT coalesce(sum(points), 0)::bigint FROM points";

#[tokio::test(flavor = "multi_thread")]
async fn a_second_subscriber_that_is_stopped_holds_up_no_other_and_catches_up() {
    let site = &Site::prepare_with_loyalty(&[]).await;
    let (orders, loyalty) = (site.orders.pool().await, site.loyalty().pool().await);
    // An order that is placed within seconds of the subscription might not need to reach loyalty.
    execute(&orders, "UPDATE outbox_subscriptions SET created_at = created_at - interval '1 minute'").await;
    let mut processes = HashMap::new();
    start(site, &mut processes, &[Service::Inventory, Service::Orders]).await;
    let target = site.layout.target().unwrap();
    place_orders(&target, LOAD).await.unwrap();
    execute(&orders, "CREATE TABLE sent AS SELECT * FROM outbox").await;

    start(site, &mut processes, &[Service::OrdersRelay, Service::InventoryRelay]).await;
    wait_for_number(&orders, CONFIRMED, PLACED).await;
    let stopped = audit(&target.databases).await.unwrap();
    assert_eq!((stopped.findings, stopped.reserved), (Vec::new(), PLACED));
    assert_eq!(stopped.points, Some(Points { on_their_way: PLACED, ..Points::default() }));
    assert_eq!(number(&orders, WAITING_FOR_LOYALTY).await, PLACED, "a receiver that is down costs no attempt");

    start(site, &mut processes, &[Service::Loyalty]).await;
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    let awarded = Some(Points { awarded: PLACED, ..Points::default() });
    let caught_up = audit(&target.databases).await.unwrap();
    assert_eq!((caught_up.findings, caught_up.points), (Vec::new(), awarded.clone()));
    let earned = number(&orders, "SELECT sum(total_minor / 100)::bigint FROM orders").await;
    assert_eq!(number(&loyalty, POINTS).await, earned);
    assert_eq!(count_duplicates(&processes), [0, 0], "each event came once");

    // As if the relay had died before it deleted the rows.
    execute(&orders, "INSERT INTO outbox SELECT * FROM sent").await;
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    assert_eq!(count_duplicates(&processes), [PLACED, PLACED]);
    let again = audit(&target.databases).await.unwrap();
    assert_eq!((again.findings, again.reserved, again.points), (Vec::new(), PLACED, awarded));
    assert_eq!(number(&loyalty, POINTS).await, earned);
    stop(processes.into_values()).await.unwrap();
}

async fn start(site: &Site, processes: &mut HashMap<&'static str, Process>, services: &[Service]) {
    for service in services {
        processes.insert(service.name(), site.layout.start(*service).await.unwrap());
    }
}

/// How many events inventory-service and loyalty-service have skipped.
fn count_duplicates(processes: &HashMap<&'static str, Process>) -> [usize; 2] {
    [Service::Inventory, Service::Loyalty]
        .map(|service| processes[service.name()].log().unwrap().matches("duplicate skipped").count())
}

async fn execute(database: &PgPool, sql: &'static str) {
    sqlx::query(sql).execute(database).await.unwrap();
}

async fn number(database: &PgPool, sql: &'static str) -> usize {
    let number: i64 = sqlx::query_scalar(sql).fetch_one(database).await.unwrap();
    usize::try_from(number).unwrap()
}

async fn wait_for_number(database: &PgPool, sql: &'static str, expected: usize) {
    let started = Instant::now();
    while number(database, sql).await != expected {
        assert!(started.elapsed() < LIMIT, "not {expected} after {LIMIT:?}: {sql}");
        sleep(Duration::from_millis(10)).await;
    }
}
