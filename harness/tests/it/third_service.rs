//! The example of the outbox library, instead of inventory-service, behind a real relay.

use std::time::Duration;

use harness::{
    stress::{Load, place_orders, wait_until_delivered},
    system::{Service, stop},
};
use sqlx::PgPool;
use testkit::{
    TestDatabase,
    processes::{Process, binary},
};

use crate::site::Site;

const LIMIT: Duration = Duration::from_secs(20);
const LOAD: Load = Load { orders: 50, concurrency: 10, retry_for: LIMIT };

#[test]
fn the_example_has_fewer_than_sixty_lines() {
    let example = include_str!("../../../outbox/examples/loyalty_service.rs");
    let code = example.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"));
    assert!(code.count() < 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_applies_each_event_once() {
    let Site { layout, orders, scratch, .. } = &Site::prepare(&[]).await;
    let loyalty = TestDatabase::create("inventory_owner", &[]).await;
    let (address, url) = (layout.inventory_service.to_string(), loyalty.url_as("inventory_owner"));
    let arguments = ["--listen", &address, "--database-url", &url];
    let program = binary("examples/loyalty_service").unwrap();
    let log = scratch.join("loyalty-service.log");
    let mut service = Process::spawn("loyalty-service", &program, arguments, [("", ""); 0], &log).unwrap();
    service.wait_healthy(layout.inventory_service, LIMIT).await.unwrap();
    let order_service = layout.start(Service::Orders).await.unwrap();

    let target = layout.target().unwrap();
    place_orders(&target, LOAD).await.unwrap();
    let (orders, loyalty) = (orders.pool().await, loyalty.pool().await);
    execute(&orders, "CREATE TABLE sent AS SELECT * FROM outbox").await;
    let relay = layout.start(Service::OrdersRelay).await.unwrap();
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    let ordered = number(&orders, "SELECT sum(total_minor)::bigint FROM orders").await;
    assert!(ordered > 0);
    assert_eq!(number(&loyalty, "SELECT sum(points)::bigint FROM points").await, ordered);

    // As if the relay had died before it deleted the rows.
    execute(&orders, "INSERT INTO outbox SELECT * FROM sent").await;
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    assert_eq!(number(&loyalty, "SELECT sum(points)::bigint FROM points").await, ordered);
    let log = service.log().unwrap();
    assert_eq!(log.matches("duplicate skipped").count(), LOAD.orders as usize, "{log}");
    stop([service, order_service, relay]).await.unwrap();
}

async fn execute(database: &PgPool, sql: &'static str) {
    sqlx::query(sql).execute(database).await.unwrap();
}

async fn number(database: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(database).await.unwrap()
}
