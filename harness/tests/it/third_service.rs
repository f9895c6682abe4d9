//! loyalty-service, instead of inventory-service, behind a real relay.

use std::time::Duration;

use harness::{
    stress::{Load, place_orders, wait_until_delivered},
    system::{Service, stop},
};
use sqlx::PgPool;
use testkit::{
    Scratch, TestDatabase,
    processes::{Process, binary},
};

use crate::site::Site;

const LIMIT: Duration = Duration::from_secs(20);
const LOAD: Load = Load { orders: 50, concurrency: 10, retry_for: LIMIT };

/// Starts a subcommand of loyalty-service on the database, as one of its roles.
fn spawn(scratch: &Scratch, command: &str, database: &TestDatabase, role: &str, more: &[&str]) -> Process {
    let url = database.url_as(role);
    let arguments = [command, "--database-url", &url].into_iter().chain(more.iter().copied());
    let program = binary("loyalty-service").unwrap();
    Process::spawn("loyalty-service", &program, arguments, [("", ""); 0], &scratch.join("loyalty-service.log")).unwrap()
}

/// A database with the schema of loyalty-service.
pub(crate) async fn migrated(scratch: &Scratch) -> TestDatabase {
    let database = TestDatabase::create("loyalty_owner", &[]).await;
    spawn(scratch, "migrate", &database, "loyalty_owner", &[]).finish("migrate").await.unwrap();
    database
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_service_applies_each_event_once() {
    let Site { layout, orders, scratch, .. } = &Site::prepare(&[]).await;
    let loyalty = migrated(scratch).await;
    let listen = ["--listen", &layout.inventory_service.to_string()];
    let mut service = spawn(scratch, "serve", &loyalty, "loyalty_service", &listen);
    service.wait_healthy(layout.inventory_service, LIMIT).await.unwrap();
    let order_service = layout.start(Service::Orders).await.unwrap();

    let target = layout.target().unwrap();
    place_orders(&target, LOAD).await.unwrap();
    let (orders, loyalty) = (orders.pool().await, loyalty.pool().await);
    execute(&orders, "CREATE TABLE sent AS SELECT * FROM outbox").await;
    let relay = layout.start(Service::OrdersRelay).await.unwrap();
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    let earned = number(&orders, "SELECT sum(total_minor / 100)::bigint FROM orders").await;
    assert!(earned > 0);
    assert_eq!(number(&loyalty, "SELECT sum(points)::bigint FROM points").await, earned);

    // As if the relay had died before it deleted the rows.
    execute(&orders, "INSERT INTO outbox SELECT * FROM sent").await;
    wait_until_delivered(&target.databases, LIMIT).await.unwrap();
    assert_eq!(number(&loyalty, "SELECT sum(points)::bigint FROM points").await, earned);
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
